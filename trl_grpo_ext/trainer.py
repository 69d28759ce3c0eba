"""The trainer: ``trl.GRPOTrainer`` with the advantages, KL and reference of this package.

One step of GRPO, in order. TRL samples a group of completions a prompt and scores them with every
reward function (:meth:`ExtGRPOTrainer.checked_reward` guards each).
:meth:`~ExtGRPOTrainer.compute_advantages` compares each completion with its group. The loss weighs
the policy's log-probabilities with these advantages, and :meth:`~ExtGRPOTrainer.compute_kl` holds
the policy near the frozen reference of :meth:`~ExtGRPOTrainer.make_reference`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging
from trl import GRPOTrainer

from trl_grpo_ext._trl.seams import KLInputs, SeamedGRPOTrainer
from trl_grpo_ext.advantages import (
    RewardAggregation,
    RewardScale,
    multi_reward_advantages,
)
from trl_grpo_ext.config import ExtensionOptions, configuration_problems
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.losses import importance_ratio, kl_estimate, reduce_tokens
from trl_grpo_ext.reference import build_reference, summarize_reference
from trl_grpo_ext.rewards.scores import checking

logger = logging.get_logger(__name__)


class ExtGRPOTrainer(SeamedGRPOTrainer):
    """A drop-in replacement of ``trl.GRPOTrainer``: the same constructor, every option kept.

    ``args`` is an :class:`~trl_grpo_ext.config.ExtGRPOConfig`; a plain ``trl.GRPOConfig`` works too
    and means the defaults of :class:`~trl_grpo_ext.config.ExtensionOptions`.

    Raises:
        ConfigurationError: settings that cannot work, all at once, before a model loads.
        ReferenceModelError: the reference that was asked for cannot be built for this policy.

    References:
        Shao et al. 2024, DeepSeekMath, section 4, arXiv:2402.03300.
    """

    __signature__ = inspect.signature(GRPOTrainer)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _check_before_loading(self.__signature__.bind(*args, **kwargs).arguments)
        super().__init__(*args, **kwargs)

    @property
    def options(self) -> ExtensionOptions:
        """This package's options of the run."""
        return ExtensionOptions.of(self.args)

    @property
    def extended(self) -> bool:
        """Whether anything of this package is used (``extensions``)."""
        return self.options.extensions

    def checked_reward(
        self, reward_func: Callable[..., Any], name: str, count_non_finite: Callable[[int], None]
    ) -> Callable[..., Any]:
        """Return the reward function with its scores checked: a malformed one is never silent."""
        return checking(reward_func, name=name, count_non_finite=count_non_finite)

    def compute_advantages(self, rewards_BR: Tensor, group_size: int) -> Tensor:
        """Return how much better each completion scored than its group.

        Args:
            rewards_BR: Of all processes, shape ``(B, R)``, NaN where a reward was not given.
            group_size: ``G``; 1 is legal in evaluation, where every advantage is then 0.

        Returns:
            Shape ``(B,)``.
        """
        if group_size == 1:
            return torch.zeros_like(rewards_BR[:, 0])
        return multi_reward_advantages(
            rewards_BR,
            group_size=group_size,
            weights_R=self.reward_weights.to(rewards_BR.device),
            aggregation=cast(RewardAggregation, self.multi_objective_aggregation),
            baseline=self.options.advantage_baseline,
            scale=cast(RewardScale, self.scale_rewards),
            eps=self.options.advantage_eps,
        )

    @property
    def replaces_kl(self) -> bool:
        """Whether the KL penalty differs from TRL's."""
        return self.options.kl_estimator != "k3" or self.options.kl_clamp is not None

    def compute_kl(self, inputs: KLInputs) -> tuple[Tensor, Tensor]:
        """Return ``beta`` times the KL to the reference, reduced, and each token's KL in nats."""
        kl_BT = kl_estimate(
            inputs.logprobs_BT,
            inputs.ref_logprobs_BT,
            estimator=self.options.kl_estimator,
            clamp=self.options.kl_clamp,
        )
        if self.args.use_bias_correction_kl:
            kl_BT = kl_BT * importance_ratio(
                inputs.logprobs_BT,
                inputs.old_logprobs_BT,
                inputs.mask_BT,
                level=inputs.importance_level,
            )
        penalty = reduce_tokens(
            kl_BT,
            inputs.mask_BT,
            reduction=inputs.reduction,
            max_completion_length=self.max_completion_length,
            num_tokens=inputs.num_tokens,
        )
        steps = 1 if inputs.reduction == "dapo" else inputs.accumulation_steps
        return self.beta * penalty / steps, kl_BT

    def make_reference(self, policy: PreTrainedModel) -> nn.Module | None:
        """Return the frozen reference that ``reference`` asks for; ``None`` for TRL's own."""
        options = self.options
        if options.reference == "auto":
            return None
        block_size, double = options.reference_block_size, options.reference_double_quantization
        reference = build_reference(
            policy,
            kind=options.reference,
            quantization=options.reference_quantization or "nf4",
            block_size=64 if block_size is None else block_size,
            double_quantization=True if double is None else double,
            keep_modules=options.reference_keep_modules or (),
        )
        logger.info(f"reference: {options.reference}, {summarize_reference(reference)}")
        return reference


def _check_before_loading(arguments: dict[str, Any]) -> None:
    """Refuse, before a model loads, what cannot work."""
    args = arguments.get("args")
    if args is None:
        return
    problems = list(configuration_problems(args))
    peft = arguments.get("peft_config") is not None or hasattr(arguments["model"], "peft_config")
    options = ExtensionOptions.of(args)
    if peft and options.reference != "auto" and args.beta != 0.0:
        problems.append(
            f"`reference` is {options.reference!r}, but the policy is a PEFT model: "
            "with its adapter switched off it is its own exact reference, at no memory. "
            "Remove `reference`, or set `reference: auto`."
        )
    if arguments.get("quantization_config") is not None and options.reference != "auto":
        problems.append(
            f"`reference` is {options.reference!r}, but the policy is loaded quantized "
            "(`quantization_config`, `load_in_4bit`). Remove `reference`, or set it to auto."
        )
    if problems:
        raise ConfigurationError(problems)
