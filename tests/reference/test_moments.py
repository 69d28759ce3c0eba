"""Estimated moments: by hand, at both ends, and nearer to the truth than those of the rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from trl_grpo_ext.reference.moments import estimated_moments, outer_sum


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_that_over_the_rows_in_float32(dtype: torch.dtype) -> None:
    rows = (100 * random(40, 6)).to(dtype)
    expected = torch.zeros(6, 6)
    for row in rows.float():
        expected += torch.outer(row, row)
    assert outer_sum(rows).dtype == torch.float32
    # Above 65504, which float16 does not hold.
    torch.testing.assert_close(outer_sum(rows), expected, rtol=1e-4, atol=1.0)


def test_the_sum_of_no_row_is_0() -> None:
    assert torch.equal(outer_sum(torch.zeros(0, 3)), torch.zeros(3, 3))


def test_correlations_count_as_rows_to_rows_and_features() -> None:
    """Rows (1, 1) and (3, 1): mean moments (5, 2; 2, 1), of which 2 / (2 + 2) of the 2 stay."""
    total = outer_sum(torch.tensor([[1.0, 1.0], [3.0, 1.0]]))
    found = estimated_moments(total, num_rows=2)
    assert found.tolist() == [[5.0, 1.0], [1.0, 1.0]]


def test_a_prior_counts_as_as_many_rows_as_there_are_features() -> None:
    """(10 + 2 * 4, 4 + 2 * 1; ..., 2 + 2 * 3) / 4."""
    total = outer_sum(torch.tensor([[1.0, 1.0], [3.0, 1.0]]))
    prior = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    found = estimated_moments(total, num_rows=2, prior_II=prior)
    assert found.tolist() == [[4.5, 1.5], [1.5, 2.0]]


def test_without_a_row_it_is_the_prior() -> None:
    prior = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    assert torch.equal(estimated_moments(torch.zeros(2, 2), num_rows=0, prior_II=prior), prior)
    assert not estimated_moments(torch.zeros(2, 2), num_rows=0).any()


@given(num_rows=st.integers(1, 60), seed=st.integers(0, 1000))
@hypothesis_settings(deadline=None, max_examples=30)
def test_variances_are_those_of_the_rows_and_no_eigenvalue_is_negative(
    num_rows: int, seed: int
) -> None:
    rows = random(num_rows, 8, seed=seed)
    found = estimated_moments(outer_sum(rows), num_rows=num_rows)
    torch.testing.assert_close(found.diagonal(), rows.square().mean(dim=0))
    assert torch.linalg.eigvalsh(found).min() > -1e-5


@pytest.mark.parametrize("num_rows", [2, 8, 32])
def test_it_is_nearer_to_the_truth_than_the_moments_of_few_rows(num_rows: int) -> None:
    root = random(32, 32) / torch.arange(1, 33) ** 0.5
    truth, error, plain = root.T @ root, 0.0, 0.0
    for seed in range(20):
        total = outer_sum(random(num_rows, 32, seed=seed + 1) @ root)
        error += float((estimated_moments(total, num_rows=num_rows) - truth).norm())
        plain += float((total / num_rows - truth).norm())
    assert error < plain
