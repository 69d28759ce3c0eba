"""Log-probabilities and entropies from logits, against autograd through a plain softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trl_grpo_ext.logprobs import token_statistics


def plain(logits: Tensor, labels: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    logp = (logits / temperature).log_softmax(dim=-1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(dim=-1)


@pytest.mark.parametrize("num_labels", [0, 1, 32, 33, 70])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_a_plain_softmax(num_labels: int, temperature: float) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(num_labels, 19, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(19, (num_labels,))
    weights = torch.randn(2, num_labels, dtype=torch.float64)
    results = []
    for function in (token_statistics, plain):
        values = torch.stack(function(logits, labels, temperature=temperature))
        results.append((values, *torch.autograd.grad((weights * values).sum(), logits)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_of_the_two_alone(which: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (40,))
    found, expected = (
        torch.autograd.grad(function(logits, labels, temperature=1.3)[which].sum(), logits)[0]
        for function in (token_statistics, plain)
    )
    torch.testing.assert_close(found, expected)


def test_values_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [1000.0, -1000.0]])
    logprobs, entropies = token_statistics(logits, torch.tensor([0, 0]), temperature=1.0)
    # p = 1/4, 3/4; then certainty, whose entropy is 0 and not NaN
    assert logprobs.tolist() == pytest.approx([math.log(1 / 4), 0.0])
    assert entropies.tolist() == pytest.approx(
        [-math.log(1 / 4) / 4 - 3 / 4 * math.log(3 / 4), 0.0]
    )
