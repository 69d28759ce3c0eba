"""Modes of a model for a while: what holds inside, and that all of it comes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from trl_grpo_ext.reference.modes import differentiable, evaluating


def mixed_model() -> nn.Sequential:
    """Some parts train, some do not; some parameters require a gradient, some do not."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.Linear(2, 2)))
    model[0].eval()
    model[0].bias.requires_grad_(False)
    return model


def state(model: nn.Module) -> tuple[list[bool], list[bool]]:
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
    )


def test_evaluating_switches_every_module_and_back() -> None:
    model = mixed_model()
    before = state(model)
    assert before[0] == [True, False, True, True, True]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert state(model)[1] == before[1]
    assert state(model) == before


def test_differentiable_leaves_gradients_to_the_chosen_parameters() -> None:
    model = mixed_model()
    before = state(model)
    chosen = [model[0].bias, model[2][0].weight]
    with torch.no_grad(), differentiable(model, iter(chosen)):
        assert torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
        found = [p for p in model.parameters() if p.requires_grad]
        assert all(a is b for a, b in zip(found, chosen, strict=True))
    assert state(model) == before


@pytest.mark.parametrize(
    "enter", [evaluating, lambda model: differentiable(model, [model[0].weight])]
)
def test_an_error_brings_everything_back(enter: Callable[[nn.Module], object]) -> None:
    model = mixed_model()
    before = state(model)
    with pytest.raises(KeyError), enter(model):  # type: ignore[attr-defined]
        raise KeyError
    assert state(model) == before
    assert torch.is_grad_enabled()
