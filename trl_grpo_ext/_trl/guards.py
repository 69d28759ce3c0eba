"""TRL's trainer that leaves out a step whose gradient is not finite."""

from __future__ import annotations

from trl_grpo_ext._trl.dynamic_sampling import DynamicSamplingSeams


class GuardSeams(DynamicSamplingSeams):
    """``trl.GRPOTrainer`` that skips what would ruin the weights."""
