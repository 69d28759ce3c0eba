"""Figures of a call."""

from __future__ import annotations

import dataclasses

import pytest

from trl_grpo_ext.rewards.api.client import Answer
from trl_grpo_ext.rewards.api.statistics import RewardStatistics, summarize
from trl_grpo_ext.rewards.api.wire import Reply


def test_figures_are_those_worked_out_by_hand() -> None:
    answers = [
        Answer(Reply([1.0], tokens=300), latency_s=0.5, num_requests=1),
        Answer(Reply([1.0], tokens=200), latency_s=0.1, num_requests=3),
        Answer(None, num_requests=4, failure="HTTP 503"),
        Answer(Reply([2.0], tokens=50), is_cached=True),
        Answer(None, failure="no slot"),
    ]
    found = summarize([1.0, 1.0, None, 2.0, None], answers, price_per_million_tokens=40.0)
    assert found == RewardStatistics(
        unscored_fraction=0.4,
        latency_p50_s=0.1,
        latency_p95_s=0.5,
        retries=5,
        cache_hits=1,
        requests=8,
        tokens=500,
        cost=pytest.approx(0.02),
    )


def test_percentiles_are_of_the_values_in_order() -> None:
    answers = [Answer(Reply([1.0]), latency_s=float(n), num_requests=1) for n in range(20, 0, -1)]
    found = summarize([1.0], answers, price_per_million_tokens=0)
    assert (found.latency_p50_s, found.latency_p95_s) == (10.0, 19.0)


def test_nothing_is_all_zeros() -> None:
    assert summarize([], [], price_per_million_tokens=1.0) == RewardStatistics()


def test_figures_are_logged_under_the_name_of_the_reward() -> None:
    logged: dict[str, float] = {}
    RewardStatistics(retries=3).log(logged.__setitem__, name="judge")
    names = [figure.name for figure in dataclasses.fields(RewardStatistics)]
    assert logged == {f"rewards/judge/{name}": 3.0 if name == "retries" else 0.0 for name in names}
