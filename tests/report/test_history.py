"""What is read from a trainer's log."""

from __future__ import annotations

import math

import numpy as np

from trl_grpo_ext.report.history import History


def test_history_keeps_the_later_of_two_logs_of_a_step_and_sorts_by_step() -> None:
    history = History.of([{"step": 2, "kl": 1.0}, {"step": 1, "kl": 3.0}, {"step": 2, "kl": 5.0}])
    steps, (kl,) = history.columns("kl")
    assert steps.tolist() == [1, 2]
    assert kl.tolist() == history.logged("kl") == [3.0, 5.0]


def test_history_columns_hold_nan_where_a_metric_is_missing_or_not_finite() -> None:
    history = History.of(
        [
            {"step": 1, "kl": 1.0, "note": "text"},
            {"step": 2, "kl": None, "loss": 7.0},
            {"step": 3, "kl": math.inf},
            {"loss": 9.0},
        ]
    )
    steps, (kl, loss) = history.columns("kl", "loss")
    assert steps.tolist() == [1, 2, 3]
    np.testing.assert_equal(kl, [1.0, math.nan, math.nan])
    np.testing.assert_equal(loss, [math.nan, 7.0, math.nan])
