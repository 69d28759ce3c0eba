"""Error-feedback rounding: by hand, against the plain algorithm, against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from trl_grpo_ext.reference import QuantizedLinear
from trl_grpo_ext.reference.rounding import DAMPING, damped, round_with_feedback

TERNARY = torch.tensor([-1.0, 0.0, 1.0])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_covariance(size: int, *, seed: int = 0, num_tokens: int | None = None) -> Tensor:
    """Of inputs that depend on each other, with sizes from 1 down to 1 over ``size``."""
    scales = 1 / torch.arange(1, size + 1)
    inputs = random(num_tokens or 4 * size, size, seed=seed) * scales
    inputs = inputs @ random(size, size, seed=seed + 1)
    return inputs.T @ inputs / len(inputs)


def nearest(weight: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """The value that each weight is rounded to alone."""
    places = (weight[..., None] / scales[..., None] - levels).abs().argmin(dim=-1)
    return levels[places] * scales


def rounded(weight: Tensor, covariance: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    codes = round_with_feedback(weight, covariance_II=covariance, scales_OI=scales, levels=levels)
    assert codes.dtype == torch.uint8
    assert codes.shape == weight.shape
    return levels[codes.long()] * scales


def loss(weight: Tensor, found: Tensor, covariance: Tensor) -> float:
    error = (weight - found).double()
    return float((error @ covariance.double() * error).sum())


def quantized_columns_one_by_one(
    weight: Tensor, covariance: Tensor, scales: Tensor, levels: Tensor
) -> Tensor:
    """Frantar and Alistarh 2022, OBQ, arXiv:2208.11580, equations 2 and 3, left to right.

    The inverse of what is left is updated by Gaussian elimination: no Cholesky factor, no panels.
    """
    mean = covariance.diagonal().double().mean()
    inverse = torch.linalg.inv(covariance.double() + DAMPING * mean * torch.eye(len(covariance)))
    rest, found = weight.double().clone(), torch.empty_like(weight)
    for column in range(weight.shape[1]):
        found[:, column] = nearest(rest[:, column], scales[:, column], levels)
        error = (rest[:, column] - found[:, column]) / inverse[column, column]
        rest -= error[:, None] * inverse[column]
        inverse -= inverse[:, [column]] * inverse[[column]] / inverse[column, column]
    return found


# By hand ------------------------------------------------------------------------------------------


def test_two_columns_by_hand() -> None:
    """The inverse of C = (1, r; r, 1) is (1, -r; -r, 1) / (1 - r^2).

    The first error e1 therefore raises the second weight by r e1. For a weight of 0.4, 0.3:
    0.4 -> 0, e1 = 0.4, the second becomes 0.3 + 0.8 * 0.4 = 0.62 -> 1.
    For 0.6, 0.3: 0.6 -> 1, e1 = -0.4, the second becomes 0.3 - 0.32 = -0.02 -> 0.
    For 0.4, 0.1: 0.1 + 0.32 = 0.42 -> 0.
    """
    weight = torch.tensor([[0.4, 0.3], [0.6, 0.3], [0.4, 0.1]])
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    found = rounded(weight, covariance, torch.ones(3, 2), TERNARY)
    assert found.tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]


def test_three_columns_by_hand() -> None:
    """Inputs x, x and y: the error of the first goes to the second only, y is rounded alone.

    With scales of 2 and damping that is next to none: 0.8 -> 0 (nearest of -2, 0, 2), so the second
    becomes 0.9 + 0.8 = 1.7 -> 2. The third, 0.9, -> 0 whatever the others lost.
    """
    covariance = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    codes = round_with_feedback(
        torch.tensor([[0.8, 0.9, 0.9]]),
        covariance_II=covariance,
        scales_OI=torch.full((1, 3), 2.0),
        levels=TERNARY,
        damping=1e-6,
    )
    assert codes.tolist() == [[1, 2, 1]]


def test_each_weight_has_its_own_scale() -> None:
    weight, scales = torch.tensor([[0.9, 0.9]]), torch.tensor([[1.0, 4.0]])
    assert rounded(weight, torch.eye(2), scales, TERNARY).tolist() == [[1.0, 0.0]]


def test_damping_is_a_share_of_the_mean_variance() -> None:
    covariance = torch.tensor([[1.0, 0.5], [0.5, 3.0]])
    expected = torch.tensor([[1.2, 0.5], [0.5, 3.2]], dtype=torch.float64)
    torch.testing.assert_close(damped(covariance, 0.1), expected)
    assert covariance.tolist() == [[1.0, 0.5], [0.5, 3.0]]
    double = covariance.double()
    damped(double, 0.1)
    assert double.tolist() == [[1.0, 0.5], [0.5, 3.0]]


def test_strong_damping_is_rounding_to_nearest() -> None:
    weight, covariance = random(8, 40), random_covariance(40)
    codes = round_with_feedback(
        weight, covariance_II=covariance, scales_OI=torch.ones(8, 40), levels=TERNARY, damping=1e6
    )
    assert torch.equal(TERNARY[codes.long()], nearest(weight, torch.ones(8, 40), TERNARY))


# Against the plain algorithm ----------------------------------------------------------------------


@pytest.mark.parametrize("num_columns", [1, 3, 63, 64, 65, 150])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_it_is_the_plain_algorithm_column_by_column(num_columns: int, quantization: str) -> None:
    weight = random(24, num_columns, seed=3)
    layer = QuantizedLinear(weight, quantization=quantization)  # type: ignore[arg-type]
    covariance = random_covariance(num_columns, seed=num_columns)
    scales = layer.scales().repeat_interleave(64)[: weight.numel()].view(weight.shape)
    order = covariance.diagonal().argsort(descending=True, stable=True)
    expected = torch.empty_like(weight)
    expected[:, order] = quantized_columns_one_by_one(
        weight[:, order], covariance[order][:, order], scales[:, order], layer.levels
    )
    found = rounded(weight, covariance, scales, layer.levels)
    # In float32 a tie may fall to the other side, which changes what follows in this row.
    same_rows = torch.isclose(found, expected).all(dim=1)
    assert same_rows.float().mean() >= (0.95 if quantization == "nf4" else 0.5)
    assert loss(weight, found, covariance) == pytest.approx(
        loss(weight, expected, covariance), rel=0.1
    )


@pytest.mark.parametrize("num_columns", [16, 100])
def test_on_average_it_loses_less_than_rounding_to_nearest(num_columns: int) -> None:
    shares = []
    for seed in range(12):
        weight, covariance = random(16, num_columns, seed=seed), random_covariance(num_columns)
        layer = QuantizedLinear(weight)
        scales = layer.scales().repeat_interleave(64)[: weight.numel()].view(weight.shape)
        found = rounded(weight, covariance, scales, layer.levels)
        alone = nearest(weight, scales, layer.levels)
        shares.append(loss(weight, found, covariance) / loss(weight, alone, covariance))
    assert max(shares) < 1
    assert sum(shares) / len(shares) < 0.7


def test_a_level_more_or_less_anywhere_loses_more_in_most_places() -> None:
    """The greedy choice is near a minimum: of single changes to a neighbour, few gain."""
    weight, covariance = random(4, 24, seed=5), random_covariance(24)
    levels = torch.linspace(-2, 2, 9)
    found = rounded(weight, covariance, torch.ones(4, 24), levels)
    start, gains = loss(weight, found, covariance), 0
    for row in range(4):
        for column in range(24):
            for step in (-0.5, 0.5):
                changed = found.clone()
                changed[row, column] += step
                gains += loss(weight, changed, covariance) < start
    assert gains < 0.1 * 4 * 24 * 2


# Properties ---------------------------------------------------------------------------------------


@given(
    size=st.integers(1, 80),
    variance=st.floats(1e-6, 1e6),
    seed=st.integers(0, 1000),
    quantization=st.sampled_from(["nf4", "fp4", "int8"]),
)
@hypothesis_settings(deadline=None, max_examples=30)
def test_inputs_that_are_alike_and_independent_give_the_nearest_levels(
    size: int, variance: float, seed: int, quantization: str
) -> None:
    weight = random(5, size, seed=seed)
    layer = QuantizedLinear(weight, quantization=quantization)  # type: ignore[arg-type]
    scales = layer.scales().repeat_interleave(64)[: weight.numel()].view(weight.shape)
    found = rounded(weight, variance * torch.eye(size), scales, layer.levels)
    torch.testing.assert_close(
        (weight - found).abs(), (weight - nearest(weight, scales, layer.levels)).abs()
    )


def test_inputs_that_never_vary_give_the_nearest_levels() -> None:
    weight = random(4, 70)
    found = rounded(weight, torch.zeros(70, 70), torch.ones(4, 70), TERNARY)
    assert torch.equal(found, nearest(weight, torch.ones(4, 70), TERNARY))


def test_an_input_that_is_always_0_takes_no_part() -> None:
    """The others are rounded as if its column was not there."""
    weight, covariance = random(6, 20), random_covariance(20)
    rest = [column for column in range(20) if column != 7]
    covariance[7], covariance[:, 7] = 0, 0
    found = rounded(weight, covariance, torch.ones(6, 20), TERNARY)
    # The same damping: a share of the mean of 20 variances, of which one is 0.
    alone = round_with_feedback(
        weight[:, rest],
        covariance_II=covariance[rest][:, rest],
        scales_OI=torch.ones(6, 19),
        levels=TERNARY,
        damping=DAMPING * 19 / 20,
    )
    assert torch.equal(found[:, rest], TERNARY[alone.long()])
    assert torch.equal(found[:, 7], nearest(weight[:, 7], torch.ones(6), TERNARY))


def test_the_size_of_the_inputs_does_not_matter() -> None:
    weight, covariance = random(6, 90), random_covariance(90)
    found = [rounded(weight, c, torch.ones(6, 90), TERNARY) for c in (covariance, covariance * 64)]
    assert torch.equal(*found)


def test_rows_do_not_depend_on_each_other() -> None:
    weight, covariance = random(6, 90), random_covariance(90)
    together = rounded(weight, covariance, torch.ones(6, 90), TERNARY)
    one = rounded(weight[2:3], covariance, torch.ones(1, 90), TERNARY)
    assert torch.equal(together[2:3], one)


def test_the_order_of_the_levels_does_not_matter() -> None:
    weight, covariance, ones = random(6, 90), random_covariance(90), torch.ones(6, 90)
    levels = torch.linspace(-2, 2, 16)
    shuffled = levels[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    expected = rounded(weight, covariance, ones, levels)
    assert torch.equal(rounded(weight, covariance, ones, shuffled), expected)


def test_a_level_that_is_there_twice_changes_nothing() -> None:
    weight, covariance, ones = random(6, 90), random_covariance(90), torch.ones(6, 90)
    twice = torch.tensor([0.0, 1.0, -1.0, 0.0])
    expected = rounded(weight, covariance, ones, TERNARY)
    assert torch.equal(rounded(weight, covariance, ones, twice), expected)


def test_a_block_of_scale_0_stays_0_and_the_others_make_up_for_it() -> None:
    """Of two equal inputs the first is lost: 0.6 + 0.5 = 1.1 -> 1 for the second."""
    scales = torch.tensor([[0.0, 1.0]])
    covariance = torch.tensor([[1.0, 0.999], [0.999, 1.0]])
    found = rounded(torch.tensor([[0.6, 0.45]]), covariance, scales, TERNARY)
    assert found.tolist() == [[0.0, 1.0]]


def test_a_block_of_zeros_in_a_layer_gives_finite_codes() -> None:
    weight = random(8, 128)
    weight[2:4] = 0
    layer = QuantizedLinear(weight, double_quantization=False)
    scales = layer.scales().repeat_interleave(64).view(weight.shape)
    assert not scales[2:4].any()
    found = rounded(weight, random_covariance(128), scales, layer.levels)
    assert not found[2:4].any()
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_rounded_as_their_values_are(dtype: torch.dtype) -> None:
    weight, covariance, ones = random(6, 90).to(dtype), random_covariance(90), torch.ones(6, 90)
    expected = rounded(weight.float(), covariance, ones, TERNARY)
    assert torch.equal(rounded(weight, covariance, ones, TERNARY), expected)


def test_the_weight_is_not_changed() -> None:
    weight, covariance = random(6, 90), random_covariance(90)
    before = weight.clone(), covariance.clone()
    rounded(weight, covariance, torch.ones(6, 90), TERNARY)
    assert torch.equal(weight, before[0])
    assert torch.equal(covariance, before[1])
