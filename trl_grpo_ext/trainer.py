"""The trainer: ``trl.GRPOTrainer`` with the advantages, KL and reference of this package.

One step of GRPO, in order. :meth:`ExtGRPOTrainer.sample_completions` draws a group of completions
a prompt. Every reward function scores them (:meth:`~ExtGRPOTrainer.checked_reward` guards each).
:meth:`~ExtGRPOTrainer.compute_advantages` compares each completion with its group. The loss weighs
the policy's log-probabilities, for which each prompt is computed once (``shared_prefix``), with
these advantages, and :meth:`~ExtGRPOTrainer.compute_kl` holds the policy near the frozen
``reference``.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging
from trl import GRPOTrainer

from trl_grpo_ext._trl.resume import ResumeSeams
from trl_grpo_ext._trl.seams import KLInputs
from trl_grpo_ext.advantages import (
    RewardAggregation,
    RewardScale,
    multi_reward_advantages,
    step_advantages,
)
from trl_grpo_ext.attention import padding_problem
from trl_grpo_ext.config import ExtensionOptions, configuration_problems
from trl_grpo_ext.cpu_linear import use_onednn
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.logprobs import SharedPrefix, has_dropout
from trl_grpo_ext.losses import importance_ratio, kl_estimate, reduce_tokens
from trl_grpo_ext.rewards.combine import unknown_reward_problems
from trl_grpo_ext.rewards.process_advantages import process_advantage_problems
from trl_grpo_ext.rewards.registry import log_name
from trl_grpo_ext.rewards.remembering import remembers
from trl_grpo_ext.rewards.scores import checking
from trl_grpo_ext.sampling import (
    Completion,
    CompletionKey,
    Engine,
    choose_engine,
    sample_completions,
)
from trl_grpo_ext.step_log import add_log_callbacks

logger = logging.get_logger(__name__)

_LONG_GENERATION = 256  # [tokens] a completion may have, from where on a bar shows the progress


def _with_compute_metrics(signature: inspect.Signature) -> inspect.Signature:
    parameter = inspect.Parameter(
        "compute_metrics",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation="Callable[[EvalGroups], dict[str, float]] | None",
    )
    return signature.replace(parameters=[*signature.parameters.values(), parameter])


class ExtGRPOTrainer(ResumeSeams):
    """A drop-in replacement of ``trl.GRPOTrainer``: the same constructor, every option kept.

    One argument is added, keyword-only: ``compute_metrics``, a function from the groups of an
    evaluation (:class:`~trl_grpo_ext.evaluation.EvalGroups`) to more metrics of it.

    ``args`` is an :class:`~trl_grpo_ext.config.ExtGRPOConfig`; a plain ``trl.GRPOConfig`` works too
    and means the defaults of :class:`~trl_grpo_ext.config.ExtensionOptions`.

    Raises:
        ConfigurationError: settings that cannot work, all at once, before a model loads.
        ReferenceModelError: the reference that was asked for cannot be built for this policy.

    References:
        Shao et al. 2024, DeepSeekMath, section 4, arXiv:2402.03300.
    """

    __signature__ = _with_compute_metrics(inspect.signature(GRPOTrainer))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _check_before_loading(self.__signature__.bind(*args, **kwargs).arguments)
        super().__init__(*args, **kwargs)
        on_cpu = self.accelerator.device.type == "cpu"
        if on_cpu and self.extended and self.runs_onednn:
            use_onednn(self.model)
            if self.ref_model is not None:
                use_onednn(self.ref_model)
        self.shared_prefix = SharedPrefix(
            self.options.shared_prefix, verify=self.options.verify_shared_prefix
        )
        self.group_sampler, self.group_sampler_reason = self._choose_group_sampler()
        if self.extended:
            add_log_callbacks(self, options=self.options, opening=self._choices())

    def _choices(self) -> list[str]:
        """What was chosen for this run, and why, for the first lines of its log."""
        lines = [f"sampler: {self.group_sampler} ({self.group_sampler_reason})"]
        if self.args.beta:
            lines.append(f"reference: {self.reference_kind} ({self.reference_reason})")
        return lines

    def _choose_group_sampler(self) -> tuple[Engine, str]:
        if not self.extended:
            return "transformers", "`extensions` is false"
        engine, reason = choose_engine(self.options.group_sampler, self.sampling_needs())
        logger.info(f"group_sampler: {engine} ({reason})")
        if self.options.max_live_tokens is not None and engine != "shared_prefill":
            raise ConfigurationError(
                [
                    f"`max_live_tokens` is set, but `group_sampler` is {engine!r} here ({reason}), "
                    "which has no such limit. Remove `max_live_tokens`."
                ]
            )
        return engine, reason

    @property
    def samples_itself(self) -> bool:
        """Whether completions are sampled here, not by TRL."""
        return self.group_sampler in ("shared_prefill", "continuous_batching")

    def sample_completions(
        self, model: PreTrainedModel, prompts: list[list[int]], keys: list[CompletionKey], step: int
    ) -> list[Completion]:
        """Return one completion a prompt; see :class:`ResumeSeams`."""
        settings = self.sampling_settings(model)
        long = settings.max_new_tokens >= _LONG_GENERATION
        progress = long and not self.args.disable_tqdm and self.is_local_process_zero()
        if self.group_sampler == "continuous_batching":
            from trl_grpo_ext.sampling.continuous_batching import sample_continuously

            return sample_continuously(
                model,
                prompts,
                settings=settings,
                on_finished=self.completion_finished,
                should_stop=self.should_stop_sampling,
                progress=progress,
            )
        return sample_completions(
            model,
            prompts,
            keys,
            settings=settings,
            seed=self.args.seed,
            step=step,
            max_live_tokens=self.options.max_live_tokens,
            fixed_shapes=None if self.options.cuda_graphs else False,
            on_finished=self.completion_finished,
            should_stop=self.should_stop_sampling,
            progress=progress,
        )

    def can_reuse_logprobs(self, sampled: list[Completion]) -> bool:
        """Return whether the sampler's log-probabilities are those of a forward pass in training.

        They are if both are in float32, at the same temperature, nothing is dropped out, padding
        changes nothing, and the first batch agrees.
        """
        if self.options.old_logprobs == "recompute":
            return False
        if self.accelerator.mixed_precision != "no":
            reason = f"training runs under {self.accelerator.mixed_precision} autocast"
        elif self.policy_dtype != torch.float32:
            reason = "in half precision the sampler and a forward pass round differently"
        elif has_dropout(self.model):
            reason = "the policy has dropout"
        elif self.args.neftune_noise_alpha is not None:
            reason = "`neftune_noise_alpha` adds noise in training"
        elif self.sampling_settings(self.model).temperature != self.temperature:
            reason = "`generation_kwargs` samples at another temperature than the loss has"
        elif any(math.isnan(logprob) for c in sampled for logprob in c.policy_logprobs[:1]):
            reason = f"`group_sampler: {self.group_sampler}` does not keep them with these settings"
        elif (problem := self._sampler_problem or self._padding_problem(sampled)) is not None:
            reason = problem
        else:
            return True
        self.tell_recomputed(reason)
        return False

    def _padding_problem(self, sampled: list[Completion]) -> str | None:
        """Why padding may change what a forward pass gives; it is not there in shared rows."""
        model = self._causal_lm(self.model)
        width = max(map(len, self._sampled_prompts)) + max(len(c.ids) for c in sampled)
        longest = int(self._largest(width)[0])
        if self._shares_prefix(model, longest):
            return None
        return padding_problem(model, longest=longest)

    def checked_reward(
        self, reward_func: Callable[..., Any], name: str, count_non_finite: Callable[[int], None]
    ) -> Callable[..., Any]:
        """Return the reward function with its scores checked: a malformed one is never silent."""
        return checking(reward_func, name=name, count_non_finite=count_non_finite)

    def compute_advantages(
        self, rewards_BR: Tensor, group_size: int, step_rewards_BT: Tensor | None = None
    ) -> Tensor:
        """Return how much better each completion, or each of its steps, scored than its group.

        Args:
            rewards_BR: Of all processes, shape ``(B, R)``, NaN where a reward was not given.
            group_size: ``G``; 1 is legal in evaluation, where every advantage is then 0.
            step_rewards_BT: With ``process_advantages``, the reward of each step at its last token,
                shape ``(B, T)``, NaN elsewhere. The reward that gave them does not count as a
                reward of the whole completion then.

        Returns:
            Shape ``(B,)``; with steps ``(B, T)``: each token has the advantage of the completion by
            the other rewards, and that of its step by ``step_advantages``, times its weight.
        """
        if group_size == 1:
            return torch.zeros_like(rewards_BR[:, 0])
        clip = self.options.advantage_clip
        if step_rewards_BT is None:
            return self._whole_advantages(rewards_BR, group_size, clip=clip)
        steps_BT = step_advantages(
            self.counting_steps(step_rewards_BT, rewards_BR),
            group_size=group_size,
            baseline=self.options.step_baseline,
            scale=cast(RewardScale, self.scale_rewards),
            eps=self.options.advantage_eps,
        )
        whole_B = self._whole_advantages(rewards_BR, group_size, clip=None)
        advantages_BT = whole_B[:, None] + self.reward_weights[self.process_reward] * steps_BT
        return advantages_BT if clip is None else advantages_BT.clamp(-clip, clip)

    def _whole_advantages(
        self, rewards_BR: Tensor, group_size: int, *, clip: float | None
    ) -> Tensor:
        """The advantages by the rewards of whole completions; 0 if there are none."""
        whole = self.whole_rewards
        if not whole:
            return torch.zeros_like(rewards_BR[:, 0])
        return multi_reward_advantages(
            self.counting_rewards(rewards_BR)[:, whole],
            group_size=group_size,
            weights_R=self.reward_weights[whole].to(rewards_BR.device),
            aggregation=cast(RewardAggregation, self.multi_objective_aggregation),
            baseline=self.options.advantage_baseline,
            scale=cast(RewardScale, self.scale_rewards),
            eps=self.options.advantage_eps,
            clip=clip,
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


def _reward_problems(arguments: dict[str, Any], options: ExtensionOptions) -> Iterator[str]:
    given = arguments.get("reward_funcs")
    rewards = given if isinstance(given, list) else [] if given is None else [given]
    yield from process_advantage_problems(rewards, args=arguments["args"], given=arguments)
    names = list(map(_reward_name, rewards))
    yield from _shared_name_problems(rewards, names, options)
    if not arguments.get("environment_factory"):  # which TRL makes further rewards of
        yield from unknown_reward_problems(options.reward_gates, options.reward_clip, names=names)


def _shared_name_problems(
    rewards: list[Any], names: list[str], options: ExtensionOptions
) -> Iterator[str]:
    """Yield names of several rewards by which one of them would have to be told."""
    told = {name for reward, name in zip(rewards, names, strict=True) if remembers(reward)}
    told |= {*(options.reward_gates or ()), *(options.reward_clip or ())}
    for name, count in Counter(names).items():
        if count > 1 and name in told:
            yield (
                f"{count} rewards are called {name!r}, so what one of them remembers, or what "
                "`reward_gates` and `reward_clip` say of it, cannot be told from the others. Give "
                "each a name: built-in ones take `log_as`, your own set `__name__`."
            )


def _reward_name(reward: Any) -> str:
    """Return the name under which TRL logs a reward: a function, a model, or a model's path."""
    path = getattr(getattr(reward, "config", None), "_name_or_path", reward)
    return path.rsplit("/")[-1] if isinstance(path, str) else log_name(reward)


def _check_before_loading(arguments: dict[str, Any]) -> None:
    """Refuse, before a model loads, what cannot work."""
    args = arguments.get("args")
    if args is None:
        return
    problems = list(configuration_problems(args))
    peft = arguments.get("peft_config") is not None or hasattr(arguments["model"], "peft_config")
    options = ExtensionOptions.of(args)
    problems += _reward_problems(arguments, options)
    if not peft and options.reference == "adapter":
        problems.append(
            "`reference` is 'adapter', but the policy has none to switch off. Pass a "
            "`peft_config`, or set `reference: auto`."
        )
    if peft and options.reference not in ("auto", "none", "adapter") and args.beta != 0.0:
        problems.append(
            f"`reference` is {options.reference!r}, but the policy is a PEFT model: "
            "with its adapter switched off it is its own exact reference, at no memory. "
            "Remove `reference`, or set `reference: auto`."
        )
    quantized = arguments.get("quantization_config") is not None
    if quantized and options.reference not in ("auto", "adapter"):
        problems.append(
            f"`reference` is {options.reference!r}, but the policy is loaded quantized "
            "(`quantization_config`, `load_in_4bit`). Remove `reference`, or set it to auto."
        )
    if problems:
        raise ConfigurationError(problems)
