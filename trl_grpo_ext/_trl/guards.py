"""TRL's trainer that leaves out a step whose gradient is not finite, and counts what it cuts."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers.utils import logging

from trl_grpo_ext._trl.dynamic_sampling import DynamicSamplingSeams
from trl_grpo_ext.robustness import NonFiniteGradientError

logger = logging.get_logger(__name__)

_CAUSE = (
    "The likely cause is a loss that overflowed: lower `learning_rate`, set `kl_clamp: 10` or "
    "`delta` if ratios explode, and train in bfloat16 or float32 rather than float16."
)


class GuardSeams(DynamicSamplingSeams):
    """``trl.GRPOTrainer`` that skips what would ruin the weights.

    Attributes:
        num_skipped: Steps of the run that were skipped.
        num_skipped_in_a_row: Of these, the ones since the last update.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.num_skipped = 0
        self.num_skipped_in_a_row = 0
        super().__init__(*args, **kwargs)

    # Gradients ------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradient; if it is not finite, the optimizer finds no gradient.

        An optimizer leaves parameters without gradient alone: weights, moments and weight decay.
        The norm is that of all processes, so all of them skip the same steps.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.extended or self._skips_by_itself:
            return norm
        if math.isfinite(_as_number(norm)):
            self.num_skipped_in_a_row = 0
        else:
            model.zero_grad(set_to_none=True)
            self._count_skipped(norm)
        self._metrics["train"]["skipped_steps"] = [float(self.num_skipped)]
        return norm

    @property
    def _skips_by_itself(self) -> bool:
        """Whether a gradient scaler or DeepSpeed leaves out such steps."""
        accelerator = self.accelerator
        return (
            accelerator.scaler is not None
            or accelerator.distributed_type == DistributedType.DEEPSPEED
        )

    def _count_skipped(self, norm: Any) -> None:
        self.num_skipped += 1
        self.num_skipped_in_a_row += 1
        most = self.options.max_skipped_steps
        found = (
            f"the gradient of step {self.state.global_step + 1} has norm {_as_number(norm)}, as "
            f"have {self.num_skipped_in_a_row} in a row (`max_skipped_steps`: {most})"
        )
        if self.num_skipped_in_a_row >= most:
            raise NonFiniteGradientError(
                f"{found}, so the run does not learn any more. The weights are those of the last "
                f"finite step. {_CAUSE}"
            )
        if self.is_world_process_zero():
            logger.warning(f"{found}. It would ruin the weights, so this step is skipped. {_CAUSE}")

    # What is cut and left out of a batch ----------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Run TRL's method; count the completions that its loss leaves out, and cut advantages."""
        training = self._mode == "train"
        output = super()._generate_and_score_completions(inputs)
        if not (self.extended and training):
            return output
        metrics, clip = self._metrics["train"], self.options.advantage_clip
        if self.mask_truncated_completions:
            num_masked = self._over_processes(~output["completion_mask"].any(dim=1))
            metrics["completions/num_truncated"].append(num_masked)
        if clip is not None:
            advantages = output["advantages"]
            is_cut = advantages.abs() >= clip
            if is_cut.ndim == 2:
                is_cut = (is_cut & output["completion_mask"].bool()).any(dim=1)
            num_cut = self._over_processes(is_cut)
            num_completions = len(advantages) * self.accelerator.num_processes
            metrics["advantages/clipped_fraction"].append(num_cut / num_completions)
        return output

    def _over_processes(self, holds_B: torch.Tensor) -> float:
        """In how many rows of the batch something holds; every process must call it."""
        return float(self.accelerator.reduce(holds_B.sum(), reduction="sum"))


def _as_number(norm: Any) -> float:
    """A norm as a number; that of weights sharded by FSDP2 is put together, by all processes."""
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    return float(norm.item() if isinstance(norm, torch.Tensor) else norm)
