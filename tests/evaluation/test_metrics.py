"""The metrics of two prompts, worked out by hand."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_grpo_ext.evaluation.groups import EvalGroups
from trl_grpo_ext.evaluation.metrics import MetricSettings, group_metrics, spread_metrics

NAN = float("nan")


def make(
    scores: list[list[float]],
    *,
    answers: list[list[Any]] | None = None,
    others: dict[str, Tensor] | None = None,
) -> EvalGroups:
    scores_PG = torch.tensor(scores)
    num_prompts, group_size = scores_PG.shape
    lengths = torch.arange(1, num_prompts * group_size + 1).view(num_prompts, group_size)
    return EvalGroups(
        prompts=[f"p{index}" for index in range(num_prompts)],
        completions=[["x"] * group_size] * num_prompts,
        rewards={"right": scores_PG, **(others or {})},
        reward_PG=scores_PG,
        answers={} if answers is None else {"right": answers},
        lengths_PG=lengths,
        truncated_PG=lengths > 6,
        columns={"task": ["sum", "product"][:num_prompts]},
    )


TWO = make(
    [[1.0, 1.0, 0.0, 0.0], [0.5, 0.4, 0.0, NAN]],
    answers=[[7, 7, 8, None], [3, 4, 5, 3]],
)


def test_group_metrics_are_means_over_prompts() -> None:
    metrics = group_metrics(TWO, MetricSettings(ks=[1, 2, 4], num_resamples=0))
    assert metrics == pytest.approx(
        {
            "num_prompts": 2,
            "reward": (2 / 4 + 0.9 / 3) / 2,
            "completions/mean_length": 4.5,
            "completions/clipped_ratio": 2 / 8,
            "rewards/right/mean": (2 / 4 + 0.9 / 3) / 2,
            "accuracy": (2 / 4 + 1 / 3) / 2,  # 0.5 is right, and NaN is left out
            "pass@1": (2 / 4 + 1 / 3) / 2,
            "pass@2": (1 - 1 / 6 + 1 - 1 / 3) / 2,
            "pass@4": 1.0,  # of the first prompt alone: the other has 3 scores
            # Of 7 7 8 -: 7 wins 77 and 7- (twice), ties in 78 (twice) and loses 8-.
            # Of 3 4 5: a tie each time, and only 3 is right.
            "maj@2": ((1 + 2 + 2 / 2) / 6 + (1 / 2 + 1 / 2) / 3) / 2,
            "maj@4": 1.0,
            "rewards/right/scored": 7 / 8,
        }
    )


def test_short_names_are_of_the_first_reward_function() -> None:
    other = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    groups = make([[1.0, 0.0, 0.0, 0.0], [0.0] * 4], others={"other": other})
    metrics = group_metrics(groups, MetricSettings(ks=[2]))
    assert metrics["accuracy"] == 1 / 8
    assert not [name for name in metrics if re.match("rewards/right/(accuracy|pass|maj)", name)]
    assert metrics["rewards/other/accuracy"] == 7 / 8
    assert metrics["rewards/other/pass@2"] == 1.0
    assert "maj@2" not in metrics  # no function says what an answer is


def test_the_threshold_decides_what_is_right() -> None:
    metrics = group_metrics(TWO, MetricSettings(correct_threshold=0.4))
    assert metrics["accuracy"] == pytest.approx((2 / 4 + 2 / 3) / 2)


def test_every_mean_over_prompts_has_an_interval_around_it() -> None:
    metrics = group_metrics(TWO, MetricSettings(ks=[1, 2], num_resamples=200))
    with_interval = {name.removesuffix("/low") for name in metrics if name.endswith("/low")}
    plain = {name for name in metrics if not name.endswith(("/low", "/high"))}
    assert plain - with_interval == {"num_prompts", "rewards/right/scored"}
    for name in with_interval:
        assert metrics[f"{name}/low"] <= metrics[name] <= metrics[f"{name}/high"]
    # Two prompts: a resample has both, or one of them twice.
    assert metrics["accuracy/low"] == pytest.approx(1 / 3)
    assert metrics["accuracy/high"] == pytest.approx(1 / 2)


def test_tasks_have_the_metrics_of_their_prompts() -> None:
    settings = MetricSettings(ks=[1], task_column="task", num_resamples=0)
    metrics = group_metrics(TWO, settings)
    assert metrics["tasks/sum/accuracy"] == 0.5
    assert metrics["tasks/product/accuracy"] == pytest.approx(1 / 3)
    assert metrics["tasks/product/num_prompts"] == 1
    alone = group_metrics(TWO.select([1]), MetricSettings(ks=[1], num_resamples=0))
    assert {name: metrics[f"tasks/product/{name}"] for name in alone} == alone


def test_what_nobody_scored_is_nan() -> None:
    metrics = group_metrics(make([[NAN, NAN]]), MetricSettings(ks=[1]))
    for name in ("reward", "accuracy", "accuracy/low", "pass@1"):
        assert math.isnan(metrics[name])
    assert metrics["rewards/right/scored"] == 0


def test_spread_metrics_are_those_of_trl() -> None:
    metrics = spread_metrics(TWO)
    scores = [1.0, 1.0, 0.0, 0.0, 0.5, 0.4, 0.0]
    mean = sum(scores) / 7
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / 6)
    assert metrics == pytest.approx(
        {
            "reward_std": deviation,
            "rewards/right/std": deviation,
            "completions/min_length": 1,
            "completions/max_length": 8,
            "completions/mean_terminated_length": 3.5,
            "completions/min_terminated_length": 1,
            "completions/max_terminated_length": 6,
        }
    )


def test_spread_metrics_where_no_completion_ended() -> None:
    groups = make([[1.0, 0.0]])
    cut = EvalGroups(**{**vars(groups), "truncated_PG": torch.ones(1, 2, dtype=torch.bool)})
    assert spread_metrics(cut)["completions/mean_terminated_length"] == 0
