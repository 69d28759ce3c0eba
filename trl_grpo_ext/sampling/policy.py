"""The model of a recipe that samples and trains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig

from trl_grpo_ext.cpu_linear import use_onednn


def policy_problems(model: ModelConfig) -> Iterator[str]:
    """Yield what the choice of a model asks for and is for training only."""
    for name in ("use_peft", "load_in_4bit", "load_in_8bit"):
        if getattr(model, name):
            yield (
                f"`{name}` is set, but nothing is trained here, and the model samples as it was "
                "saved. Remove it; `model_name_or_path` may be the folder of an adapter."
            )


def load_policy(
    name: str, *, model: ModelConfig, trust_remote_code: bool, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model that samples, in evaluation mode on its device, and its tokenizer.

    Args:
        name: A folder (of a model, or of an adapter) or a name on the Hub.
        model: Revision, dtype and attention.
        trust_remote_code: Whether code that comes with the model is run.
        device: Where to.
    """
    shared: dict[str, Any] = {
        "revision": model.model_revision,
        "trust_remote_code": trust_remote_code,
    }
    policy: Any = AutoModelForCausalLM.from_pretrained(
        name, dtype=model.dtype, attn_implementation=model.attn_implementation, **shared
    )
    policy = policy.to(device).eval()
    use_onednn(policy)
    return policy, AutoTokenizer.from_pretrained(name, **shared)
