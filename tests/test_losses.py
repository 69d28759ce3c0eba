"""The objective by hand, against autograd of the plain formula, and the KL gradients exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trl_grpo_ext.losses import (
    clipped_surrogate,
    grpo_loss,
    importance_ratio,
    is_clipped,
    kl_estimate,
    kl_gradient_problem,
    reduce_tokens,
)

LOG2 = math.log(2)


def test_importance_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens() -> None:
    old = torch.zeros(2, 2)
    new = torch.tensor([[2.0, 8.0], [3.0, 100.0]]).log()
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])  # sqrt(2 * 8) = 4; the 100 is padding
    result = importance_ratio(new, old, mask, level="sequence")
    torch.testing.assert_close(result, torch.tensor([[4.0], [3.0]]))


def test_importance_ratio_is_1_where_a_completion_has_no_token() -> None:
    result = importance_ratio(
        torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), level="sequence"
    )
    assert result.tolist() == [[1.0]]


def test_importance_ratio_refuses_an_unknown_level() -> None:
    with pytest.raises(ValueError, match="use one of token, sequence"):
        importance_ratio(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), level="word")


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.4, True),  # up is capped at 1.2
        (0.5, 2.0, -1.0, False),  # down is not capped where the advantage is positive
        (0.5, -2.0, 1.6, True),  # down is capped at 0.8
        (1.5, -2.0, 3.0, False),  # up is not capped where the advantage is negative
        (1.5, 0.0, 0.0, False),
    ],
)
def test_clipped_surrogate_caps_only_what_the_advantage_favours(
    ratio: float, advantage: float, expected: float, clipped: bool
) -> None:
    arguments = (torch.tensor([[ratio]]), torch.tensor([advantage]))
    loss = clipped_surrogate(*arguments, epsilon_low=0.2, epsilon_high=0.2)
    assert loss.item() == pytest.approx(expected)
    assert is_clipped(*arguments, epsilon_low=0.2, epsilon_high=0.2).item() is clipped


def test_clipped_surrogate_has_no_gradient_where_clipped() -> None:
    ratio = torch.tensor([[1.5, 1.1]], requires_grad=True)
    clipped_surrogate(
        ratio, torch.tensor([2.0]), epsilon_low=0.2, epsilon_high=0.2
    ).sum().backward()
    assert ratio.grad.tolist() == [[0.0, -2.0]]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    # log pi - log ref = log 2, so d = -log 2 and exp(d) = 1/2
    [("k1", LOG2), ("k2", LOG2**2 / 2), ("k3", 0.5 + LOG2 - 1)],
)
def test_kl_estimate_by_hand(estimator: str, expected: float) -> None:
    result = kl_estimate(
        torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log(), estimator=estimator
    )
    assert result.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimate_stays_constant_beyond_the_clamp(estimator: str) -> None:
    policy = torch.tensor([[-50.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[0.0, -1.5]])
    result = kl_estimate(policy, reference, estimator=estimator, clamp=10.0)
    at_the_clamp = kl_estimate(torch.tensor([[-10.0]]), torch.tensor([[0.0]]), estimator=estimator)
    assert result[0, 0].item() == at_the_clamp.item()
    result.sum().backward()
    assert policy.grad[0, 0] == 0.0
    assert policy.grad[0, 1] != 0.0


@pytest.mark.parametrize("clamp", [0.0, -1.0])
def test_kl_estimate_refuses_a_clamp_that_is_not_positive(clamp: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), clamp=clamp)


def test_kl_estimate_refuses_an_unknown_estimator() -> None:
    with pytest.raises(ValueError, match="use one of k1, k2, k3"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), estimator="k4")


def _true_gradient(logits: Tensor, ref_logprobs: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    (logprobs.exp() * (logprobs - ref_logprobs)).sum().backward()
    return logits.grad


def _expected_gradient(
    logits: Tensor, ref_logprobs: Tensor, estimator: str, *, bias_correction: bool
) -> Tensor:
    """The gradient of the estimate for each token, weighted by how often it is drawn."""
    logits = logits.clone().requires_grad_()
    logprobs_1V = logits.log_softmax(0)[None]
    kl_1V = kl_estimate(logprobs_1V, ref_logprobs[None], estimator=estimator)
    if bias_correction:
        kl_1V = kl_1V * importance_ratio(logprobs_1V, logprobs_1V.detach(), torch.ones(1, 5))
    (kl_1V * logprobs_1V.detach().exp()).sum().backward()
    return logits.grad


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_expected_gradient_is_that_of_the_reverse_kl_unless_refused(
    estimator: str, bias_correction: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, generator=generator, dtype=torch.float64)
    reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    true = _true_gradient(logits, reference)
    found = _expected_gradient(logits, reference, estimator, bias_correction=bias_correction)
    right = torch.allclose(found, true, atol=1e-12)
    refused = kl_gradient_problem(estimator, bias_correction=bias_correction) is not None
    # Plain k3 is wrong too (its gradient is the forward KL's), but TRL has it: allowed.
    assert right is (not refused and (estimator, bias_correction) != ("k3", False))
    if (estimator, bias_correction) == ("k1", False):
        assert found.abs().max() < 1e-12


REDUCED = torch.tensor([[2.0, 4.0, 9.0], [6.0, 9.0, 9.0]])
REDUCED_MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("reduction", "arguments", "expected"),
    [
        ("grpo", {}, (3 + 6) / 2),
        ("bnpo", {}, 12 / 3),
        ("dapo", {}, 12 / 3),
        ("dapo", {"num_tokens": 6.0}, 12 / 6),
        ("dr_grpo", {"max_completion_length": 3}, 12 / 6),
        ("luspo", {}, (6 + 6) / 2),
    ],
)
def test_reduce_tokens_by_hand(
    reduction: str, arguments: dict[str, float], expected: float
) -> None:
    result = reduce_tokens(REDUCED, REDUCED_MASK, reduction=reduction, **arguments)
    assert result.item() == pytest.approx(expected)


@pytest.mark.parametrize("reduction", ["grpo", "bnpo", "dapo", "luspo"])
def test_reduce_tokens_is_0_when_every_token_is_masked(reduction: str) -> None:
    assert reduce_tokens(REDUCED, torch.zeros(2, 3), reduction=reduction).item() == 0.0


def test_reduce_tokens_refuses_dr_grpo_without_its_length() -> None:
    with pytest.raises(ValueError, match="`max_completion_length`, which is missing"):
        reduce_tokens(REDUCED, REDUCED_MASK, reduction="dr_grpo")


def test_reduce_tokens_refuses_an_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="use one of grpo, bnpo, dr_grpo, dapo, luspo"):
        reduce_tokens(REDUCED, REDUCED_MASK, reduction="sum")


def _plain_loss(
    new: Tensor, old: Tensor, ref: Tensor, advantages: list[float], lengths: list[int], beta: float
) -> Tensor:
    """Token by token, as the paper writes it."""
    total = torch.zeros((), dtype=new.dtype)
    for i, length in enumerate(lengths):
        for t in range(length):
            ratio = (new[i, t] - old[i, t]).exp()
            gain = torch.minimum(ratio * advantages[i], ratio.clamp(0.8, 1.3) * advantages[i])
            d = ref[i, t] - new[i, t]
            total = total - gain + beta * (d.exp() - d - 1) * ratio
    return total / sum(lengths)


def test_grpo_loss_and_its_gradient_equal_the_plain_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    shape, lengths, advantages = (3, 4), [4, 2, 3], [1.0, -0.5, 0.3]
    new, old, ref = (
        torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 - 1 for _ in range(3)
    )
    mask = (torch.arange(4) < torch.tensor(lengths)[:, None]).double()
    ours, plain = new.clone().requires_grad_(), new.clone().requires_grad_()
    result = grpo_loss(
        ours,
        old_logprobs_BT=old,
        advantages_B=torch.tensor(advantages, dtype=torch.float64),
        mask_BT=mask,
        ref_logprobs_BT=ref,
        beta=0.1,
        epsilon=0.2,
        epsilon_high=0.3,
    )
    expected = _plain_loss(plain, old, ref, advantages, lengths, beta=0.1)
    torch.testing.assert_close(result.loss, expected)
    result.loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_grpo_loss_reports_kl_and_clipping() -> None:
    new = torch.tensor([[0.5, 0.5]]).log()
    result = grpo_loss(
        new,
        old_logprobs_BT=torch.tensor([[0.5, 0.25]]).log(),  # ratios 1 and 2
        advantages_B=torch.tensor([1.0]),
        mask_BT=torch.ones(1, 2),
        ref_logprobs_BT=torch.tensor([[0.5, 0.25]]).log(),
        beta=0.1,
        kl_estimator="k2",
    )
    assert result.clip_fraction.item() == 0.5
    assert result.kl.item() == pytest.approx(LOG2**2 / 4)  # 0 and log(2)^2 / 2
    assert result.loss.item() == pytest.approx(-(1 + 1.2) / 2 + 0.1 * LOG2**2 / 4)


def test_grpo_loss_at_sequence_level_gives_each_token_the_same_weight() -> None:
    new = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    arguments = {"old_logprobs_BT": new.detach(), "mask_BT": torch.ones(1, 2)}
    result = grpo_loss(
        new, advantages_B=torch.tensor([2.0]), importance_level="sequence", **arguments
    )
    result.loss.backward()
    assert result.loss.item() == pytest.approx(-2.0)
    torch.testing.assert_close(new.grad, torch.tensor([[-1.0, -1.0]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`ref_logprobs_BT` is missing"),
        ({"kl_estimator": "k1", "kl_bias_correction": False}, "expected gradient of 0"),
        ({"kl_estimator": "k2", "kl_bias_correction": True}, "wrong expected gradient"),
    ],
)
def test_grpo_loss_refuses_a_penalty_that_cannot_work(
    arguments: dict[str, object], message: str
) -> None:
    logprobs = torch.zeros(1, 1)
    if arguments:
        arguments["ref_logprobs_BT"] = logprobs
    with pytest.raises(ValueError, match=message):
        grpo_loss(
            logprobs,
            old_logprobs_BT=logprobs,
            advantages_B=torch.ones(1),
            mask_BT=torch.ones(1, 1),
            beta=0.1,
            **arguments,
        )
