"""What a hand-written loop calls: rewards by hand, and the names that the module offers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trl_grpo_ext import functional
from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.functional import compute_rewards


def length(*, completions: list[str], **_: Any) -> list[int]:
    return [len(completion) for completion in completions]


def returning(values: Any) -> Callable[..., Any]:
    def fixed(**_: Any) -> Any:
        return values

    return fixed


def test_compute_rewards_has_a_row_a_completion_and_a_column_a_function() -> None:
    def starts_with_its_prompt(
        *, prompts: list[str], completions: list[str], **_: Any
    ) -> list[bool]:
        return [c.startswith(p) for p, c in zip(prompts, completions, strict=True)]

    rewards = compute_rewards(
        [length, starts_with_its_prompt], prompts=["a", "b", "b"], completions=["abc", "", "bb"]
    )
    assert rewards.tolist() == [[3.0, 1.0], [0.0, 0.0], [2.0, 1.0]]
    assert rewards.dtype == torch.float32
    assert rewards.is_contiguous()


def test_compute_rewards_takes_one_function_without_a_list() -> None:
    rewards = compute_rewards(length, prompts=["p", "p"], completions=["a", "bcd"])
    assert rewards.tolist() == [[1.0], [3.0]]


def test_compute_rewards_passes_every_column_by_its_name() -> None:
    def distance(
        *, completions: list[str], answers: list[int], scales: list[float], **_: Any
    ) -> list[float]:
        rows = zip(completions, answers, scales, strict=True)
        return [-abs(int(completion) - answer) * scale for completion, answer, scale in rows]

    rewards = compute_rewards(
        distance,
        prompts=["2+2=", "3+3="],
        completions=["5", "9"],
        answers=[4, 6],
        scales=[1.0, 0.5],
    )
    assert rewards.tolist() == [[-1.0], [-1.5]]


def test_compute_rewards_gives_nan_for_what_could_not_be_scored() -> None:
    values = [None, math.nan, math.inf, -math.inf, 0, torch.tensor(2.0)]
    rewards = compute_rewards([returning(values), length], prompts=[""] * 6, completions=["c"] * 6)
    assert rewards[:4, 0].isnan().all()
    assert rewards[4:, 0].tolist() == [0.0, 2.0]
    assert rewards[:, 1].tolist() == [1.0] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ["p"]}, "`prompts` has 1 values for 2 completions; give one each."),
        (
            {"prompts": ["p", "p"], "answers": [1, 2, 3]},
            "`answers` has 3 values for 2 completions; give one each.",
        ),
    ],
)
def test_compute_rewards_refuses_an_argument_of_another_length(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="values for 2 completions") as caught:
        compute_rewards(length, completions=["a", "b"], **arguments)
    assert str(caught.value) == message


def test_compute_rewards_refuses_an_empty_list_of_functions() -> None:
    with pytest.raises(ValueError, match="`reward_funcs` is empty; pass at least one"):
        compute_rewards([], prompts=["p"], completions=["a"])


class Judge:
    """A reward function that is an object has no ``__name__``."""

    def __call__(self, **_: Any) -> list[float]:
        return [1.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (returning([1.0]), "'fixed' returned 1 rewards, but 2 were expected"),
        (returning([1.0, "good"]), "'fixed' returned 'good' (str) for completion 1"),
        (returning(0.5), "'fixed' returned 0.5 (float), not a list"),
        (Judge(), "'Judge' returned 1 rewards, but 2 were expected"),
    ],
)
def test_compute_rewards_says_which_function_returned_something_else(
    function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(RewardError, match="The reward function") as caught:
        compute_rewards([length, function], prompts=["p", "p"], completions=["a", "b"])
    assert message in str(caught.value)


def test_functional_offers_the_names_of_a_training_loop() -> None:
    assert functional.__all__ == [
        "compute_rewards",
        "group_advantages",
        "group_sample",
        "grpo_loss",
        "multi_reward_advantages",
        "step_advantages",
        "token_logprobs",
    ]
    assert all(callable(getattr(functional, name)) for name in functional.__all__)
