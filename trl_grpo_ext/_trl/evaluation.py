"""TRL's trainer with an evaluation that counts each prompt once."""

from __future__ import annotations

from typing import Any

from trl_grpo_ext._trl.seams import SeamedGRPOTrainer


class EvaluationSeams(SeamedGRPOTrainer):
    """``trl.GRPOTrainer`` whose evaluation reports pass@k and intervals."""

    def __init__(self, *args: Any, compute_metrics: Any = None, **kwargs: Any) -> None:
        self.compute_group_metrics = compute_metrics
        super().__init__(*args, **kwargs)
