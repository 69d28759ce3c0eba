"""Gates and limits by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trl_grpo_ext.rewards.combine import (
    combination_problems,
    counting_rewards,
    counting_steps,
    shut_gates,
    unknown_reward_problems,
)

NAN = math.nan
NAMES = ["model", "format", "length"]


def test_counting_rewards_without_gates_and_limits_are_the_rewards() -> None:
    rewards = torch.tensor([[1.0, NAN, 3.0]])
    assert counting_rewards(rewards, names=NAMES, gates={}, limits={}) is rewards


def test_a_shut_gate_takes_what_others_give_and_leaves_what_they_take() -> None:
    rewards = torch.tensor([[2.0, 0.5, -1.0], [2.0, 0.4, -1.0], [NAN, 0.4, 1.0]])
    expected = torch.tensor([[2.0, 0.5, -1.0], [0.0, 0.4, -1.0], [NAN, 0.4, 0.0]])
    found = counting_rewards(rewards, names=NAMES, gates={"format": 0.5}, limits={})
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_gate_without_a_score_is_open() -> None:
    rewards = torch.tensor([[2.0, NAN, 1.0]])
    assert shut_gates(rewards, names=NAMES, gates={"format": 1.0}).tolist() == [False]


def test_each_of_several_gates_can_shut() -> None:
    rewards = torch.tensor([[2.0, 1.0, 1.0], [2.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
    gates = {"format": 1.0, "length": 1.0}
    assert shut_gates(rewards, names=NAMES, gates=gates).tolist() == [False, True, True]
    found = counting_rewards(rewards, names=NAMES, gates=gates, limits={})
    assert found.tolist() == [[2.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]


def test_limits_cut_and_gates_are_judged_before_them() -> None:
    rewards = torch.tensor([[9.0, 0.9, -9.0], [1.0, 5.0, NAN]])
    found = counting_rewards(
        rewards, names=NAMES, gates={"format": 0.8}, limits={"format": (0, 0.5), "model": (-3, 3)}
    )
    expected = torch.tensor([[3.0, 0.5, -9.0], [1.0, 0.5, NAN]])
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_steps_are_cut_and_gated_as_the_reward_that_gave_them() -> None:
    steps = torch.tensor([[NAN, 0.9, 0.2], [0.9, NAN, -0.5]])
    rewards = torch.tensor([[0.2, 1.0, 0.0], [0.9, 0.0, 0.0]])

    def cut(**options: Any) -> torch.Tensor:
        chosen = {"gates": {}, "limits": {}} | options
        return counting_steps(steps, rewards, name="model", names=NAMES, **chosen)

    gated = cut(gates={"format": 1.0})
    expected = torch.tensor([[NAN, 0.9, 0.2], [0.0, NAN, -0.5]])
    torch.testing.assert_close(gated, expected, equal_nan=True)
    limited = cut(limits={"model": (0, 0.5), "length": (0, 0.1)})
    expected = torch.tensor([[NAN, 0.5, 0.2], [0.5, NAN, 0.0]])
    torch.testing.assert_close(limited, expected, equal_nan=True)
    itself = cut(gates={"model": 0.5})
    torch.testing.assert_close(itself, steps, equal_nan=True)


@pytest.mark.parametrize(
    ("gates", "limits", "words"),
    [
        ({"format": "one"}, None, "`reward_gates` has 'one' for 'format'"),
        ({"format": NAN}, None, "no finite number"),
        ({"format": True}, None, "no finite number"),
        (None, {"model": 3}, "`reward_clip` has 3 for 'model'"),
        (None, {"model": [3, -3]}, "no range"),
        (None, {"model": [-3, 0, 3]}, "no range"),
        (None, {"model": [-math.inf, 3]}, "no range"),
        ("format", None, "`reward_gates` is 'format', which is no mapping"),
        (None, ["model"], "`reward_clip` is ['model'], which is no mapping"),
    ],
)
def test_combination_problems(gates: object, limits: object, words: str) -> None:
    [problem] = combination_problems(gates, limits)
    assert words in problem


def test_what_can_work_has_no_problems() -> None:
    assert not list(combination_problems({"format": 1}, {"model": [-3, 3.5]}))
    assert not list(unknown_reward_problems({"format": 1}, None, names=NAMES))


def test_unknown_rewards_are_named() -> None:
    problems = list(unknown_reward_problems({"fromat": 1}, {"modell": [0, 1]}, names=NAMES))
    assert "`reward_gates` names 'fromat'" in problems[0]
    assert "`reward_clip` names 'modell'" in problems[1]
    assert "are model, format, length" in problems[0]
