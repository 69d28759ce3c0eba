"""A model whose weights are on a device only while they are used there."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextlib.contextmanager
def on_device(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Have the model on the device for the duration of the block, then where it was.

    What was there before is kept and put back, so that nothing is copied on the way home; the
    weights must not change meanwhile.
    """
    if model.device == device:
        yield
        return
    with moved(model, lambda tensor: tensor.to(device)):
        yield


@contextlib.contextmanager
def moved(model: nn.Module, move: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Have other tensors in the place of a model's for the duration of the block.

    ``Module.to`` does not do it: bitsandbytes 0.50 keeps codes and scales in attributes of its
    parameters and layers too, and some of them stay where they are when the whole model is moved.

    Args:
        model: Its layers may be those of bitsandbytes.
        move: From a tensor to what stands in its place. One in two places is given once.
    """
    tensors = [*model.parameters(), *model.buffers()]
    data = [(tensor, tensor.data) for tensor in tensors]
    attributes = [(owner, dict(vars(owner))) for owner in [*tensors, *_states(model, tensors)]]
    move_once = _Once(move)
    try:
        for tensor, before in data:
            tensor.data = move_once(before)
        for owner, named in attributes:
            vars(owner).update(
                {name: move_once(it) for name, it in named.items() if isinstance(it, Tensor)}
            )
        yield
    finally:
        for tensor, before in data:
            tensor.data = before
        for owner, named in attributes:
            vars(owner).update(named)


class _Once:
    """Gives the same answer for the same memory."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        self._move = move
        self._found: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._found:
            self._found[key] = self._move(tensor)
        return self._found[key]


def _states(model: nn.Module, tensors: list[Tensor]) -> Iterator[object]:
    """Yield the objects of bitsandbytes that hold tensors of the model."""
    of_layers = (getattr(module, "state", None) for module in model.modules())
    of_weights = [getattr(tensor, "quant_state", None) for tensor in tensors]
    nested = (getattr(state, "state2", None) for state in of_weights)
    for state in itertools.chain(of_layers, of_weights, nested):
        if type(state).__module__.startswith("bitsandbytes."):
            yield state
