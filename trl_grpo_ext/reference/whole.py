"""A policy that its processes hold in parts (FSDP2, DeepSpeed ZeRO-3), whole on each of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from trl_grpo_ext.memory import available_memory_bytes

_ROOM = 2  # times the bytes of the weights: what has to be free on a device to calibrate there


def is_partitioned(policy: nn.Module) -> bool:
    """Return whether DeepSpeed ZeRO-3 has split the weights, from loading them on."""
    return any(hasattr(parameter, "ds_id") for parameter in policy.parameters())


def blueprint(policy: PreTrainedModel) -> PreTrainedModel:
    """Return the policy without its weights: on torch's meta device, in their whole shapes.

    It is drawn before the trainer wraps the policy; what wraps it cannot be copied.
    """
    return _rebuilt(policy, [_on_meta(parameter) for parameter in policy.parameters()])


def whole_policy(policy: PreTrainedModel, plan: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the policy with all of its weights as they are now, in host memory.

    Every process must call it. Each one gathers weight after weight, and then holds all of them.

    Args:
        policy: Split by FSDP2 or ZeRO-3; not changed.
        plan: Its :func:`blueprint`.
    """
    return _rebuilt(plan, [_gathered(parameter) for parameter in policy.parameters()])


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
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return torch.empty(shape, dtype=parameter.dtype, device="meta")


@torch.no_grad()
def _gathered(parameter: nn.Parameter) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().to("cpu", copy=True)
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero  # ZeRO-3 split it, so it is there

        with zero.GatheredParameters([parameter]):
            return parameter.detach().to("cpu", copy=True)
    return parameter.detach().to("cpu", copy=True)
