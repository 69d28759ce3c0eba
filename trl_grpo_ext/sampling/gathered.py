"""Weights that FSDP2 has split over the processes, whole on each of them for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    # FSDP2 lets a unit be told not to free its weights after a pass, but not be asked what it was
    # told (torch 2.8 to 2.13). The root never frees them. Remove when there is a getter.
    groups = [unit._get_fsdp_state()._fsdp_param_group for unit in units if unit is not model]
    freed_over = [(group, group.post_forward_mesh_info) for group in groups if group is not None]
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
