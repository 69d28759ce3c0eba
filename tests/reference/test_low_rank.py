"""Low-rank factors against the closed form of the paper in float64, and what they must beat."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from trl_grpo_ext.reference.low_rank import DAMPING, low_rank_factors, rank_of_budget


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_covariance(size: int, *, seed: int = 0) -> Tensor:
    """Of inputs that depend on each other, some a hundred times as large as others."""
    inputs = random(4 * size, size, seed=seed) * torch.logspace(0, -2, size)
    inputs = inputs @ torch.linalg.qr(random(size, size, seed=seed + 1)).Q
    return inputs.T @ inputs / len(inputs)


def damped(covariance: Tensor) -> Tensor:
    covariance = covariance.double()
    return covariance + DAMPING * covariance.diagonal().mean() * torch.eye(len(covariance))


def loss(error: Tensor, product: Tensor, covariance: Tensor) -> float:
    """tr((E - P) C (E - P)^T), float64."""
    rest = error.double() - product.double()
    return float((rest @ covariance.double() * rest).sum())


def by_the_closed_form(error: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """QERA, theorem 1: (E C^1/2)_r C^-1/2, with the symmetric root; all in float64."""
    values, vectors = torch.linalg.eigh(damped(covariance))
    root = vectors * values.sqrt() @ vectors.T
    left, sizes, right = torch.linalg.svd(error.double() @ root, full_matrices=False)
    truncated = left[:, :rank] * sizes[:rank] @ right[:rank]
    return truncated @ torch.linalg.inv(root)


def product_of(error: Tensor, covariance: Tensor, rank: int) -> Tensor:
    factor_in, factor_out = low_rank_factors(error, covariance_II=covariance, rank=rank)
    assert factor_in.shape == (rank, error.shape[1])
    assert factor_out.shape == (error.shape[0], rank)
    assert factor_in.dtype == factor_out.dtype == torch.float32
    return factor_out @ factor_in


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (100, 70), (1, 5), (5, 1)])
@pytest.mark.parametrize("rank", [1, 4])
def test_factors_are_those_of_the_closed_form(shape: tuple[int, int], rank: int) -> None:
    rank = min(rank, *shape)
    error, covariance = random(*shape), random_covariance(shape[1])
    expected = by_the_closed_form(error, covariance, rank)
    found = product_of(error, covariance, rank)
    # A random decomposition: as good as the best one to a hundredth of a percent.
    assert loss(error, found, damped(covariance)) == pytest.approx(
        loss(error, expected, damped(covariance)), rel=1e-4, abs=1e-6
    )
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_two_by_two_by_hand() -> None:
    """E = diag(1, 2), C = diag(16, 1): weighted, the first column weighs 4 and the second 2."""
    found = low_rank_factors(
        torch.diag(torch.tensor([1.0, 2.0])),
        covariance_II=torch.diag(torch.tensor([16.0, 1.0])),
        rank=1,
        damping=1e-9,
    )
    torch.testing.assert_close(found[1] @ found[0], torch.diag(torch.tensor([1.0, 0.0])))


def test_factors_are_of_like_size() -> None:
    """Where inputs are independent and of variance 1, each has the root of the singular values."""
    error = random(12, 8)
    factor_in, factor_out = low_rank_factors(
        error, covariance_II=torch.eye(8), rank=3, damping=1e-9
    )
    sizes = torch.linalg.svdvals(error)[:3]
    torch.testing.assert_close(factor_in.square().sum(dim=1), sizes)
    torch.testing.assert_close(factor_out.square().sum(dim=0), sizes)


@given(seed=st.integers(0, 1000), rank=st.integers(1, 12))
@hypothesis_settings(deadline=None, max_examples=30)
def test_weighted_factors_lose_no_more_than_those_of_the_error_alone(seed: int, rank: int) -> None:
    error, covariance = random(16, 12, seed=seed), random_covariance(12, seed=seed)
    left, sizes, right = torch.linalg.svd(error, full_matrices=False)
    plain = left[:, :rank] * sizes[:rank] @ right[:rank]
    norm = damped(covariance)
    lost = loss(error, product_of(error, covariance, rank), norm)
    assert lost <= loss(error, plain, norm) * (1 + 1e-4) + 1e-6
    assert lost <= loss(error, torch.zeros_like(error), norm)


def test_weighted_factors_lose_much_less_where_inputs_differ_in_size() -> None:
    error, covariance = random(64, 64), random_covariance(64)
    left, sizes, right = torch.linalg.svd(error)
    plain = left[:, :8] * sizes[:8] @ right[:8]
    lost = loss(error, product_of(error, covariance, 8), covariance)
    assert lost < 0.6 * loss(error, plain, covariance)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (40, 40)])
def test_full_rank_gives_back_the_error(shape: tuple[int, int]) -> None:
    error = random(*shape)
    found = product_of(error, random_covariance(shape[1]), min(shape))
    torch.testing.assert_close(found, error, rtol=1e-3, atol=1e-3)


def test_an_error_of_low_rank_is_found_exactly() -> None:
    error = random(50, 3) @ random(3, 40, seed=1)
    found = product_of(error, random_covariance(40), 3)
    torch.testing.assert_close(found, error, rtol=1e-3, atol=1e-3)


def test_more_rank_never_loses_more() -> None:
    error, covariance = random(24, 20), random_covariance(20)
    lost = [
        loss(error, product_of(error, covariance, rank), damped(covariance))
        for rank in range(1, 21)
    ]
    assert all(after < before for before, after in pairwise(lost))


def test_inputs_that_never_vary_give_the_factors_of_the_error_alone() -> None:
    error = random(12, 8)
    left, sizes, right = torch.linalg.svd(error, full_matrices=False)
    expected = left[:, :2] * sizes[:2] @ right[:2]
    found = product_of(error, torch.zeros(8, 8), 2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_no_error_gives_factors_of_0() -> None:
    assert not product_of(torch.zeros(6, 4), random_covariance(4), 2).any()


def test_generators_of_other_devices_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    low_rank_factors(torch.ones(4, 4), covariance_II=torch.eye(4), rank=1)
    assert seeded == []


def test_the_random_state_is_untouched_and_the_factors_are_the_same_each_time() -> None:
    error, covariance = random(30, 20), random_covariance(20)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = product_of(error, covariance, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(product_of(error, covariance, 4), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_errors_of_any_dtype_give_float32_factors(dtype: torch.dtype) -> None:
    error, covariance = random(12, 8).to(dtype), random_covariance(8)
    expected = product_of(error.float(), covariance, 3)
    torch.testing.assert_close(product_of(error, covariance, 3), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "out_features", "in_features", "rank"),
    [
        (0.5, 4096, 4096, 64),  # 64 * 16 * 8192 bits = 0.5 * 4096^2
        (0.5, 64, 192, 1),  # 0.5 * 64 * 192 / (16 * 256) = 1.5
        (0.1, 64, 64, 0),
        (0.0, 64, 64, 0),
        (1000.0, 64, 32, 32),
    ],
)
def test_rank_of_a_budget(bits: float, out_features: int, in_features: int, rank: int) -> None:
    assert rank_of_budget(bits, out_features=out_features, in_features=in_features) == rank


@given(bits=st.floats(0, 4), out_features=st.integers(1, 5000), in_features=st.integers(1, 5000))
def test_the_rank_of_a_budget_keeps_to_it_and_one_more_would_not(
    bits: float, out_features: int, in_features: int
) -> None:
    rank = rank_of_budget(bits, out_features=out_features, in_features=in_features)
    budget, each = bits * out_features * in_features, 16 * (out_features + in_features)
    assert rank * each <= budget * (1 + 1e-9)
    assert (rank + 1) * each > budget or rank == min(out_features, in_features)
