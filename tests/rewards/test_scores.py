"""What a reward function may return, and what is done with the rest."""

from __future__ import annotations

import asyncio
import functools
import math
from typing import Any

import numpy
import pytest
import torch

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.scores import checked_scores, checking, is_asynchronous


def test_checked_scores_takes_every_kind_of_number() -> None:
    values = [1, True, 0.5, numpy.float32(0.25), torch.tensor(2.0), None]
    scores, num_bad = checked_scores(values, name="mine", num_completions=6)
    assert scores == [1.0, 1.0, 0.5, 0.25, 2.0, None]
    assert num_bad == 0


@pytest.mark.parametrize("values", [torch.tensor([1.0, 2.0]), numpy.array([1.0, 2.0]), (1.0, 2.0)])
def test_checked_scores_takes_every_kind_of_sequence(values: object) -> None:
    assert checked_scores(values, name="mine", num_completions=2) == ([1.0, 2.0], 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_checked_scores_leaves_out_and_counts_what_is_not_finite(value: float) -> None:
    assert checked_scores([1.0, value], name="mine", num_completions=2) == ([1.0, None], 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "'mine' returned None (NoneType), not a list"),
        (0.5, "'mine' returned 0.5 (float), not a list"),
        (torch.tensor(0.5), "(Tensor), not a list"),
        ("0.5 0.5", "'mine' returned '0.5 0.5' (str), not a list"),
        ([1.0], "'mine' returned 1 rewards, but 2 were expected"),
        ([1.0, "0.5"], "'mine' returned '0.5' (str) for completion 1, which is not a number"),
        ([1.0, [0.5]], "(list) for completion 1"),
        ([1.0, torch.ones(2)], "(Tensor) for completion 1"),
        (["x" * 900, 1.0], "..."),
    ],
)
def test_checked_scores_refuses_what_is_no_score(values: object, message: str) -> None:
    with pytest.raises(RewardError) as caught:
        checked_scores(values, name="mine", num_completions=2)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


class Judge:
    async def __call__(self, *, completions: list[str], **_: Any) -> list[float]:
        return [math.nan for _ in completions]


async def judge(**kwargs: Any) -> list[float]:
    return await Judge()(**kwargs)


@pytest.mark.parametrize(
    "func", [judge, Judge(), functools.partial(judge, x=1), functools.partial(Judge(), x=1)]
)
def test_checking_keeps_an_asynchronous_reward_asynchronous(func: Any) -> None:
    assert is_asynchronous(func)
    counts: list[int] = []
    checked = checking(func, name="mine", count_non_finite=counts.append)
    assert asyncio.iscoroutinefunction(checked)
    scores = asyncio.run(checked(prompts=["a", "b"], completions=["c", "d"], log_metric=None))
    assert scores == [None, None]
    assert counts == [2]


def test_checking_passes_everything_on() -> None:
    seen: dict[str, Any] = {}

    def mine(**kwargs: Any) -> list[int]:
        seen.update(kwargs)
        return [1, 2]

    counts: list[int] = []
    checked = checking(mine, name="mine", count_non_finite=counts.append)
    assert checked(prompts=["a", "b"], completions=["c", "d"], answer=[3, 4]) == [1.0, 2.0]
    assert seen == {"prompts": ["a", "b"], "completions": ["c", "d"], "answer": [3, 4]}
    assert counts == [0]
