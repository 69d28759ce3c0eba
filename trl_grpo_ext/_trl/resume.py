"""TRL's trainer with exact resume."""

from __future__ import annotations

from trl_grpo_ext._trl.guards import GuardSeams


class ResumeSeams(GuardSeams):
    """``trl.GRPOTrainer`` whose resumed run is the run that was ended."""
