"""What the plots show."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from report.logs import make_log, without

from trl_grpo_ext.report.history import History
from trl_grpo_ext.report.plots import MAX_BARS, PLOTS


def drawn_axes(name: str, log: list[dict[str, object]]) -> object:
    """Return the axes of one plot, drawn but not saved."""
    plot = next(plot for plot in PLOTS if plot.name == name)
    axes = Figure().subplots()
    plot.draw(axes, History.of(log))
    return axes


def test_reward_plot_has_the_mean_its_spread_and_one_line_a_function() -> None:
    axes = drawn_axes("reward", make_log(2))
    total, function = axes.get_lines()
    np.testing.assert_allclose(total.get_ydata(), [0.1, 0.2])
    np.testing.assert_allclose(function.get_ydata(), [0.3, 0.6])
    assert function.get_label() == "right_answer"
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    # mean -+ 0.2
    assert (heights.min(), heights.max()) == pytest.approx((-0.1, 0.4))


def test_reward_plot_leaves_a_gap_where_a_step_had_no_reward() -> None:
    log = make_log(3)
    log[1]["reward"] = None
    total = drawn_axes("reward", log).get_lines()[0]
    np.testing.assert_allclose(total.get_ydata(), [0.1, math.nan, 0.3])


def test_reward_plot_shows_names_that_matplotlib_would_read_as_formulas_or_hide() -> None:
    log = [{"step": 1, "reward": 1.0, "rewards/_a$b$/mean": 1.0}]
    assert drawn_axes("reward", log).get_lines()[1].get_label() == r"a\$b\$"


def test_length_plot_has_a_band_from_the_shortest_to_the_longest() -> None:
    axes = drawn_axes("length", make_log(2))
    assert axes.get_lines()[0].get_ydata().tolist() == [20.0, 20.0]
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (10.0, 30.0)


def test_time_plot_stacks_the_phases_and_what_is_left_of_the_step() -> None:
    axes = drawn_axes("time", make_log(2))
    stacks = {c.get_label(): (c[0].get_y(), c[0].get_height()) for c in axes.containers}
    assert stacks == {
        "generation": (0.0, 4.0),
        "rewards": (4.0, 1.0),
        "log-probabilities": (5.0, 2.0),
        "update": (7.0, 2.0),
        "other": (9.0, 1.0),
    }


def test_time_plot_shows_the_whole_step_when_no_phase_was_logged() -> None:
    axes = drawn_axes("time", without(make_log(2), "time/"))
    assert [(c.get_label(), c[0].get_height()) for c in axes.containers] == [("step", 10.0)]


def test_time_plot_turns_to_areas_when_bars_would_be_too_thin() -> None:
    axes = drawn_axes("time", make_log(MAX_BARS + 1))
    assert axes.collections[0].get_label() == "generation"
    assert not axes.containers
