"""Models that stay whole on each process while DeepSpeed ZeRO-3 splits the policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed


@contextmanager
def without_zero3() -> Iterator[None]:
    """While inside, transformers and TRL do not know of ZeRO-3.

    transformers then splits no model that is loaded, and TRL's fused LM head gathers no weight.
    """
    zero3 = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3
