"""Advantages by hand, against a slow reference and TRL's own lines, and their invariants."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from trl_grpo_ext.advantages import (
    group_advantages,
    informative_groups,
    informative_step_groups,
    multi_reward_advantages,
    step_advantages,
    weighted_reward,
)

NAN = math.nan
rewards_lists = st.lists(
    st.lists(st.floats(-10, 10, width=32) | st.just(NAN), min_size=4, max_size=4),
    min_size=1,
    max_size=5,
)


def test_group_advantages_divides_by_the_sample_deviation_of_the_group() -> None:
    # Group 1: mean 1, deviations -1, 0, 1, std sqrt(2 / 2) = 1. Group 2: mean 4, std 2.
    rewards = torch.tensor([0.0, 1.0, 2.0, 2.0, 4.0, 6.0])
    expected = torch.tensor([-1.0, 0.0, 1.0, -1.0, 0.0, 1.0])
    torch.testing.assert_close(group_advantages(rewards, group_size=3, eps=0.0), expected)


def test_group_advantages_adds_eps_to_the_deviation() -> None:
    rewards = torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(
        group_advantages(rewards, group_size=3, eps=1.0), torch.tensor([-0.5, 0.0, 0.5])
    )


def test_group_advantages_divides_by_the_deviation_of_the_batch() -> None:
    # All six: mean 2.5, squares 6.25 + 2.25 + .25 + .25 + 2.25 + 12.25 = 23.5, std sqrt(23.5 / 5).
    rewards = torch.tensor([0.0, 1.0, 2.0, 2.0, 4.0, 6.0])
    expected = torch.tensor([-1.0, 0.0, 1.0, -2.0, 0.0, 2.0]) / math.sqrt(4.7)
    torch.testing.assert_close(
        group_advantages(rewards, group_size=3, scale="batch", eps=0.0), expected
    )


def test_group_advantages_leave_one_out_compares_with_the_others() -> None:
    # 0 against (1 + 5) / 2 = 3; 1 against 2.5; 5 against 0.5.
    rewards = torch.tensor([0.0, 1.0, 5.0])
    result = group_advantages(rewards, group_size=3, baseline="leave_one_out", scale="none")
    torch.testing.assert_close(result, torch.tensor([-3.0, -1.5, 4.5]))


def test_group_advantages_leave_one_out_counts_only_scored_ones() -> None:
    rewards = torch.tensor([0.0, NAN, 5.0])
    result = group_advantages(rewards, group_size=3, baseline="leave_one_out", scale="none")
    torch.testing.assert_close(result, torch.tensor([-5.0, 0.0, 5.0]))


def test_group_advantages_leaves_unscored_completions_out() -> None:
    rewards = torch.tensor([0.0, NAN, 2.0, NAN])
    expected = torch.tensor([-1.0, 0.0, 1.0, 0.0]) / math.sqrt(2)
    torch.testing.assert_close(group_advantages(rewards, group_size=4, eps=0.0), expected)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_group_advantages_is_0_where_one_or_none_was_scored(baseline: str, scale: str) -> None:
    rewards = torch.tensor([3.0, NAN, NAN, NAN, 0.0, 1.0])
    result = group_advantages(rewards, group_size=2, baseline=baseline, scale=scale)
    assert result[:4].tolist() == [0.0] * 4
    assert result[5] > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_is_exactly_0_in_a_group_of_equal_rewards(scale: str) -> None:
    # 0.1 is no binary fraction: a mean in float32 misses it, and TRL divides the miss by 1e-4.
    rewards = torch.tensor([0.1] * 7 + [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    result = group_advantages(rewards, group_size=7, scale=scale)
    assert result[:7].tolist() == [0.0] * 7
    assert result[7:].abs().min() > 0


@given(rewards_lists, st.floats(-5, 5, width=32))
def test_group_advantages_do_not_change_when_a_constant_is_added(
    rows: list[list[float]], shift: float
) -> None:
    rewards = torch.tensor(rows, dtype=torch.float64).flatten()
    shifted = rewards + shift
    before = group_advantages(rewards, group_size=4, scale="none")
    after = group_advantages(shifted, group_size=4, scale="none")
    torch.testing.assert_close(before, after, atol=1e-9, rtol=0)


@given(rewards_lists)
def test_group_advantages_sum_to_0_in_each_group(rows: list[list[float]]) -> None:
    result = group_advantages(torch.tensor(rows, dtype=torch.float64).flatten(), group_size=4)
    assert result.view(-1, 4).sum(dim=1).abs().max() < 1e-6
    assert not result.isnan().any()


@given(rewards_lists)
def test_group_advantages_equal_a_slow_reference(rows: list[list[float]]) -> None:
    rewards = torch.tensor(rows, dtype=torch.float64)
    result = group_advantages(rewards.flatten(), group_size=4).tolist()
    assert result == pytest.approx([a for row in rewards.tolist() for a in _slow(row)], abs=1e-6)


def _slow(row: list[float]) -> list[float]:
    scored = [r for r in row if not math.isnan(r)]
    if len(scored) < 2 or len(set(scored)) == 1:
        return [0.0] * len(row)
    mean, deviation = statistics.fmean(scored), statistics.stdev(scored)
    return [0.0 if math.isnan(r) else (r - mean) / (deviation + 1e-4) for r in row]


def test_group_advantages_keeps_dtype() -> None:
    assert group_advantages(torch.zeros(4, dtype=torch.bfloat16), group_size=2).dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 1}, "at least 2 completions"),
        ({"group_size": 3}, "4 completions do not divide into groups of `group_size`=3"),
        ({"group_size": 2, "scale": "std"}, "`scale` is 'std'; use one of group, batch, none"),
        ({"group_size": 2, "baseline": "median"}, "`baseline` is 'median'; use one of mean"),
        ({"group_size": 2, "eps": -1.0}, "`eps` is -1.0"),
        ({"group_size": 2, "clip": 0.0}, "`clip` is 0.0; use a positive number"),
    ],
)
def test_group_advantages_refuses_when_out_of_range(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(4), **arguments)


def test_group_advantages_refuses_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 2\)"):
        group_advantages(torch.zeros(4, 2), group_size=2)


def test_group_advantages_are_clipped_after_normalization() -> None:
    # Mean 2, deviations -2 and 6, std 4: three times -0.5, and 1.5.
    rewards = torch.tensor([0.0, 0.0, 0.0, 8.0])
    result = group_advantages(rewards, group_size=4, eps=0.0, clip=1.0)
    assert result.tolist() == [-0.5, -0.5, -0.5, 1.0]


# Several rewards ------------------------------------------------------------------------------


def test_weighted_reward_sums_what_applies() -> None:
    rewards = torch.tensor([[1.0, 2.0], [NAN, 2.0], [NAN, NAN]])
    result = weighted_reward(rewards, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(
        result, torch.tensor([2.0, 1.0, NAN], dtype=torch.float64), equal_nan=True
    )


def test_weighted_reward_refuses_a_wrong_number_of_weights() -> None:
    with pytest.raises(ValueError, match="3 weights for 2 reward functions"):
        weighted_reward(torch.zeros(2, 2), torch.ones(3))


def test_normalize_then_sum_gives_a_small_reward_the_same_say() -> None:
    # Each column is +-1/sqrt(2) within its group whatever its size, so the sums are 0 twice.
    rewards = torch.tensor([[100.0, 0.0], [0.0, 0.01]])
    result = multi_reward_advantages(
        rewards, group_size=2, aggregation="normalize_then_sum", eps=0.0
    )
    assert result.abs().max() < 1e-6
    summed = multi_reward_advantages(rewards, group_size=2, eps=0.0)
    torch.testing.assert_close(summed, torch.tensor([1.0, -1.0]) / math.sqrt(2))


def test_normalize_then_sum_is_exactly_0_where_every_reward_is_equal() -> None:
    rewards = torch.tensor([[0.1, 0.3]] * 3 + [[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    result = multi_reward_advantages(rewards, group_size=3, aggregation="normalize_then_sum")
    assert result[:3].tolist() == [0.0] * 3
    assert result[3:].abs().max() > 0.5


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_multi_reward_advantages_equal_trl(aggregation: str, scale: str) -> None:
    generator = torch.Generator().manual_seed(3)
    rewards = torch.rand(24, 3, generator=generator)
    rewards[torch.rand(24, 3, generator=generator) < 0.15] = NAN
    rewards[5] = NAN  # nobody could score it
    rewards[6, 1] = NAN
    rewards[8:15] = NAN  # one alone is left of the group
    weights = torch.tensor([1.0, 0.5, 2.0])
    ours = multi_reward_advantages(
        rewards, group_size=8, weights_R=weights, aggregation=aggregation, scale=scale
    )
    torch.testing.assert_close(
        ours, _trl(rewards, weights, 8, aggregation, scale), atol=1e-6, rtol=0
    )


def _trl(
    rewards: torch.Tensor, weights: torch.Tensor, group_size: int, aggregation: str, scale: str
) -> torch.Tensor:
    """What trl 1.16.0 computes, in its order; test_trainer.py compares with TRL itself."""
    unscored = rewards.isnan().all(dim=1)
    if aggregation == "sum_then_normalize":
        summed = (rewards * weights).nansum(dim=1)
        summed[unscored] = NAN
        grouped = summed.view(-1, group_size)
        centred = summed - grouped.nanmean(dim=1).repeat_interleave(group_size)
        deviation = {
            "group": nanstd(grouped, dim=1).repeat_interleave(group_size),
            "batch": nanstd(summed),
            "none": None,
        }[scale]
        return (centred if deviation is None else centred / (deviation + 1e-4)).nan_to_num(0.0)
    grouped = rewards.view(-1, group_size, rewards.shape[1])
    deviation = nanstd(grouped, dim=1, keepdim=True)
    normalized = (grouped - grouped.nanmean(dim=1, keepdim=True)) / (deviation + 1e-4)
    summed = (normalized.view(rewards.shape) * weights).nansum(dim=1)
    summed[unscored] = NAN
    return ((summed - summed.nanmean()) / (nanstd(summed) + 1e-4)).nan_to_num(0.0)


def test_multi_reward_advantages_refuses_an_unknown_aggregation() -> None:
    with pytest.raises(ValueError, match="use one of sum_then_normalize, normalize_then_sum"):
        multi_reward_advantages(torch.zeros(4, 1), group_size=2, aggregation="mean")


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_multi_reward_advantages_are_clipped(aggregation: str) -> None:
    rewards = torch.tensor([[0.0], [0.0], [0.0], [8.0]])
    free, clipped = (
        multi_reward_advantages(rewards, group_size=4, aggregation=aggregation, clip=clip)
        for clip in (None, 1.0)
    )
    assert free.max() == pytest.approx(1.5, abs=1e-3)
    assert clipped.tolist() == [*free[:3].tolist(), 1.0]


# Groups that teach something ------------------------------------------------------------------

INFORMATIVE = [
    # rewards of a group of three, weights, under sum_then_normalize, under normalize_then_sum
    ([[0.0, 1.0]] * 3, [1.0, 1.0], False, False),
    ([[0.1, 1.0], [0.1, 1.0], [0.1, 0.0]], [1.0, 1.0], True, True),
    ([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], [1.0, 1.0], False, True),  # the sum is 1 throughout
    ([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]], [1.0, 0.0], False, False),  # of no weight
    ([[0.0, NAN], [NAN, NAN], [NAN, NAN]], [1.0, 1.0], False, False),  # one alone is scored
    ([[0.0, NAN], [1.0, NAN], [NAN, NAN]], [1.0, 1.0], True, True),
    ([[0.5, NAN], [NAN, 1.0], [NAN, NAN]], [2.0, 1.0], False, False),
    ([[0.5, NAN], [NAN, 3.0], [NAN, NAN]], [2.0, 1.0], True, False),  # sums 1 and 3
    ([[NAN, NAN]] * 3, [1.0, 1.0], False, False),
]


@pytest.mark.parametrize(("rewards", "weights", "summed", "normalized"), INFORMATIVE)
def test_informative_groups_are_those_whose_rewards_differ(
    rewards: list[list[float]], weights: list[float], summed: bool, normalized: bool
) -> None:
    others = [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    for aggregation, expected in (
        ("sum_then_normalize", summed),
        ("normalize_then_sum", normalized),
    ):
        found = informative_groups(
            torch.tensor(others + rewards),
            group_size=3,
            weights_R=torch.tensor(weights),
            aggregation=aggregation,
        )
        assert found.tolist() == [True, expected]


@given(rewards_lists)
def test_informative_groups_are_those_with_an_advantage(rows: list[list[float]]) -> None:
    rewards = torch.tensor(rows, dtype=torch.float64).reshape(-1, 1)
    advantages = multi_reward_advantages(rewards, group_size=4, scale="none").view(-1, 4)
    found = informative_groups(rewards, group_size=4)
    assert found.tolist() == (advantages != 0).any(dim=1).tolist()


def test_informative_groups_refuses_what_is_out_of_range() -> None:
    with pytest.raises(ValueError, match="use one of sum_then_normalize, normalize_then_sum"):
        informative_groups(torch.zeros(4, 1), group_size=2, aggregation="mean")
    with pytest.raises(ValueError, match="do not divide into groups"):
        informative_groups(torch.zeros(4, 1), group_size=3)
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        with pytest.raises(ValueError, match="3 weights for 1 reward functions"):
            informative_groups(
                torch.zeros(4, 1), group_size=2, weights_R=torch.ones(3), aggregation=aggregation
            )


# Steps --------------------------------------------------------------------------------------------

step_rows = st.lists(
    st.lists(st.floats(-3, 3, width=32) | st.just(NAN), min_size=5, max_size=5),
    min_size=2,
    max_size=6,
).filter(lambda rows: len(rows) % 2 == 0)


def test_step_advantages_by_hand() -> None:
    # Rewards 1, 0 and 2: mean 1, sample deviation 1. Completion 0: 0 at its first step, -1 at its
    # second; its first step also earns what follows.
    rewards = torch.tensor([[NAN, 1.0, NAN, 0.0, NAN], [NAN, NAN, 2.0, NAN, NAN]])
    expected = torch.tensor([[-1.0, -1.0, -1.0, -1.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(step_advantages(rewards, group_size=2, eps=0.0), expected)


def test_step_advantages_divides_by_the_deviation_of_the_batch() -> None:
    # Steps 1, 0, 2 and 4, 4: means 1 and 4; all five: mean 2.2,
    # squares 1.44 + 4.84 + 0.04 + 3.24 + 3.24 = 12.8, over 4 = 3.2.
    rewards = torch.tensor([[1.0, 0.0], [NAN, 2.0], [4.0, NAN], [NAN, 4.0]])
    expected = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]) / math.sqrt(3.2)
    result = step_advantages(rewards, group_size=2, scale="batch", eps=0.0)
    torch.testing.assert_close(result, expected)


def test_step_advantages_of_what_was_not_scored_are_zero() -> None:
    rewards = torch.tensor([[NAN, NAN], [NAN, 7.0], [1.0, NAN], [3.0, NAN], [NAN, NAN], [NAN, NAN]])
    result = step_advantages(rewards, group_size=2, scale="none")
    assert result.tolist() == [[0, 0], [0, 0], [-1, 0], [1, 0], [0, 0], [0, 0]]


def test_step_advantages_of_one_step_each_are_those_of_the_outcome() -> None:
    rewards = torch.tensor([0.3, 0.9, 0.1, 0.5])
    steps = torch.full((4, 3), NAN)
    steps[:, 2] = rewards
    expected = group_advantages(rewards, group_size=2)[:, None].expand(4, 3)
    torch.testing.assert_close(step_advantages(steps, group_size=2), expected)


@given(step_rows)
def test_step_advantages_equal_a_loop_over_steps(rows: list[list[float]]) -> None:
    result = step_advantages(torch.tensor(rows, dtype=torch.float64), group_size=2, eps=0.1)
    for first in range(0, len(rows), 2):
        pair = rows[first : first + 2]
        scores = [score for row in pair for score in row if score == score]
        spread = len(set(scores)) > 1
        mean = statistics.fmean(scores) if scores else 0.0
        deviation = statistics.stdev(scores) if spread else 1.0
        for offset, row in enumerate(pair):
            for token in range(len(row)):
                following = [score for score in row[token:] if score == score]
                expected = sum((score - mean) / (deviation + 0.1) for score in following)
                found = result[first + offset, token].item()
                assert math.isclose(found, expected * spread, rel_tol=1e-6, abs_tol=1e-6)


def test_step_advantages_against_their_position_by_hand() -> None:
    # First steps 0.5 and 0.5, second ones 4 and 0: they are 0, 0, 2 and -2 above their means. The
    # deviation of these four is sqrt(8 / 3). The third step stands alone at its place: 0.
    rewards = torch.tensor([[0.5, NAN, 4.0, 9.0], [NAN, 0.5, NAN, 0.0]])
    result = step_advantages(rewards, group_size=2, baseline="position", scale="none")
    assert result.tolist() == [[2, 2, 2, 0], [-2, -2, -2, -2]]
    scaled = step_advantages(rewards, group_size=2, baseline="position", eps=0.0)
    # five steps with the third one's 0: sqrt(8 / 4)
    torch.testing.assert_close(scaled, result / math.sqrt(2))


def test_only_position_leaves_equal_completions_alone_where_later_steps_score_less() -> None:
    right, wrong = [NAN, 0.9, NAN, 0.7], [NAN, 0.9, NAN, 0.3]
    rewards = torch.tensor([right, right, right, wrong])
    by_group = step_advantages(rewards, group_size=4)
    by_position = step_advantages(rewards, group_size=4, baseline="position")
    assert (by_group[:3, 3] < 0).all()
    assert (by_position[:3] > 0).all()
    assert (by_position[3] < 0).all()
    same = step_advantages(rewards[:2], group_size=2, baseline="position")
    assert not same.any()
    assert not informative_step_groups(rewards[:2], group_size=2, baseline="position")
    assert informative_step_groups(rewards[:2], group_size=2)


@given(step_rows)
def test_step_advantages_against_their_position_equal_a_loop(rows: list[list[float]]) -> None:
    tensor = torch.tensor(rows, dtype=torch.float64)
    result = step_advantages(tensor, group_size=2, baseline="position", scale="none")
    for first in range(0, len(rows), 2):
        steps = [[s for s in row if s == s] for row in rows[first : first + 2]]
        means = [
            statistics.fmean(row[k] for row in steps if k < len(row))
            for k in range(max(map(len, steps)))
        ]
        num_steps = sum(map(len, steps))
        for offset, row in enumerate(rows[first : first + 2]):
            own = [score - mean for score, mean in zip(steps[offset], means, strict=False)]
            for token in range(len(row)):
                num_before = sum(s == s for s in row[:token])
                expected = sum(own[num_before:]) if num_steps > 1 else 0.0
                assert math.isclose(result[first + offset, token], expected, abs_tol=1e-9)


def test_groups_with_steps_that_differ_are_informative() -> None:
    rewards = torch.tensor([[NAN, 1.0], [1.0, 1.0], [0.0, 1.0], [NAN, NAN], [1.0, NAN], [NAN, NAN]])
    assert informative_step_groups(rewards, group_size=2).tolist() == [False, True, False]


@pytest.mark.parametrize(("shape", "size"), [((4,), 2), ((3, 2), 2), ((4, 2), 1)])
def test_step_advantages_refuses_shapes(shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(ValueError, match=r"shape|groups|group_size"):
        step_advantages(torch.zeros(shape), group_size=size)


def test_step_advantages_refuses_an_unknown_baseline() -> None:
    with pytest.raises(ValueError, match="`baseline` is 'row'; use one of group, position"):
        step_advantages(torch.zeros(2, 2), group_size=2, baseline="row")  # type: ignore[arg-type]
