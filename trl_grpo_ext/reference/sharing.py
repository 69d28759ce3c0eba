"""A reference from the main process, for processes of machines that do not share its disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed

from trl_grpo_ext.reference.layer_stream import Weights

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
def sent(weights: Weights, *, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the main process in each process, one at a time; every one must call it.

    Args:
        weights: By their names; only the main process's count.
        device: What the processes talk over.
    """
    kinds = of_main({name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()})
    for name, (dtype, shape) in kinds.items():
        value = weights[name] if is_main() else torch.empty(shape, dtype=dtype)
        value = value.detach().to(device).contiguous()
        distributed.broadcast(value, src=_MAIN)
        yield name, value
