"""The options of ``trl-grpo-ext plan`` as settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.memory.models import num_parameters
from trl_grpo_ext.memory.reference import (
    BLOCK_SIZES,
    Quantization,
    ReferenceFormat,
    ReferenceKind,
    usual_rank,
)
from trl_grpo_ext.memory.settings import Dtype, Optimizer, RunSettings, Sharding

_VALUES: dict[str, tuple[Any, ...]] = {
    "dtype": get_args(Dtype),
    "optimizer": get_args(Optimizer),
    "sharding": get_args(Sharding),
    "reference": ("auto", *get_args(ReferenceKind)),
    "reference_quantization": get_args(Quantization),
    "reference_block_size": BLOCK_SIZES,
    "reference_embedding_bits": (8, 16),
}


def settings_of(
    *,
    model: str,
    gpus: int,
    dtype: str,
    optimizer: str,
    sharding: str,
    lora: int,
    gradient_checkpointing: bool,
    micro_batch: int,
    gradient_accumulation: int | None,
    num_generations: int,
    prompt_tokens: int,
    completion_tokens: int,
    reference: str,
    reference_quantization: str,
    reference_block_size: int,
    reference_double_quantization: bool,
    reference_rank: int | None,
    reference_bits: float | None,
    reference_embedding_bits: int,
    reward: str,
    ppo: bool,
    shared_prefix: bool,
) -> RunSettings:
    """Return settings from what was typed, each option as in `trl-grpo-ext plan --help`.

    ``reference="auto"`` is the adapter switched off where there is one, else a full copy, from
    where :func:`~trl_grpo_ext.memory.plan.make_plan` looks for the first that fits. A reward
    ``"model"`` is of the policy's size; ``"api"`` takes no memory here. Without
    ``gradient_accumulation``, a GPU generates one group at a time.

    Raises:
        ConfigurationError: values that do not exist, all at once.
        ModelPreparationError: the reward model is not known.
    """
    given: dict[str, Any] = locals()
    problems = list(_unknown_values(given))
    if reference_rank is not None and reference_bits is not None:
        problems.append(
            "--reference-rank and --reference-bits are both set, and each says how large the "
            "reference is. Keep one of them."
        )
    if problems:
        raise ConfigurationError(problems)
    if reference == "auto":
        reference = "adapter" if lora else "resident"
    whole_group = math.ceil(num_generations / max(micro_batch, 1))
    choices: Any = {"dtype": dtype, "optimizer": optimizer, "sharding": sharding}
    return RunSettings(
        **choices,
        num_gpus=gpus,
        lora_rank=lora,
        gradient_checkpointing=gradient_checkpointing,
        micro_batch=micro_batch,
        num_generations=num_generations,
        generation_batch=micro_batch * (gradient_accumulation or whole_group),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        reference=reference,  # type: ignore[arg-type]  # one of _VALUES
        storage=ReferenceFormat(
            quantization=reference_quantization,  # type: ignore[arg-type]  # one of _VALUES
            block_size=reference_block_size,
            double_quantization=reference_double_quantization,
            rank=usual_rank(reference_quantization) if reference_rank is None else reference_rank,
            bits=reference_bits,
            embedding_bits=8 if reference_embedding_bits == 8 else None,
        ),
        reward_parameters=_reward_parameters(reward, policy=model),
        has_value_model=ppo,
        shared_prefix=shared_prefix,
    )


def _unknown_values(given: dict[str, Any]) -> Iterator[str]:
    for name, known in _VALUES.items():
        if given[name] not in known:
            yield (
                f"--{name.replace('_', '-')} is {given[name]!r}, which is not known, so its "
                f"memory cannot be told. Use one of: {', '.join(map(str, known))}."
            )


def _reward_parameters(reward: str, *, policy: str) -> int:
    if reward in ("none", "api"):
        return 0
    return num_parameters(policy if reward == "model" else reward)
