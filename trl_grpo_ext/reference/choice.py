"""Which reference a run gets when it asks for none by name: the first exact one that fits."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedModel

from trl_grpo_ext.memory import (
    ReferenceChoice,
    RunSettings,
    available_host_bytes,
    available_memory_bytes,
    choose_reference,
    estimate_run,
    model_shape,
    reference_bytes,
)

_SURELY = 16  # times a copy's bytes: with so much free, nothing needs to be estimated
_LATER = ("optimizer", "gradients", "activations", "kv_cache")  # what the run has yet to take


def choose_kind(
    policy: PreTrainedModel, settings: RunSettings, *, device: torch.device
) -> ReferenceChoice:
    """Return the kind of reference, and why; processes of one machine share its host memory.

    Args:
        policy: Whole; under DeepSpeed, for example, not yet on its device.
        settings: Of the run, for what it will take beside the reference.
        device: Where the run computes.
    """
    copy_bytes = sum(parameter.nbytes for parameter in policy.parameters())
    on_host = device.type == "cpu"
    is_coming = policy.device.type != device.type
    host = available_host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = host if on_host else available_memory_bytes()
    if settings.shards_weights:
        return ReferenceChoice("resident", "each process holds a part of it")
    if free > _SURELY * copy_bytes:
        return choose_reference(
            parameter_bytes=copy_bytes, streamed_device_bytes=0, free_device_bytes=free
        )
    shape = model_shape(policy.config)
    estimate = estimate_run(shape, settings)
    streamed = reference_bytes(shape, kind="streamed", dtype_bytes=settings.precision.weight)
    return choose_reference(
        parameter_bytes=copy_bytes,
        streamed_device_bytes=streamed.device,
        free_device_bytes=free,
        reserved_bytes=copy_bytes * is_coming
        + sum(size for part, size in estimate.parts.items() if part in _LATER),
        free_host_bytes=None if on_host else host,
    )
