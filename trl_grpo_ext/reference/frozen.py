"""Frozen copies of the live policy."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference.whole import is_partitioned


def frozen_copy(policy: PreTrainedModel, memo: dict[int, Any]) -> PreTrainedModel:
    """Return a copy in evaluation mode, none of whose parameters requires a gradient.

    Args:
        policy: Not changed.
        memo: What stands for an object of the policy, by its ``id``, instead of a copy of it.
    """
    reference = copy.deepcopy(policy, memo)
    # A trainer may have replaced `forward` on the policy itself; the copy starts from its class.
    vars(reference).pop("forward", None)
    for module in reference.modules():
        if "gradient_checkpointing" in vars(module):
            vars(module)["gradient_checkpointing"] = False
    return cast(PreTrainedModel, reference.requires_grad_(False).eval())


def check_policy(policy: PreTrainedModel) -> None:
    """Refuse a policy whose weights this process cannot copy.

    Raises:
        ReferenceModelError: it is a PEFT model, already quantized, partitioned, or not loaded here.
    """
    if hasattr(policy, "peft_config"):
        raise ReferenceModelError(
            "The policy is a PEFT model: with its adapter switched off it is its own exact "
            "reference, at no memory. Remove `reference`, or set `reference: auto`."
        )
    if getattr(policy, "is_quantized", False):
        raise ReferenceModelError(
            "The policy is already quantized, "
            "so a reference cannot be built from its weights. Set `reference: auto`."
        )
    if is_partitioned(policy):
        raise ReferenceModelError(
            "The policy is partitioned by DeepSpeed ZeRO-3: no process holds its weights. Let the "
            "trainer build the reference, or build it from "
            "`trl_grpo_ext.reference.whole.whole_policy(policy, blueprint(policy))`."
        )
    if any(parameter.device == torch.device("meta") for parameter in policy.parameters()):
        raise ReferenceModelError(
            "This process holds no weights of the policy (meta device). "
            "Set `fsdp_cpu_ram_efficient_loading: false` in the "
            "accelerate configuration, or `reference: auto`."
        )
