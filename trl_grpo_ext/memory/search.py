"""The fastest settings that fit, from those asked for to the most frugal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from trl_grpo_ext.memory.estimate import estimate_run
from trl_grpo_ext.memory.reference import ReferenceKind
from trl_grpo_ext.memory.settings import Optimizer, RunSettings, Sharding, settings_problems
from trl_grpo_ext.memory.shape import ModelShape

LORA_RANK = 16  # what an adapter gets that the search proposes
MAX_GPUS = 1024

T = TypeVar("T")

_REFERENCES: tuple[ReferenceKind, ...] = ("resident", "streamed", "quantized")
# ZeRO-1 saves less than ZeRO-2 and is no faster; ZeRO-3 splits what FSDP splits, and reward models.
_STAGES: tuple[Sharding, ...] = ("none", "zero2", "fsdp", "zero3")
_OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "adamw_8bit", "paged_adamw_8bit")


def frugal_settings(asked: RunSettings) -> Iterator[RunSettings]:
    """Yield settings from those asked for to the most frugal.

    First the reference is of another kind, an exact one before a quantized one; then more is split
    over the GPUs; then layers are computed again; then micro-batches are single completions; then,
    where nothing is split, AdamW keeps 8 bits, at last in host memory. An adapter in the place of
    all weights comes last, on a policy in 16 bits: it changes what is learnt.
    """
    trainings = [asked]
    if not asked.lora_rank:
        reference: ReferenceKind = "none" if asked.reference == "none" else "adapter"
        adapter = replace(asked, lora_rank=LORA_RANK, reference=reference, optimizer="adamw")
        trainings.append(
            replace(adapter, dtype="bfloat16" if asked.dtype == "mixed" else asked.dtype)
        )
    for training in trainings:
        yield from _variants(training)


def fastest_that_fits(
    shape: ModelShape, asked: RunSettings, *, usable_bytes: int, host_bytes: int | None = None
) -> RunSettings | None:
    """Return the first of :func:`frugal_settings` that fits; ``None`` if none does.

    Args:
        shape: Of the policy.
        asked: Where to start.
        usable_bytes: Of each GPU.
        host_bytes: Host memory of the machine for all its processes; ``None`` if not known.
    """
    for settings in frugal_settings(asked):
        estimate = estimate_run(shape, settings)
        host = estimate.host_bytes * settings.num_gpus
        if estimate.total_bytes <= usable_bytes and (host_bytes is None or host <= host_bytes):
            return settings
    return None


def gpus_that_suffice(shape: ModelShape, asked: RunSettings, *, usable_bytes: int) -> int | None:
    """Return the smallest power of two of GPUs on which some setting fits; ``None`` above 1024."""
    gpus = 1
    while gpus <= MAX_GPUS:
        if gpus > asked.num_gpus:
            wider = replace(asked, num_gpus=gpus)
            if fastest_that_fits(shape, wider, usable_bytes=usable_bytes) is not None:
                return gpus
        gpus *= 2
    return None


def _variants(asked: RunSettings) -> Iterator[RunSettings]:
    stages = _from(_STAGES, asked.sharding) if asked.num_gpus > 1 else [asked.sharding]
    choices = itertools.product(
        _from(_OPTIMIZERS, asked.optimizer),
        dict.fromkeys((asked.micro_batch, 1)),
        dict.fromkeys((asked.gradient_checkpointing, True)),
        stages,
        _references(asked.reference),
    )
    for optimizer, micro_batch, checkpointing, stage, reference in choices:
        settings = replace(
            asked,
            optimizer=optimizer,
            micro_batch=micro_batch,
            gradient_checkpointing=checkpointing,
            sharding=stage,
            reference=reference,
        )
        possible = optimizer == asked.optimizer or stage == "none"
        if possible and not list(settings_problems(settings)):
            yield settings


def _references(asked: ReferenceKind) -> Sequence[ReferenceKind]:
    """The kind that was asked for, and the others; where weights are split, any may be smallest."""
    others = [kind for kind in _REFERENCES if kind != asked]
    return [asked, *others] if asked in _REFERENCES else [asked]


def _from(values: Sequence[T], first: T) -> Sequence[T]:
    """These values from ``first`` on; only that one if it is not among them."""
    return values[values.index(first) :] if first in values else [first]
