"""Models that their processes hold in parts (FSDP2, DeepSpeed ZeRO-3), and whole copies of them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.memory import available_host_bytes, available_memory_bytes

_ROOM = 2  # times the bytes of the weights: what has to be free on a device to calibrate there


def is_partitioned(policy: nn.Module) -> bool:
    """Return whether DeepSpeed ZeRO-3 has split the weights, from loading them on."""
    return any(hasattr(parameter, "ds_id") for parameter in policy.parameters())


def blueprint(policy: PreTrainedModel) -> PreTrainedModel:
    """Return the policy without its weights: on torch's meta device, in their whole shapes.

    It is drawn before the trainer wraps the policy; what wraps it cannot be copied.
    """
    plan = _rebuilt(policy, [_on_meta(parameter) for parameter in policy.parameters()])
    for module in plan.modules():  # where whole policies are, not where ZeRO-3 loads
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.cpu()
    return plan


def whole_policy(policy: PreTrainedModel, plan: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the policy with all of its weights as they are now, in host memory.

    Every process must call it. Each one gathers weight after weight, and then holds all of them.

    Args:
        policy: Split by FSDP2 or ZeRO-3; not changed.
        plan: Its :func:`blueprint`.

    Raises:
        ReferenceModelError: host memory is too small for a copy on each process.
    """
    split_again(policy)
    _check_host_memory(plan)
    weights = [
        gathered(parameter).detach().to("cpu", copy=True) for parameter in policy.parameters()
    ]
    return _rebuilt(plan, weights)


@contextmanager
def near(policy: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """While inside, a whole policy in host memory is on the device, if it fits there twice.

    FSDP2 and DeepSpeed leave the weights in host memory until training starts, where it takes long
    to sample and to calibrate.
    """
    home = policy.device
    num_bytes = sum(parameter.nbytes for parameter in policy.parameters())
    moves = home.type == "cpu" != device.type and available_memory_bytes() > _ROOM * num_bytes
    if moves:
        nn.Module.to(policy, device)
    try:
        yield
    finally:
        if moves:
            nn.Module.to(policy, home)


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of a tensor, of which this process may hold a part."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


@contextmanager
def unsplit(tensor: Tensor, *, writes: bool = False) -> Iterator[None]:
    """While inside, what ZeRO-3 has split is whole; every process must enter and leave.

    Args:
        tensor: Anything that is not split by ZeRO-3 is left as it is.
        writes: Whether what the first process has changed inside stays.
    """
    if not hasattr(tensor, "ds_id"):
        yield
        return
    from deepspeed import zero  # it split the tensor, so it is there

    with zero.GatheredParameters([tensor], modifier_rank=0 if writes else None):
        yield


def gathered(tensor: Tensor) -> Tensor:
    """Return all of a tensor: itself, or a copy in host memory if processes hold parts of it.

    Every process must call it then.
    """
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().cpu()
    if hasattr(tensor, "ds_id"):
        with unsplit(tensor):
            return tensor.detach().to("cpu", copy=True)
    return tensor


def aligned(target: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the part of ``target`` that this process holds, and the same part of ``value``.

    Args:
        target: Whole, or split by FSDP2.
        value: Whole, of the same shape.
    """
    if not isinstance(target, DTensor):
        return target, value
    mesh, placements = target.device_mesh, target.placements
    parts = distribute_tensor(value.to(target.device), mesh, placements, src_data_rank=None)
    return target.to_local(), parts.to_local()


def split_again(model: nn.Module) -> None:
    """Free what FSDP2 has left whole after a forward pass, so that a change reaches its parts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _rebuilt(model: PreTrainedModel, weights: list[Tensor]) -> PreTrainedModel:
    """A copy of the model with these weights, tied as its own are."""
    # `deepcopy` takes what its memo holds for an object instead of copying it.
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(weight, requires_grad=parameter.requires_grad)
        for parameter, weight in zip(model.parameters(), weights, strict=True)
    }
    rebuilt = copy.deepcopy(model, memo)
    # A trainer may have replaced `forward` on the model itself; the copy starts from its class.
    vars(rebuilt).pop("forward", None)
    return rebuilt


def _on_meta(parameter: nn.Parameter) -> Tensor:
    return torch.empty(whole_shape(parameter), dtype=parameter.dtype, device="meta")


def _check_host_memory(plan: nn.Module) -> None:
    """All processes of a machine take the same now; none has begun while another checks."""
    num_bytes = sum(parameter.nbytes for parameter in plan.parameters())
    free = available_host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_bytes > free:
        raise ReferenceModelError(
            f"The policy is split over the processes, and to build a reference of its weights each "
            f"process gathers all {num_bytes / 1e9:.2f} GB in host memory, where "
            f"{free / 1e9:.2f} GB are free for it, so that the system would end the run. Use "
            "`reference: auto` or `resident`, which stay split, or start fewer processes a machine."
        )
