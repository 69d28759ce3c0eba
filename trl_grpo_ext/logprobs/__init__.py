"""Log-probabilities of groups of completions, with each prompt computed once."""

from trl_grpo_ext.logprobs.head import LOGITS_LIMIT_BYTES, token_statistics
from trl_grpo_ext.logprobs.packing import PackedGroups, pack_groups
from trl_grpo_ext.logprobs.shared_prefix import (
    SharedPrefix,
    difference_in_nats,
    has_dropout,
    prepare_shared_prefix,
    shared_prefix_logprobs,
)

__all__ = [
    "LOGITS_LIMIT_BYTES",
    "PackedGroups",
    "SharedPrefix",
    "difference_in_nats",
    "has_dropout",
    "pack_groups",
    "prepare_shared_prefix",
    "shared_prefix_logprobs",
    "token_statistics",
]
