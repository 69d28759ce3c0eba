"""The options that keep a run learning: dynamic sampling, clipping, steps that are skipped."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RobustnessOptions:
    """What a run does about batches that teach nothing, or too much."""
