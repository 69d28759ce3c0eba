"""TRL's trainer that samples on until a batch is full of groups that teach something."""

from __future__ import annotations

from trl_grpo_ext._trl.evaluation import EvaluationSeams


class DynamicSamplingSeams(EvaluationSeams):
    """``trl.GRPOTrainer`` with dynamic sampling."""
