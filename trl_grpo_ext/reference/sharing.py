"""A reference from the main process, for processes of machines that do not share its disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

from trl_grpo_ext.reference.layer_stream import named_tensors
from trl_grpo_ext.reference.store import replace_weights

_MAIN = 0  # rank


def is_main() -> bool:
    """Return whether this is the first process of all, or the only one."""
    return not distributed.is_initialized() or distributed.get_rank() == _MAIN


def is_anywhere(value: bool) -> bool:  # noqa: FBT001 - it is what is asked about
    """Return whether something holds in some process; every one must call it."""
    if not distributed.is_initialized():
        return value
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return any(found)


def of_main(value: Any) -> Any:
    """Return what the main process has here; every one must call it."""
    found = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(found, src=_MAIN)
    return found[0]


@torch.no_grad()
def send_weights(reference: PreTrainedModel, *, takes: bool, device: torch.device) -> None:
    """Give the weights of the main process to those that take them; every one must call it.

    One tensor at a time, through the device.

    Args:
        reference: Whole; of the same structure in each process, but for low-rank factors.
        takes: Whether this process takes them.
        device: What the processes talk over.
    """
    own = dict(named_tensors(reference))
    kinds = of_main({name: (tensor.dtype, tensor.shape) for name, tensor in own.items()})

    def sent() -> Iterator[tuple[str, Tensor]]:
        for name, (dtype, shape) in kinds.items():
            value = own[name].to(device) if is_main() else torch.empty(shape, dtype=dtype)
            value = value.to(device).contiguous()
            distributed.broadcast(value, src=_MAIN)
            yield name, value

    if takes:
        replace_weights(reference, sent())
        return
    for _ in sent():
        pass
