"""TRL's GRPO trainer with the steps of the algorithm as public methods to override.

Nothing of TRL is copied: each private method is wrapped, calls ``super()``, and hands what it found
to a hook with a public name. A hook that is not overridden leaves TRL's own result untouched.
"""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer import grpo_trainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from trl_grpo_ext._trl.contract import check_contract
from trl_grpo_ext.attention import changing_angles, sliding_window
from trl_grpo_ext.cpu_linear import OneDNNLinear
from trl_grpo_ext.errors import SharedPrefixError
from trl_grpo_ext.logprobs import (
    LOGITS_LIMIT_BYTES,
    PackedGroups,
    SharedPrefix,
    difference_in_nats,
    has_dropout,
    shared_prefix_logprobs,
    token_statistics,
)
from trl_grpo_ext.losses import LOSS_TYPE_REDUCTIONS, ImportanceLevel, LossReduction
from trl_grpo_ext.sampling import Completion, CompletionKey

check_contract()


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


class SeamedGRPOTrainer(GRPOTrainer):
    """``trl.GRPOTrainer`` with public hooks: completions, rewards, advantages, KL and reference.

    Log-probabilities go through :attr:`shared_prefix` where that is exact.
    """

    args: GRPOConfig
    model: PreTrainedModel
    _logs: dict[str, Any]
    _tag_names = [*GRPOTrainer._tag_names, "trl-grpo-ext"]  # noqa: RUF012 - as in TRL

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._phase_seconds: dict[str, float] = defaultdict(float)
        self._policy_logprobs: Tensor | None = None
        self._keep_policy_logprobs = False
        self._rewards_per_func: Tensor | None = None
        self._num_non_finite: list[int] = []
        self._sampled: list[Completion] | None = None
        self._num_evaluated = 0
        self.shared_prefix = SharedPrefix()
        with _reference_from(self):
            super().__init__(*args, **kwargs)

    # Hooks: what a subclass overrides -------------------------------------------------------------

    @property
    def extended(self) -> bool:
        """Whether the hooks are used at all; if not, TRL's code runs untouched."""
        return True

    @property
    def reads_images(self) -> bool:
        """Whether the policy takes more than text."""
        return bool(self._is_vlm)

    @property
    def learns_prompts(self) -> bool:
        """Whether the policy has an adapter that puts virtual tokens before the prompt."""
        adapter = getattr(self.model, "active_peft_config", None)
        return adapter is not None and bool(adapter.is_prompt_learning)

    @property
    def policy_dtype(self) -> torch.dtype:
        """Of the policy's weights."""
        return self._causal_lm(self.model).dtype

    @property
    def shards_weights(self) -> bool:
        """Whether no process holds all weights."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    def make_reference(self, policy: PreTrainedModel) -> nn.Module | None:
        """Return the frozen reference for this policy, or ``None`` to have TRL load its own."""
        return None

    def sample_completions(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        keys: list[CompletionKey],
        step: int,
    ) -> list[Completion]:
        """Return one completion a prompt, if :attr:`samples_itself`.

        Args:
            model: The policy, unwrapped.
            prompts: Token ids, each prompt as often as it has completions.
            keys: What the random numbers of each completion depend on.
            step: Number of the generation; 0 in evaluation, so that evaluations are comparable.
        """
        raise NotImplementedError

    @property
    def samples_itself(self) -> bool:
        """Whether :meth:`sample_completions` takes TRL's place."""
        return False

    def can_reuse_logprobs(self, sampled: list[Completion]) -> bool:
        """Return whether the sampler's log-probabilities stand in for those of the old policy."""
        return False

    def checked_reward(
        self, reward_func: Callable[..., Any], name: str, count_non_finite: Callable[[int], None]
    ) -> Callable[..., Any]:
        """Return the reward function that TRL calls in the place of ``reward_func``.

        It reports to ``count_non_finite`` how many of its scores were not finite.
        """
        return reward_func

    def compute_advantages(self, rewards_BR: Tensor, group_size: int) -> Tensor | None:
        """Return the advantages, shape ``(B,)``; ``None`` keeps TRL's."""
        return None

    @property
    def replaces_kl(self) -> bool:
        """Whether :meth:`compute_kl` stands in for TRL's KL penalty."""
        return False

    def compute_kl(self, inputs: KLInputs) -> tuple[Tensor, Tensor]:
        """Return the KL penalty to add to the loss, and each token's KL in nats, ``(B, T)``."""
        raise NotImplementedError

    # Reference ------------------------------------------------------------------------------------

    def load_reference(self, *args: Any, **kwargs: Any) -> Any:
        """Return the reference model: the hook's, or TRL's own."""
        reference = self.make_reference(self.model) if self.extended else None
        return (
            grpo_trainer.create_model_from_path(*args, **kwargs) if reference is None else reference
        )

    # Sampling and rewards -------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self._sampled = None
        with self._phase("generation"):
            output = super()._generate(*args, **kwargs)
        self._forget_if_changed(output[1])
        return output

    def _forget_if_changed(self, completion_ids: list[list[int]]) -> None:
        """A rollout function may have changed what was sampled."""
        if self._sampled is not None and completion_ids != [row.ids for row in self._sampled]:
            self._sampled = None

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if not (self.extended and self.samples_itself):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        keys, step = self._completion_keys(len(prompt_ids))
        with self._generation_model() as model:
            self._sampled = self.sample_completions(model, prompt_ids, keys, step)
        return [completion.ids for completion in self._sampled], None

    @contextmanager
    def _generation_model(self) -> Iterator[PreTrainedModel]:
        """The policy as TRL prepares it for generation."""
        with (
            grpo_trainer.unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self._checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            yield cast(PreTrainedModel, model)

    @property
    def _checkpointing_kwargs(self) -> dict[str, Any] | None:
        return cast(dict[str, Any] | None, self.args.gradient_checkpointing_kwargs)

    def _completion_keys(self, num_local: int) -> tuple[list[CompletionKey], int]:
        """Place of this process's completions among those of all, and the generation's number."""
        accelerator = self.accelerator
        first = accelerator.process_index * num_local
        if self._mode == "train":
            group_size = cast(int, self.num_generations)
            accumulation = self.args.gradient_accumulation_steps
            step = 1 + self.state.global_step * accumulation + self._step % accumulation
        else:
            group_size, step = cast(int, self.num_generations_eval), 0
            first += self._num_evaluated
            self._num_evaluated += accelerator.num_processes * num_local
        rows = range(first, first + num_local)
        return [CompletionKey(row // group_size, row % group_size) for row in rows], step

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run TRL's loop; each evaluation gives its completions the same keys."""
        self._num_evaluated = 0
        return super().evaluation_loop(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.extended:
            return cast(Tensor, super()._calculate_rewards(*args, **kwargs))
        self._num_non_finite = [0] * len(self.reward_funcs)
        with self._phase("rewards"), self._checked_rewards():
            rewards_BR: Tensor = super()._calculate_rewards(*args, **kwargs)
        self._log_non_finite(rewards_BR)
        self._rewards_per_func = rewards_BR.masked_fill(rewards_BR.isinf(), torch.nan)
        return self._rewards_per_func

    @contextmanager
    def _checked_rewards(self) -> Iterator[None]:
        given = self.reward_funcs
        self.reward_funcs = [
            func
            if isinstance(func, nn.Module)
            else self.checked_reward(cast(Any, func), name, functools.partial(self._count, i))
            for i, (func, name) in enumerate(zip(given, self.reward_func_names, strict=True))
        ]
        try:
            yield
        finally:
            self.reward_funcs = given

    def _count(self, reward: int, num_non_finite: int) -> None:
        self._num_non_finite[reward] += num_non_finite

    def _log_non_finite(self, rewards_BR: Tensor) -> None:
        """Log how many scores of each reward were NaN or infinite, over all processes."""
        local = torch.tensor(self._num_non_finite, device=rewards_BR.device)
        by_function = self.accelerator.reduce(local, reduction="sum").tolist()
        by_model = (~rewards_BR.isfinite()).sum(dim=0).tolist()
        for i, (func, name) in enumerate(
            zip(self.reward_funcs, self.reward_func_names, strict=True)
        ):
            count = by_model[i] if isinstance(func, nn.Module) else by_function[i]
            self._metrics[self._mode][f"rewards/{name}/non_finite"].append(float(count))

    # Advantages -----------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        rewards_BR, self._rewards_per_func = self._rewards_per_func, None
        if not self.extended or rewards_BR is None:
            return output
        group_size = self.num_generations if self._mode == "train" else self.num_generations_eval
        advantages_B = self.compute_advantages(rewards_BR, cast(int, group_size))
        if advantages_B is not None:
            self._replace_advantages(output, advantages_B, cast(int, group_size))
        return output

    def _replace_advantages(
        self, output: dict[str, Any], advantages_B: Tensor, group_size: int
    ) -> None:
        num_local = len(output["advantages"])
        start = self.accelerator.process_index * num_local
        output["advantages"] = advantages_B[start : start + num_local].to(output["advantages"])
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages_B))):
            logged.pop()
        logged.extend(advantages_B.tolist())
        silent_P = (advantages_B.view(-1, group_size) == 0).all(dim=1)
        self._metrics[self._mode]["frac_reward_zero_std"][-1] = silent_P.float().mean().item()

    # Log-probabilities and loss -------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not (self.extended and self.shared_prefix.mode != "never"):
            return super()._prepare_inputs(generation_batch)
        shuffle = grpo_trainer.shuffle_sequence_dict
        unit = math.gcd(cast(int, self.num_generations), self.args.per_device_train_batch_size)
        grpo_trainer.shuffle_sequence_dict = functools.partial(_shuffle_groups, unit=unit)
        try:
            return super()._prepare_inputs(generation_batch)
        finally:
            grpo_trainer.shuffle_sequence_dict = shuffle

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        **kwargs: Any,
    ) -> Any:
        batch = (input_ids, attention_mask, logits_to_keep)
        if torch.is_grad_enabled():
            result = self._shared_prefix_logprobs(model, *batch, **kwargs)
        else:
            with self._phase("logprobs"):
                result = self._sampled_logprobs(attention_mask[:, -logits_to_keep:])
                if result is None:
                    result = self._shared_prefix_logprobs(model, *batch, **kwargs)
        if self._keep_policy_logprobs:
            self._policy_logprobs = result[0]
        return result

    def _sampled_logprobs(self, mask_BT: Tensor) -> tuple[Tensor, None, None] | None:
        """Log-probabilities of the old policy, if TRL wants them and the sampler kept them."""
        sampled, self._sampled = self._sampled, None
        generate_every = cast(int, self.args.steps_per_generation) * self.num_iterations
        wanted = self.args.gradient_accumulation_steps % generate_every != 0
        if sampled is None or not (wanted and self.can_reuse_logprobs(sampled)):
            return None
        logprobs_BT = torch.zeros(mask_BT.shape)
        for row, completion in enumerate(sampled):
            logprobs_BT[row, : len(completion.ids)] = torch.tensor(completion.policy_logprobs)
        return logprobs_BT.to(mask_BT.device) * mask_BT, None, None

    def _shared_prefix_logprobs(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return what TRL's method does, with each prompt computed once where that is exact."""
        padded = functools.partial(
            super()._get_per_token_logps_and_entropies,
            model,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        shared = functools.partial(
            shared_prefix_logprobs,
            functools.partial(self._packed_forward, model, compute_entropy=compute_entropy),
            num_labels=logits_to_keep,
        )
        inner = self._causal_lm(model)
        if self._shares_prefix(inner, input_ids.shape[1], **kwargs):
            rows = _rows_to_check(attention_mask[:, -logits_to_keep:])
            if not self.shared_prefix.needs_check(inner) or self._agree(
                inner, shared, padded, input_ids[rows], attention_mask[rows]
            ):
                # Tokens of a padded pass. Sharded weights need as many passes on each process.
                room = 0 if self.shards_weights else (batch_size or 0) * input_ids.shape[1]
                return (
                    *shared(input_ids, attention_mask, batch_size=batch_size, max_tokens=room),
                    None,
                )
        return padded(
            input_ids=input_ids,
            attention_mask=attention_mask,
            batch_size=batch_size,
            compute_entropy=compute_entropy,
        )

    def _packed_forward(
        self, model: nn.Module, groups: PackedGroups, *, compute_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self._keeps_logits(model, groups):
            logits_1LV = model(**groups.inputs).logits
            logprobs_L, entropies_L = token_statistics(
                logits_1LV[0], groups.labels_1L[0], temperature=self.temperature
            )
            return logprobs_L[None], entropies_L[None] if compute_entropy else None
        with self.accelerator.autocast():
            output = model(**groups.inputs, shift_labels=groups.labels_1L, fused_lm_head=True)
        return output.log_probs, output.entropy if compute_entropy else None

    def _keeps_logits(self, model: nn.Module, groups: PackedGroups) -> bool:
        """Whether the logits are kept for the backward pass: on a CPU, where that is faster."""
        head = self._causal_lm(model).get_output_embeddings()
        if self.shards_weights or self.accelerator.mixed_precision != "no":
            return False
        if not isinstance(head, OneDNNLinear):
            return False
        return 4 * groups.labels_1L.numel() * len(head.weight) <= LOGITS_LIMIT_BYTES

    def _shares_prefix(self, model: PreTrainedModel, longest: int, **kwargs: Any) -> bool:
        """Whether this pass can share prefixes; every process comes to the same answer."""
        if not self.extended:
            return False
        if sliding_window(model) is not None or any(changing_angles(model)):
            width = torch.tensor([longest], device=self.accelerator.device)
            longest = int(self.accelerator.gather(width).max())
        problem = self._sharing_problem(model, **kwargs)
        return self.shared_prefix.serves(model, longest=longest, problem=problem)

    def _sharing_problem(
        self, model: PreTrainedModel, *, compute_aux_loss: bool = False, **_: Any
    ) -> str | None:
        if compute_aux_loss:
            return (
                "its auxiliary loss counts every token of the padded batch "
                "(`router_aux_loss_coef: 0` switches it off)"
            )
        if self.reads_images:
            return "it reads images"
        if self.learns_prompts:
            return "its adapter adds virtual tokens"
        if self.args.torch_compile:
            return "`torch_compile` would compile it again for every batch"
        if model.training and has_dropout(model):
            return "it has dropout (`disable_dropout: true` switches it off)"
        return None

    def _agree(
        self,
        model: PreTrainedModel,
        shared: Callable[..., Any],
        padded: Callable[..., Any],
        input_ids: Tensor,
        attention_mask: Tensor,
    ) -> bool:
        """Whether both paths give these rows the same log-probabilities, on every process."""
        with (
            torch.no_grad(),
            grpo_trainer.disable_gradient_checkpointing(self.model, self._checkpointing_kwargs),
        ):
            expected = padded(input_ids=input_ids, attention_mask=attention_mask)[0]
            try:
                found = shared(input_ids, attention_mask)[0]
            except SharedPrefixError as error:  # of the model's code, so on every process
                return self.shared_prefix.refuse(model, str(error))
        mask_BT = attention_mask[:, -found.shape[1] :]
        half = self.accelerator.mixed_precision != "no" or model.dtype != torch.float32
        difference, tolerance = difference_in_nats(found, expected, mask_BT, half_precision=half)
        seen = torch.tensor([difference, float(mask_BT.sum())], device=self.accelerator.device)
        worst, most_tokens = self.accelerator.gather(seen).view(-1, 2).amax(dim=0).tolist()
        if not most_tokens:  # all truncated, and masked: the next batch is compared
            return True
        return self.shared_prefix.judge(model, worst, tolerance=tolerance)

    def _causal_lm(self, model: nn.Module) -> PreTrainedModel:
        """The model below the wrappers of accelerate and PEFT."""
        inner = self.accelerator.unwrap_model(model)
        return cast(
            PreTrainedModel, inner.get_base_model() if hasattr(inner, "peft_config") else inner
        )

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

    # Time a phase ---------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run TRL's step; at the end of an optimizer step, log the seconds that each phase took."""
        before, start = sum(self._phase_seconds.values()), time.perf_counter()
        loss: Tensor = super().training_step(*args, **kwargs)
        _wait_for_device()
        elsewhere = sum(self._phase_seconds.values()) - before
        self._phase_seconds["update"] += time.perf_counter() - start - elsewhere
        if self._step % self.current_gradient_accumulation_steps == 0:
            for phase, seconds in self._phase_seconds.items():
                if self.extended:
                    self._metrics["train"][f"time/{phase}"].append(seconds)
                self._phase_seconds[phase] = 0.0  # so that a step without it counts in the mean
        return loss

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Count the seconds spent inside towards phase ``name`` of the current optimizer step."""
        _wait_for_device()
        start = time.perf_counter()
        yield
        if self.extended and self._mode == "train":
            _wait_for_device()
            self._phase_seconds[name] += time.perf_counter() - start

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"


def _wait_for_device() -> None:
    """Wait for what was queued on the GPU, so that it counts where it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _rows_to_check(mask_BT: Tensor) -> list[int]:
    """The first two completions that have tokens, and the last two; one row if none has."""
    rows = mask_BT.any(dim=1).nonzero()[:, 0].tolist() or [0]
    return sorted({*rows[:2], *rows[-2:]})


def _shuffle_groups(batch: dict[str, Any], *, unit: int) -> dict[str, Any]:
    """Shuffle ``unit`` rows at a time, so that a micro-batch holds whole groups, as TRL does rows.

    Values without rows stay as they are.
    """
    num_rows = len(batch["advantages"])
    rows = torch.randperm(num_rows // unit)[:, None] * unit + torch.arange(unit)

    def shuffled(value: Any) -> Any:
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            return value
        if isinstance(value, Tensor):
            return value[rows.flatten().to(value.device)]
        return [value[row] for row in rows.flatten()]

    return {key: shuffled(value) for key, value in batch.items()}


@contextmanager
def _reference_from(trainer: SeamedGRPOTrainer) -> Iterator[None]:
    """While TRL constructs ``trainer``, let the trainer provide the reference model.

    TRL calls ``create_model_from_path`` for the policy before ``Trainer.__init__`` sets
    ``self.model``, and for the reference after it: that tells the two apart.
    """
    load = grpo_trainer.create_model_from_path

    @functools.wraps(load)
    def load_policy_or_reference(*args: Any, **kwargs: Any) -> Any:
        if "model" not in vars(trainer):
            return load(*args, **kwargs)
        grpo_trainer.create_model_from_path = load
        return trainer.load_reference(*args, **kwargs)

    grpo_trainer.create_model_from_path = load_policy_or_reference
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load
