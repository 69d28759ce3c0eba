"""The options of evaluation during training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EvaluationOptions:
    """How ``trainer.evaluate()`` measures."""
