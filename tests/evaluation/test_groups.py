"""Groups from the rows of several processes, and the answers in completions."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
import torch

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.evaluation.collect import EvalPass
from trl_grpo_ext.evaluation.groups import EvalGroups, EvalRow, build_groups, find_answers
from trl_grpo_ext.rewards import FormatReward, LastNumberReward, NumberDistanceReward

NAN = float("nan")


def row(place: int, *, example: dict[str, Any] | None = None, score: float = 1.0) -> EvalRow:
    return EvalRow(
        place=place,
        example=example,
        completion=f"c{place}",
        scores=[score, 2.0],
        answers=[place % 2, None],
        num_tokens=10 + place,
        is_truncated=place == 1,
    )


def build(rows: list[EvalRow], **changes: Any) -> EvalGroups:
    arguments = {
        "group_size": 2,
        "num_prompts": 2,
        "reward_names": ["a", "b"],
        "weights": [1.0, 0.5],
        "have_answers": [True, False],
    }
    return build_groups(rows, **arguments | changes)


def test_build_groups_orders_the_rows_and_leaves_out_what_filled_up_the_last_batch() -> None:
    first, second = {"prompt": "p", "task": "x"}, {"prompt": "q", "task": "y"}
    rows = [row(2, example=second), row(3, score=NAN), row(4, example=first), row(5)]
    groups = build([*rows, row(0, example=first), row(1)])
    assert groups.prompts == ["p", "q"]
    assert groups.completions == [["c0", "c1"], ["c2", "c3"]]
    assert groups.columns == {"task": ["x", "y"]}
    assert groups.answers == {"a": [[0, 1], [0, 1]]}
    assert groups.lengths_PG.tolist() == [[10, 11], [12, 13]]
    assert groups.truncated_PG.tolist() == [[False, True], [False, False]]
    torch.testing.assert_close(
        groups.rewards["a"], torch.tensor([[1.0, 1.0], [1.0, NAN]]), equal_nan=True
    )
    assert groups.reward_PG.tolist() == [[2.0, 2.0], [2.0, 1.0]]  # a + b / 2; without a where NaN
    assert (groups.num_prompts, groups.group_size) == (2, 2)
    assert groups.examples == [first, second]


def test_build_groups_has_no_reward_where_no_function_gave_one() -> None:
    nothing = EvalRow(
        place=0,
        example={"prompt": "p"},
        completion="",
        scores=[NAN],
        answers=[None],
        num_tokens=1,
        is_truncated=False,
    )
    groups = build_groups(
        [nothing],
        group_size=1,
        num_prompts=1,
        reward_names=["a"],
        weights=[1.0],
        have_answers=[False],
    )
    assert groups.reward_PG.isnan().all()


def test_build_groups_leaves_out_a_prompt_that_lacks_completions() -> None:
    groups = build([row(0, example={"prompt": "p"}), row(1), row(2, example={"prompt": "q"})])
    assert groups.prompts == ["p"]


def test_build_groups_of_nothing_has_no_prompt() -> None:
    groups = build([], num_prompts=0)
    assert (groups.num_prompts, groups.group_size) == (0, 2)


def test_select_keeps_every_field_together() -> None:
    rows = [
        row(0, example={"prompt": "p", "t": 1}),
        row(1),
        row(2, example={"prompt": "q", "t": 2}),
    ]
    groups = build([*rows, row(3)]).select([1])
    assert groups.prompts == ["q"]
    assert groups.completions == [["c2", "c3"]]
    assert groups.columns == {"t": [2]}
    assert groups.answers == {"a": [[0, 1]]}
    assert groups.lengths_PG.tolist() == [[12, 13]]
    assert groups.rewards_BR.tolist() == [[1.0, 2.0], [1.0, 2.0]]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_places_do_not_depend_on_the_number_of_processes(num_processes: int) -> None:
    """Batches of all processes stand one after the other: 3 batches of 6 for 5 prompts of 3."""
    places: list[int] = []
    for rank in range(num_processes):
        collected = EvalPass(
            num_prompts=5, group_size=3, process_index=rank, num_processes=num_processes
        )
        share = 6 // num_processes
        for _ in range(3):
            collected.begin_batch(share)
            collected.set_lengths([1] * share, [False] * share)
            counted = collected.counts
            collected.add_scored(
                [{"prompt": "p"}] * share, [""] * share, [[0.0]] * share, [[None]] * share
            )
            kept = [r.place for r in collected.rows[-share:]]
            assert counted == [place < 15 for place in kept]
        assert collected.num_completions == 15
        places += [r.place for r in collected.rows]
        assert all((r.example is not None) == (r.place % 3 == 0) for r in collected.rows)
    assert sorted(places) == list(range(18))


def test_answers_of_number_rewards_are_the_number_that_they_compare() -> None:
    replies = ["it is 7.0", [{"role": "assistant", "content": "so 7"}], "none"]
    for reward in (LastNumberReward(), NumberDistanceReward(span=2)):
        found = find_answers(reward, "number", replies)
        assert found == [Decimal(7), Decimal(7), None]
        assert len({*found[:2]}) == 1  # equal answers are one, whatever they look like


def test_a_reward_without_answers_has_none() -> None:
    assert find_answers(FormatReward(pattern="x"), "format", ["x", "y"]) == [None, None]


def test_an_answer_that_cannot_be_counted_is_refused() -> None:
    def reward(**_: object) -> list[float]:
        return []

    reward.answer = lambda text: [text]  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match="'mine' returned a list, which is not hashable"):
        find_answers(reward, "mine", ["x"])
