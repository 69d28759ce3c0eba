"""Weights that FSDP2 has split over the processes, whole on each of them for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """While inside, each process holds all weights of a model that FSDP2 has sharded.

    Forward passes then need no other process, so each may run as many as it wants. Every process
    must enter and leave. The weights are gathered once, in the dtype that FSDP2 computes with, and
    take as much memory on each process as the whole model in that dtype. Without FSDP2 this does
    nothing.

    Args:
        model: What ``fully_shard`` was called on, with its parts.

    Example:
        >>> with gathered_weights(nn.Linear(2, 2)):
        ...     pass  # sample
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    freed_over = [kept for unit in units if (kept := _freed_over(unit, is_root=unit is model))]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group, mesh in freed_over:
            group.post_forward_mesh_info = mesh
        for unit in units:
            unit.reshard()


def _freed_over(unit: FSDPModule, *, is_root: bool) -> tuple[Any, Any] | None:
    """A unit's weights, and over which processes they are split again after a forward pass.

    It can be set, but there is no public way to ask (torch 2.8 to 2.13). Unless it was told, the
    root keeps its weights, from its first pass on. Remove when FSDP2 has a getter.
    """
    state = unit._get_fsdp_state()
    group = state._fsdp_param_group
    if group is None or (is_root and state._auto_reshard_after_forward):
        return None
    return group, group.post_forward_mesh_info
