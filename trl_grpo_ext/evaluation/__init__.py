"""How good a policy is on held-out prompts."""

from __future__ import annotations

from trl_grpo_ext.evaluation.heldout import CORRECT_THRESHOLD, Accuracy, evaluate_accuracy

__all__ = ["CORRECT_THRESHOLD", "Accuracy", "evaluate_accuracy"]
