"""Charts as data: lines with bands, levels and stacks, which the page's script draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_grpo_ext.report.history import Floats
from trl_grpo_ext.report.web.series import Band, kept_points, running_mean, smoothing_window


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: In the legend.
        steps_S: Where it was logged.
        values_S: What was logged; NaN leaves a gap.
        band: The lower and the upper end of what is shaded.
        colour: Index in the page's palette.
        style: ``line``; ``points`` with error bars; ``area`` of a stack.
    """

    name: str
    steps_S: Floats
    values_S: Floats
    band: Band | None = None
    colour: int = 0
    style: str = "line"

    @property
    def window(self) -> int:
        """How many logs the thick line is the mean of; 1 for the logs themselves."""
        return smoothing_window(self.values_S) if self.style == "line" else 1

    @property
    def is_thinned(self) -> bool:
        """Whether points are left out."""
        return len(kept_points(self.values_S)) < len(self.values_S)

    def to_json(self, *, kept: Sequence[int] | None = None) -> dict[str, Any]:
        """Return what the script draws.

        Args:
            kept: Indices of the points to draw; by default those of its own peaks, and some.
        """
        kept = kept_points(self.values_S) if kept is None else kept
        smooth_S = running_mean(self.values_S, window=self.window) if self.window > 1 else None
        low_S, high_S = self.band or (None, None)
        return {
            "name": self.name,
            "colour": self.colour,
            "style": self.style,
            "x": as_json(self.steps_S[kept]),
            "y": as_json(self.values_S[kept]),
            "smooth": None if smooth_S is None else as_json(smooth_S[kept]),
            "low": None if low_S is None else as_json(low_S[kept]),
            "high": None if high_S is None else as_json(high_S[kept]),
        }


@dataclass(frozen=True)
class Level:
    """A horizontal line."""

    name: str
    value: float
    colour: int


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        title: Above it.
        unit: Of the vertical axis, in words; ``share`` is shown in percent.
        lines: At least one.
        levels: To compare with.
        caption: What the band is, and what is healthy.
        from_zero: Whether the axis begins at 0.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    caption: str = ""
    from_zero: bool = False

    @property
    def full_caption(self) -> str:
        """The caption, with what was smoothed and thinned."""
        windows = sorted({line.window for line in self.lines} - {1})
        parts = [self.caption]
        if windows:
            widths = " or ".join(map(str, windows))
            parts.append(f"Thin: as logged; thick: mean of {widths} logs.")
        if any(line.is_thinned for line in self.lines):
            parts.append("Points are left out, peaks are not.")
        return " ".join(filter(None, parts))

    def to_json(self) -> dict[str, Any]:
        """Return what the script draws."""
        areas = [line.values_S for line in self.lines if line.style == "area"]
        # Layers of a stack are at the same steps, and stay so: the peaks are those of the whole.
        stack = kept_points(np.nansum(areas, axis=0)) if areas else None
        return {
            "title": self.title,
            "unit": self.unit,
            "zero": self.from_zero,
            "lines": [
                line.to_json(kept=stack if line.style == "area" else None) for line in self.lines
            ],
            "levels": [vars(level) for level in self.levels],
        }


def as_json(values: Iterable[float]) -> list[float | None]:
    """Return numbers with six digits, and ``None`` for what is not finite.

    Example:
        >>> as_json([0.12345678, float("nan"), 3.0])
        [0.123457, None, 3.0]
    """
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
