"""How good a policy is on held-out prompts: during training, and by itself."""

from __future__ import annotations

from trl_grpo_ext.evaluation.estimators import bootstrap_interval, majority_at_k, pass_at_k
from trl_grpo_ext.evaluation.groups import EvalGroups
from trl_grpo_ext.evaluation.heldout import CORRECT_THRESHOLD, Accuracy, evaluate_accuracy
from trl_grpo_ext.evaluation.metrics import MetricSettings, group_metrics

__all__ = [
    "CORRECT_THRESHOLD",
    "Accuracy",
    "EvalGroups",
    "MetricSettings",
    "bootstrap_interval",
    "evaluate_accuracy",
    "group_metrics",
    "majority_at_k",
    "pass_at_k",
]
