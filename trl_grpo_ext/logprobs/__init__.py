"""Log-probabilities of groups of completions, with each prompt computed once."""

from trl_grpo_ext.logprobs.packing import PackedGroups, pack_groups
from trl_grpo_ext.logprobs.shared_prefix import (
    SharedPrefix,
    difference_in_nats,
    has_dropout,
    prepare_shared_prefix,
    shared_prefix_logprobs,
)

__all__ = [
    "PackedGroups",
    "SharedPrefix",
    "difference_in_nats",
    "has_dropout",
    "pack_groups",
    "prepare_shared_prefix",
    "shared_prefix_logprobs",
]
