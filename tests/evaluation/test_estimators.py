"""pass@k and majority votes against a list of all subsets; the interval against its theory."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_grpo_ext.evaluation.estimators import bootstrap_interval, majority_at_k, pass_at_k


def subsets_with_a_right_one(is_correct: list[bool], k: int) -> float:
    subsets = list(itertools.combinations(is_correct, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def vote(answers: list[object], is_correct: list[bool], k: int) -> float:
    """Slow reference: every subset votes."""
    total, subsets = 0.0, list(itertools.combinations(range(len(answers)), k))
    for subset in subsets:
        votes = Counter(answers[i] for i in subset if answers[i] is not None)
        winners = [a for a, count in votes.items() if count == max(votes.values())]
        for winner in winners:
            judged = [right for a, right in zip(answers, is_correct, strict=True) if a == winner]
            total += sum(judged) / len(judged) / len(winners)
    return total / len(subsets)


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_completion(
    is_correct: list[bool], k: int
) -> None:
    found = pass_at_k(torch.tensor([sum(is_correct)]), torch.tensor([len(is_correct)]), k=k)
    if k > len(is_correct):
        assert found.isnan().all()
    else:
        assert found.item() == pytest.approx(subsets_with_a_right_one(is_correct, k), abs=1e-12)


def test_pass_at_k_of_several_prompts_worked_out_by_hand() -> None:
    found = pass_at_k(torch.tensor([0, 1, 2, 2]), torch.tensor([4, 4, 4, 2]), k=2)
    # 1 - C(3,2)/C(4,2) = 1/2; 1 - C(2,2)/C(4,2) = 5/6
    assert found.tolist() == pytest.approx([0.0, 1 / 2, 5 / 6, 1.0])


def test_pass_at_1_is_the_share_of_right_completions() -> None:
    found = pass_at_k(torch.tensor([0, 3, 8]), torch.tensor([8, 8, 8]), k=1)
    assert found.tolist() == pytest.approx([0, 3 / 8, 1])


def test_pass_at_k_stays_exact_where_binomials_overflow_a_float() -> None:
    found = pass_at_k(torch.tensor([1]), torch.tensor([4000]), k=1000)
    assert found.item() == pytest.approx(0.25, abs=1e-12)  # k / n, with one right completion


def test_pass_at_k_of_no_prompts_is_empty() -> None:
    empty = torch.zeros(0, dtype=torch.long)
    assert pass_at_k(empty, empty, k=2).shape == (0,)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([None, 1, 2, 3]), st.booleans()), min_size=1, max_size=7),
    st.integers(1, 7),
)
def test_majority_at_k_is_the_mean_over_all_subsets(
    completions: list[tuple[object, bool]], k: int
) -> None:
    answers, is_correct = [a for a, _ in completions], [right for _, right in completions]
    found = majority_at_k(answers, is_correct, k=k)
    if k > len(answers):
        assert math.isnan(found)
    else:
        assert found == pytest.approx(vote(answers, is_correct, k), abs=1e-12)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        ([7, 7, 8, 9], 7, 1.0),
        ([7, 7, 8, 9], 8, 0.0),
        ([7, 7, 8, 8], 8, 0.5),  # a tie: either, with the same chance
        ([7, None, None, None], 7, 1.0),  # no answer, no vote
        ([None, None, None, None], 7, 0.0),
    ],
)
def test_majority_of_all_completions(answers: list[object], correct: int, expected: float) -> None:
    is_correct = [answer == correct for answer in answers]
    assert majority_at_k(answers, is_correct, k=4) == pytest.approx(expected)


def test_majority_counts_an_answer_that_was_judged_both_ways_as_often_as_it_was_right() -> None:
    assert majority_at_k([7, 7, 7, 8], [True, True, False, False], k=4) == pytest.approx(2 / 3)


def test_bootstrap_interval_is_that_of_the_normal_distribution_for_many_prompts() -> None:
    values = torch.tensor([0.0, 1.0]).repeat(500)
    low, high = bootstrap_interval(values, num_resamples=4000)
    deviation = 0.5 / math.sqrt(1000)  # of the mean of 1000 coins
    assert low == pytest.approx(0.5 - 1.96 * deviation, abs=0.1 * deviation)
    assert high == pytest.approx(0.5 + 1.96 * deviation, abs=0.1 * deviation)


def test_bootstrap_interval_of_a_lower_confidence_is_narrower() -> None:
    values = torch.arange(20.0)
    wide, narrow = bootstrap_interval(values), bootstrap_interval(values, confidence=0.5)
    assert wide[0] < narrow[0] < 9.5 < narrow[1] < wide[1]


def test_bootstrap_interval_is_the_same_for_the_same_seed_and_leaves_nan_out() -> None:
    values = torch.rand(9, generator=torch.Generator().manual_seed(1))
    with_nan = torch.cat([values[:4], torch.tensor([torch.nan]), values[4:]])
    state = torch.get_rng_state()
    assert bootstrap_interval(values) == bootstrap_interval(with_nan)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_bootstrap_interval_draws_the_same_where_it_draws_in_parts() -> None:
    values = torch.rand(5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = torch.randint(5000, (1000, 5000), generator=torch.Generator().manual_seed(0))
    means = values[drawn].mean(dim=1).sort().values
    low, high = bootstrap_interval(values, num_resamples=1000)  # 5 million draws, 4 at a time
    assert means[24] <= low <= means[25]
    assert means[974] <= high <= means[975]


def test_bootstrap_interval_of_nothing_is_nan() -> None:
    low, high = bootstrap_interval(torch.tensor([torch.nan]))
    assert math.isnan(low)
    assert math.isnan(high)
