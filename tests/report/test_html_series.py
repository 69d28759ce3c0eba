"""The numbers behind the curves, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.logs import make_log

from trl_grpo_ext.report.history import History
from trl_grpo_ext.report.web.bands import band_of
from trl_grpo_ext.report.web.charts import Chart, Line
from trl_grpo_ext.report.web.completions import Completions, Group, Step, evenly_spaced
from trl_grpo_ext.report.web.run_folder import Run
from trl_grpo_ext.report.web.series import (
    MAX_POINTS,
    ends,
    kept_points,
    phase_times,
    running_mean,
    smoothing_window,
    standard_error_band,
    tokens_per_second,
    wilson_band,
)

LONG = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=300)


def test_standard_error_divides_by_the_root_of_the_prompts() -> None:
    low, high = standard_error_band(np.array([2.0, 0.0]), np.array([3.0, 6.0]), num_prompts=9)
    assert low.tolist() == [1.0, -2.0]
    assert high.tolist() == [3.0, 2.0]


def test_wilson_band_is_that_of_each_share_and_a_gap_where_nothing_is_known() -> None:
    low, high = wilson_band(np.array([0.0, math.nan]), np.array([4.0, 4.0]))
    # p = 0: the upper end is z^2 / (n + z^2) = 3.8415 / 7.8415
    assert low[0] == pytest.approx(0.0, abs=1e-12)
    assert high[0] == pytest.approx(0.48990, abs=1e-4)
    assert math.isnan(low[1])
    assert math.isnan(high[1])


@given(LONG, st.sampled_from([1, 3, 5, 11]))
def test_running_mean_is_the_mean_of_the_logs_around(values: list[float], window: int) -> None:
    found = running_mean(np.array(values), window=window)
    half = window // 2
    for index in range(len(values)):
        around = [v for v in values[max(index - half, 0) : index + half + 1] if not math.isnan(v)]
        if around:
            assert found[index] == pytest.approx(sum(around) / len(around), abs=1e-6, rel=1e-9)
        else:
            assert math.isnan(found[index])


@given(LONG, st.integers(8, 40))
def test_thinning_keeps_ends_and_extremes(values: list[float], most: int) -> None:
    kept = kept_points(np.array(values), most=most)
    assert kept == sorted(set(kept))
    assert {0, len(values) - 1} <= set(kept)
    assert len(kept) <= max(most, len(values) if len(values) <= most else 0)
    if logged := [value for value in values if not math.isnan(value)]:
        shown = [values[index] for index in kept]
        assert {min(logged), max(logged)} <= set(shown)


def test_only_long_and_rough_curves_are_smoothed_and_the_raw_one_stays() -> None:
    rough = np.tile([0.0, 1.0], 24)
    assert smoothing_window(rough) == 5
    assert smoothing_window(rough[:23]) == 1
    assert smoothing_window(np.zeros(48)) == 1
    drawn = Line("x", np.arange(48.0), rough).to_json()
    assert drawn["y"] == rough.tolist()
    assert drawn["smooth"][2:4] == [0.4, 0.6]


def test_tokens_per_second_counts_the_steps_since_the_log_before() -> None:
    history = History.of(
        [
            {"step": 2, "num_tokens": 100, "step_time": 5.0},  # 100 tokens in 2 x 5 s
            {"step": 3, "num_tokens": 160, "step_time": 3.0},  # 60 tokens in 3 s
            {"step": 4, "num_tokens": None, "step_time": 3.0},
            {"step": 5, "num_tokens": 220, "step_time": 3.0},  # 60 tokens in 2 x 3 s
        ]
    )
    steps, speed = tokens_per_second(history)
    assert steps.tolist() == [2, 3, 5]
    assert speed.tolist() == [10, 20, 10]


def test_other_time_is_what_the_phases_leave_of_the_step() -> None:
    _, times = phase_times(History.of(make_log(1)))
    # 10 s, of which 4 + 1 + 2 + 2
    assert {name: values.tolist() for name, values in times.items()} == {
        "generation": [4.0],
        "rewards": [1.0],
        "log-probabilities": [2.0],
        "update": [2.0],
        "other": [1.0],
    }


def test_phases_that_never_ran_are_left_out() -> None:
    _, times = phase_times(History({"step_time": {1: 2.0}, "time/generation": {1: 2.0}}))
    assert list(times) == ["generation"]


def test_ends_are_means_of_at_most_five_logs_and_of_half_of_them() -> None:
    history = History({"kl": dict(enumerate(map(float, range(20)))), "one": {3: 7.0}})
    assert ends(history, "kl") == (2.0, 17.0, 5)
    assert ends(history, "one") == (7.0, 7.0, 1)
    assert ends(history, "none") is None


@given(st.integers(1, 500), st.integers(1, 60))
def test_evenly_spaced_steps_hold_the_last_and_at_most_so_many(length: int, most: int) -> None:
    found = evenly_spaced(length, most=most)
    assert found == sorted(set(found))
    assert len(found) == min(length, most)
    assert found[-1] == length - 1
    if most > 1:
        assert found[0] == 0
        gaps = np.diff(found)
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def sampled_from(num_prompts: int) -> Completions:
    group = Group(prompt=[("", "q")], texts=["a"], scores=[[1.0]], extras=[[]])
    return Completions([Step(1, ["r"], [], [group], num_groups=num_prompts)], 1)


def test_band_of_a_reward_is_over_prompts_where_they_are_known_else_over_completions() -> None:
    history = History.of(make_log(1))  # mean 0.1, deviation 0.2
    low, high = band_of(Run("known", history=history, completions=sampled_from(4)), "reward") or ()
    assert (low.item(), high.item()) == pytest.approx((0.0, 0.2))
    low, high = band_of(Run("unknown", history=history), "reward") or ()
    assert (low.item(), high.item()) == pytest.approx((-0.1, 0.3))


def test_layers_of_a_stack_stay_at_the_same_steps_and_keep_its_peak() -> None:
    steps_S = np.arange(1500.0)
    rng = np.random.default_rng(0)
    layers = [rng.random(1500) for _ in range(3)]
    layers[1][900] = 50.0
    lines = [Line(str(i), steps_S, values, style="area") for i, values in enumerate(layers)]
    found = Chart("Time", "s", lines).to_json()["lines"]
    assert found[0]["x"] == found[1]["x"] == found[2]["x"]
    assert len(found[0]["x"]) <= MAX_POINTS
    total = np.sum([line["y"] for line in found], axis=0)
    assert total == pytest.approx(np.sum(layers, axis=0)[np.array(found[0]["x"], int)], rel=1e-4)
    assert total.max() == pytest.approx(np.sum(layers, axis=0).max(), rel=1e-4)


def test_band_of_an_evaluation_is_what_was_logged_at_its_steps() -> None:
    log = [
        {"step": 4, "eval_accuracy": 0.5, "eval_accuracy/low": 0.4, "eval_accuracy/high": 0.7},
        {"step": 5, "eval_accuracy/low": 0.1, "eval_accuracy/high": 0.2},
    ]
    low, high = band_of(Run("r", history=History.of(log)), "eval_accuracy") or ()
    assert (low.tolist(), high.tolist()) == ([0.4], [0.7])
    assert band_of(Run("r", history=History.of(log)), "eval_pass@8") is None
