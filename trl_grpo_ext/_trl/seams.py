"""TRL's GRPO trainer with the steps of the algorithm as public methods to override.

Nothing of TRL is copied: each private method is wrapped, calls ``super()``, and hands what it found
to a hook with a public name. A hook that is not overridden leaves TRL's own result untouched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from trl_grpo_ext._trl.steps import STEP_REWARDS, StepRewardSeams
from trl_grpo_ext.losses import LOSS_TYPE_REDUCTIONS, ImportanceLevel, LossReduction


@dataclass(frozen=True)
class KLInputs:
    """What a KL penalty is made of, and how this run reduces per-token values to a loss.

    Shapes: ``B`` completions of the micro-batch, ``T`` completion tokens.

    Attributes:
        logprobs_BT: Of the policy, with gradient.
        old_logprobs_BT: Of the policy that sampled.
        ref_logprobs_BT: Of the reference.
        mask_BT: 1 on the tokens that count.
        importance_level: Of the ratio that the KL is multiplied by.
        reduction: As in :func:`trl_grpo_ext.losses.reduce_tokens`.
        num_tokens: What ``reduction="dapo"`` divides by, gradient accumulation included.
        accumulation_steps: What the other reductions divide by.
    """

    logprobs_BT: Tensor
    old_logprobs_BT: Tensor
    ref_logprobs_BT: Tensor
    mask_BT: Tensor
    importance_level: ImportanceLevel
    reduction: LossReduction
    num_tokens: Tensor
    accumulation_steps: int


TRL_TOTALS = ("reward", "reward_std")  # metrics of TRL that gates and limits replace


def mean_advantages(advantages: Tensor, mask_BT: Tensor) -> Tensor:
    """Return one advantage a completion, shape ``(B,)``: the mean over its tokens."""
    if advantages.ndim == 1:
        return advantages
    return (advantages * mask_BT).sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)


class SeamedGRPOTrainer(StepRewardSeams):
    """``trl.GRPOTrainer`` with public hooks: completions, rewards, advantages, KL and reference."""

    _logs: dict[str, Any]
    _tag_names = [*StepRewardSeams._tag_names, "trl-grpo-ext"]  # noqa: RUF012 - as in TRL

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._rewards_per_func: Tensor | None = None
        super().__init__(*args, **kwargs)

    # Hooks: what a subclass overrides -------------------------------------------------------------

    def compute_advantages(
        self, rewards_BR: Tensor, group_size: int, step_rewards_BT: Tensor | None = None
    ) -> Tensor | None:
        """Return the advantages, shape ``(B,)``, or ``(B, T)`` with steps; ``None`` keeps TRL's."""
        return None

    @property
    def replaces_kl(self) -> bool:
        """Whether :meth:`compute_kl` stands in for TRL's KL penalty."""
        return False

    def compute_kl(self, inputs: KLInputs) -> tuple[Tensor, Tensor]:
        """Return the KL penalty to add to the loss, and each token's KL in nats, ``(B, T)``."""
        raise NotImplementedError

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_func

    # Advantages -----------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        rewards_BR, self._rewards_per_func = self._rewards_per_func, None
        if not self.extended or rewards_BR is None:
            return output
        metrics, group_size = self._metrics[self._mode], self._group_size_in_mode
        for name, value in self.combination_metrics(rewards_BR).items():
            if name in TRL_TOTALS:
                metrics[name].pop()
            metrics[name].append(value)
        advantages = self.compute_advantages(rewards_BR, group_size, *self._steps_of_all(output))
        if advantages is not None:
            self._replace_advantages(output, advantages, group_size)
        return output

    def _steps_of_all(self, output: dict[str, Any]) -> list[Tensor]:
        """The rewards of steps of all processes, if there are any."""
        if STEP_REWARDS not in output:
            return []
        padded = self.accelerator.pad_across_processes(
            output[STEP_REWARDS], dim=1, pad_index=math.nan
        )
        return [self.accelerator.gather(padded)]

    def _replace_advantages(
        self, output: dict[str, Any], advantages: Tensor, group_size: int
    ) -> None:
        mask_BT = output["completion_mask"]
        local = self._local(advantages).to(output["advantages"])
        if advantages.ndim == 2:  # padded to the longest of all processes
            local = local[:, : mask_BT.shape[1]]
        output["advantages"] = local
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        if advantages.ndim == 2:
            logged.extend(self.accelerator.gather(mean_advantages(local, mask_BT)).tolist())
        else:
            logged.extend(advantages.tolist())
        silent_P = (advantages.reshape(len(advantages) // group_size, -1) == 0).all(dim=1)
        self._metrics[self._mode]["frac_reward_zero_std"][-1] = silent_P.float().mean().item()

    # Loss -----------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if not (self.extended and self.replaces_kl and self.beta != 0.0):
            return cast(Tensor, super()._compute_loss(model, inputs))
        # TRL adds `beta * kl` to the per-token loss before reducing it. The reduction is linear, so
        # TRL computes the loss without its KL, from the same forward pass, and ours is added.
        with self._without_trl_kl():
            loss: Tensor = super()._compute_loss(model, inputs)
        kl_inputs = self._kl_inputs(inputs)
        penalty, kl_BT = self.compute_kl(kl_inputs)
        self._metrics[self._mode]["kl"].append(self._global_mean(kl_BT.detach(), kl_inputs.mask_BT))
        return loss + penalty

    @contextmanager
    def _without_trl_kl(self) -> Iterator[None]:
        beta, self.beta, self._keep_policy_logprobs = self.beta, 0.0, True
        try:
            yield
        finally:
            self.beta, self._keep_policy_logprobs = beta, False

    def _kl_inputs(self, inputs: dict[str, Any]) -> KLInputs:
        logprobs_BT, self._policy_logprobs = self._policy_logprobs, None
        assert logprobs_BT is not None
        training = self._mode == "train"
        old_BT = inputs.get("old_per_token_logps")
        mask_BT = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        num_tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if training:
            num_tokens = (
                num_tokens
                * self.current_gradient_accumulation_steps
                / self.args.steps_per_generation
            )
        return KLInputs(
            logprobs_BT=logprobs_BT,
            old_logprobs_BT=logprobs_BT.detach() if old_BT is None else old_BT,
            ref_logprobs_BT=inputs["ref_per_token_logps"],
            mask_BT=mask_BT,
            importance_level=cast(ImportanceLevel, self.importance_sampling_level),
            reduction=LOSS_TYPE_REDUCTIONS[self.loss_type],
            num_tokens=num_tokens,
            accumulation_steps=self.current_gradient_accumulation_steps if training else 1,
        )

    def _global_mean(self, values_BT: Tensor, mask_BT: Tensor) -> float:
        """Mean over the tokens of all processes; every process must call it."""
        local = torch.stack([(values_BT * mask_BT).sum(), mask_BT.sum().to(values_BT)])
        total, count = self.accelerator.reduce(local, reduction="sum")
        return float(total / count.clamp(min=1.0))
