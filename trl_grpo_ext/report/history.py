"""The metrics that a run logged, by name and step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_STEP = 2**53  # what floats count one by one; more is no step
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class History:
    """The logged metrics of a run, by name and step; NaN where a step logged no finite number."""

    values: Mapping[str, Mapping[int, float]]

    @classmethod
    def of(cls, log_history: Iterable[Mapping[str, object]]) -> History:
        """Read transformers' ``trainer.state.log_history``; a step logged twice counts once."""
        values: dict[str, dict[int, float]] = {}
        for entry in log_history:
            step = entry.get("step")
            if not isinstance(step, int) or not -MAX_STEP < step < MAX_STEP:
                continue
            for name, value in entry.items():
                if value is None or isinstance(value, int | float):
                    values.setdefault(name, {})[step] = _finite(value)
        return cls({name: dict(sorted(series.items())) for name, series in values.items()})

    def has(self, name: str) -> bool:
        """Return whether the metric was logged at least once with a finite number."""
        return bool(self.logged(name))

    def logged(self, name: str) -> list[float]:
        """Return the metric's finite numbers in the order of the steps."""
        return [value for value in self.values.get(name, {}).values() if not math.isnan(value)]

    def columns(self, *names: str) -> tuple[Floats, list[Floats]]:
        """Return the steps at which any of the metrics was logged, and each metric at them.

        Returns:
            Steps, shape ``(S,)``, and one array of shape ``(S,)`` a name, NaN where it is missing.
        """
        series = [self.values.get(name, {}) for name in names]
        steps = sorted(set().union(*series))
        columns = [np.array([one.get(s, math.nan) for s in steps], dtype=float) for one in series]
        return np.array(steps, dtype=float), columns

    def reward_names(self) -> list[str]:
        """Return the names of the reward functions, in alphabetical order."""
        found = (re.fullmatch(r"rewards/(.+)/mean", name) for name in self.values)
        return sorted(m.group(1) for m in found if m and self.has(m.string))


def _finite(value: float | None) -> float:
    try:
        return math.nan if value is None or not math.isfinite(value) else float(value)
    except OverflowError:  # an integer beyond every float
        return math.nan
