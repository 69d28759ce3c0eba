"""Modes of a model for a while: what was set before is set again afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, inside."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def differentiable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Without dropout and with gradients for these parameters only, inside."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with evaluating(model), torch.enable_grad():
        model.requires_grad_(False)
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, required in before.items():
                parameter.requires_grad_(required)
