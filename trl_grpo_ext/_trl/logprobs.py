"""TRL's trainer with our sampler, and log-probabilities for which a prompt is computed once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer import grpo_trainer

from trl_grpo_ext._trl.run import RunSeams
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
from trl_grpo_ext.sampling import Completion, CompletionKey


class LogprobSeams(RunSeams):
    """``trl.GRPOTrainer`` with hooks for the sampler.

    Log-probabilities go through :attr:`shared_prefix` where that is exact, else through TRL.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._policy_logprobs: Tensor | None = None
        self._keep_policy_logprobs = False
        self._sampled: list[Completion] | None = None
        self._num_evaluated = 0
        self.shared_prefix = SharedPrefix()
        super().__init__(*args, **kwargs)

    # Hooks: what a subclass overrides -------------------------------------------------------------

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

    # Sampling -------------------------------------------------------------------------------------

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

    # Log-probabilities ----------------------------------------------------------------------------

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
