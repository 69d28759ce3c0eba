"""The options of what a run says about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LogOptions:
    """What is written about each step, and for whom."""
