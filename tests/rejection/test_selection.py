"""From candidates to those that are kept: hand-worked, and each candidate counted once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rejection.made import candidate, group

from trl_grpo_ext.rejection import REASONS, Candidate, Rules, Selection, select
from trl_grpo_ext.rejection.selection import KEPT, best_of, without_near_duplicates

WEIGHTS = {"math": 1.0, "style": 0.5}


def selection(**changes: Any) -> Selection:
    return Selection(**{"weights": WEIGHTS, "ngram_size": 1} | changes)


def scored(index: int, text: str, style: float = 0.0, **changes: Any) -> Candidate:
    return candidate(index, text, scores={"math": 1.0, "style": style}, **changes)


def indices(candidates: list[Candidate]) -> list[int]:
    return [one.index for one in candidates]


def test_select_says_of_each_candidate_what_became_of_it() -> None:
    asked = group(
        candidate(0, "wrong", scores={"math": 0.0, "style": 1.0}),
        scored(1, "a b c"),
        scored(2, "A, b, c!", style=1.0),  # says what 1 says, and is better
        scored(3, "d e f g"),
        scored(4, "h i j k l"),
        scored(5, "cut", finished=False),
        candidate(6, "lost", scores={"math": None, "style": None}),
        scored(7, "m n o p q r"),
    )
    # 6 of the 7 judged ones are right: ceil(3 * 1 / 7) = 1 may be kept.
    found = select(asked, rules=Rules(), selection=selection(best_n=3))
    assert found.pass_rate == 6 / 7
    assert indices(list(found.kept)) == [2]
    assert found.reasons == {
        0: "wrong",
        1: "near-duplicate",
        2: "kept",
        3: "balance",
        4: "balance",
        5: "cut off",
        6: "unscored",
        7: "not among the best",
    }


def test_pass_rate_counts_right_replies_that_are_not_clean() -> None:
    asked = group(
        scored(0, "a", finished=False),
        scored(1, "b"),
        candidate(2, "c", scores={"math": 0.0, "style": 0.0}),
    )
    found = select(asked, rules=Rules(), selection=selection())
    assert found.pass_rate == 2 / 3
    assert indices(list(found.kept)) == [1]


def test_best_is_the_highest_weighted_reward_then_the_shortest() -> None:
    candidates = [
        scored(0, "a", style=0.2, num_tokens=9),
        scored(1, "b", style=0.4, num_tokens=99),
        scored(2, "c", style=0.2, num_tokens=5),
        scored(3, "d", style=0.2, num_tokens=5),
    ]
    assert indices(best_of(candidates, selection=selection(best_n=3))) == [1, 2, 3]


def test_rewards_that_differ_by_rounding_are_equal() -> None:
    candidates = [
        candidate(0, "a", scores={"math": 1.0, "style": 0.2 + 1e-9}, num_tokens=9),
        candidate(1, "b", scores={"math": 1.0, "style": 0.2}, num_tokens=5),
    ]
    assert indices(best_of(candidates, selection=selection(best_n=1))) == [1]


def test_diversity_takes_what_is_least_like_those_already_taken() -> None:
    candidates = [
        scored(0, "a b"),  # the shortest comes first
        scored(1, "a b c"),  # 2/3 like 0
        scored(2, "a b d e f"),  # 2/5 like 0
        scored(3, "x y z a"),  # 1/5 like 0, and nearer to nothing
    ]
    assert indices(best_of(candidates, selection=selection(prefer="diversity"))) == [0, 3, 2, 1]
    # A higher reward still comes first, however similar.
    better = [*candidates, scored(4, "a b c d", style=1.0)]
    found = best_of(better, selection=selection(prefer="diversity", best_n=2))
    assert indices(found) == [4, 3]  # 3 is 1/7 like it


def test_diversity_minds_all_that_are_taken_and_not_the_last_one_alone() -> None:
    candidates = [
        scored(0, "a b"),
        scored(1, "a b c"),  # 2/3 like 0, nothing like 3
        scored(2, "x a q r s"),  # 1/6 like 0, 1/7 like 3
        scored(3, "x y z"),
    ]
    found = best_of(candidates, selection=selection(prefer="diversity"))
    assert indices(found) == [0, 3, 2, 1]


def test_near_duplicates_leave_the_one_with_the_highest_reward() -> None:
    candidates = [scored(0, "a b"), scored(1, "a, b", style=1.0), scored(2, "A b")]
    assert indices(without_near_duplicates(candidates, selection=selection())) == [1]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, [0]),
        ({"max_pass_rate": 0.5}, [0]),
        ({"max_pass_rate": 0.49}, []),
        ({"min_pass_rate": 0.5}, [0]),
        ({"min_pass_rate": 0.51}, []),
    ],
)
def test_prompts_outside_of_the_pass_rates_fall(changes: dict[str, float], kept: list[int]) -> None:
    wrong = candidate(1, "b", scores={"math": 0.0, "style": 0.0})
    found = select(group(scored(0, "a"), wrong), rules=Rules(), selection=selection(**changes))
    assert indices(list(found.kept)) == kept
    assert found.reasons[0] == (KEPT if kept else "balance")


def test_prompt_of_which_nothing_was_judged_has_no_pass_rate() -> None:
    lost = candidate(0, scores={"math": None, "style": None})
    found = select(group(lost), rules=Rules(), selection=selection())
    assert (found.pass_rate, found.kept, found.reasons) == (None, [], {0: "unscored"})


CANDIDATES = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.text("ab .", max_size=8),
            "num_tokens": st.integers(1, 9),
            "finished": st.booleans(),
            "scores": st.fixed_dictionaries(
                {
                    "math": st.sampled_from([None, 0.0, 0.5, 1.0]),
                    "style": st.sampled_from([None, 0.0, 1.0]),
                }
            ),
        }
    ),
    max_size=10,
)
SELECTIONS = st.fixed_dictionaries(
    {
        "best_n": st.integers(1, 5),
        "prefer": st.sampled_from(["brevity", "diversity"]),
        "balance": st.sampled_from(["prop2diff", "uniform"]),
        "max_similarity": st.floats(0.1, 1.2),
        "max_pass_rate": st.floats(0.0, 1.0),
    }
)


@given(CANDIDATES, SELECTIONS)
def test_select_counts_each_candidate_once_and_keeps_no_more_than_asked(
    rows: list[dict[str, Any]], asked: dict[str, Any]
) -> None:
    given_group = group(*[Candidate(index=at, **row) for at, row in enumerate(rows)])
    found = select(given_group, rules=Rules(), selection=selection(**asked))
    assert sorted(found.reasons) == list(range(len(rows)))
    assert set(found.reasons.values()) <= {KEPT, *REASONS}
    assert Counter(found.reasons.values())[KEPT] == len(found.kept) <= asked["best_n"]
    assert {one.index for one in found.kept} == {
        at for at, reason in found.reasons.items() if reason == KEPT
    }
    rewards = [one.reward(WEIGHTS) for one in found.kept]
    assert rewards == sorted(rewards, reverse=True)


@given(CANDIDATES, SELECTIONS, st.randoms(use_true_random=False))
def test_select_does_not_depend_on_the_order_of_the_candidates(
    rows: list[dict[str, Any]], asked: dict[str, Any], random: Any
) -> None:
    candidates = [Candidate(index=at, **row) for at, row in enumerate(rows)]
    shuffled = random.sample(candidates, len(candidates))
    one, other = (
        select(group(*order), rules=Rules(), selection=selection(**asked))
        for order in (candidates, shuffled)
    )
    assert one == other
