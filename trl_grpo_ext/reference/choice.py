"""Which reference a run gets when it asks for none by name: the first exact one that fits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from trl_grpo_ext.errors import LayerOrderError, ReferenceModelError
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
from trl_grpo_ext.reference.streamed import disk_bytes

logger = logging.get_logger(__name__)

_SURELY = 16  # times a copy's bytes: with so much free, nothing needs to be estimated
_THERE = ("weights", "adapter", "reference")  # parts of a run; it has yet to take the others


def choose_kind(
    policy: PreTrainedModel,
    settings: RunSettings,
    *,
    device: torch.device,
    disk: Path | None = None,
    in_host_memory: bool = True,
) -> ReferenceChoice:
    """Return the kind of reference, and why; processes of one machine share its host memory.

    Args:
        policy: Whole; under DeepSpeed and FSDP2, for example, not yet on its device.
        settings: Of the run, for what it will take beside the reference.
        device: Where the run computes.
        disk: A folder, perhaps to be made, that layers may be read from; ``None`` for none.
        in_host_memory: Whether layers may be streamed from there.
    """
    copy_bytes = sum(parameter.nbytes for parameter in policy.parameters())
    on_host = device.type == "cpu"
    is_coming = policy.device.type != device.type
    host = available_host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = host if on_host else available_memory_bytes()
    if free > _SURELY * copy_bytes:
        return choose_reference(
            parameter_bytes=copy_bytes, streamed_device_bytes=0, free_device_bytes=free
        )
    try:
        shape, written = model_shape(policy.config), _disk_bytes(policy)
        parts = estimate_run(shape, settings).parts
    except LayerOrderError:  # it can be neither streamed nor calibrated
        return ReferenceChoice("resident", "its layers cannot be told apart")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        logger.debug(f"{type(policy.config).__name__}: {error!r}")
        return ReferenceChoice("resident", "the memory of such a model cannot be estimated")
    num_shards = settings.num_gpus if settings.shards_weights else 1
    part, dtype_bytes = -(-copy_bytes // num_shards), settings.precision.weight
    streamed = reference_bytes(shape, kind="streamed", dtype_bytes=dtype_bytes)
    quantized = reference_bytes(shape, kind="quantized", dtype_bytes=dtype_bytes)
    choice = choose_reference(
        parameter_bytes=copy_bytes,
        streamed_device_bytes=None if written is None else streamed.device,
        quantized_bytes=quantized.device,
        free_device_bytes=free,
        reserved_bytes=part * is_coming
        + sum(size for name, size in parts.items() if name not in _THERE),
        free_host_bytes=None if on_host or not in_host_memory else host,
        free_disk_bytes=None if disk is None else _free_bytes(disk),
        disk_bytes=written,
        num_shards=num_shards,
    )
    if choice.kind == "quantized" and num_shards > 1 and part <= quantized.device:
        return ReferenceChoice("resident", "each process holds a part of it, less than in 4 bits")
    return choice


def _disk_bytes(policy: PreTrainedModel) -> int | None:
    """What streaming from disk writes; ``None`` if layers share tensors and cannot be streamed."""
    try:
        return disk_bytes(policy)
    except ReferenceModelError:
        return None


def _free_bytes(folder: Path) -> int:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
