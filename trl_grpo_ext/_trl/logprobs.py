"""TRL's trainer with log-probabilities for which a prompt is computed once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging
from trl.trainer import grpo_trainer

from trl_grpo_ext._trl.sampling import SamplingSeams
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
from trl_grpo_ext.sampling import Completion

logger = logging.get_logger(__name__)


class LogprobSeams(SamplingSeams):
    """``trl.GRPOTrainer`` whose log-probabilities share prompts where that is exact."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._policy_logprobs: Tensor | None = None
        self._checks_sampler = True  # the first log-probabilities that it kept
        self._sampler_problem: str | None = None
        self._told_recompute = False
        self._keep_policy_logprobs = False
        self.shared_prefix = SharedPrefix()
        super().__init__(*args, **kwargs)

    def can_reuse_logprobs(self, sampled: list[Completion]) -> bool:
        """Return whether the sampler's log-probabilities stand in for those of the old policy."""
        return False

    def tell_recomputed(self, reason: str) -> None:
        """Say once why a pass computes the log-probabilities of the old policy."""
        if not self._told_recompute:
            self._told_recompute = True
            logger.warning(f"log-probabilities of the old policy are recomputed: {reason}")

    # Log-probabilities ----------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not (self.extended and self.shared_prefix.mode != "never"):
            return super()._prepare_inputs(generation_batch)
        shuffle = grpo_trainer.shuffle_sequence_dict
        grpo_trainer.shuffle_sequence_dict = functools.partial(
            _shuffle_groups,
            group_size=cast(int, self.num_generations),
            micro_batch_size=self.args.per_device_train_batch_size,
        )
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
                result = self._sampled_logprobs(model, *batch, **kwargs)
                if result is None:
                    result = self._shared_prefix_logprobs(model, *batch, **kwargs)
        if self._keep_policy_logprobs:
            self._policy_logprobs = result[0]
        return result

    def _sampled_logprobs(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        **kwargs: Any,
    ) -> tuple[Tensor, None, None] | None:
        """Log-probabilities of the old policy, if TRL wants them and the sampler kept them."""
        sampled, self._sampled = self._sampled, None
        awaited, self._awaits_old_logprobs = self._awaits_old_logprobs, False
        generate_every = cast(int, self.args.steps_per_generation) * self.num_iterations
        if not awaited or self.args.gradient_accumulation_steps % generate_every == 0:
            return None
        if sampled is None:
            if self.extended and self.options.old_logprobs == "sampler":
                self.tell_recomputed("the engine kept none of these completions")
            return None
        if not self.can_reuse_logprobs(sampled):
            return None
        mask_BT = attention_mask[:, -logits_to_keep:]
        logprobs_BT = torch.zeros(mask_BT.shape)
        for row, completion in enumerate(sampled):
            logprobs_BT[row, : len(completion.ids)] = torch.tensor(completion.policy_logprobs)
        logprobs_BT = logprobs_BT.to(mask_BT.device) * mask_BT
        if self._checks_sampler and self.shared_prefix.verify:
            rows = _rows_to_check(mask_BT)
            options = kwargs | {"batch_size": None}
            expected = self._shared_prefix_logprobs(
                model, input_ids[rows], attention_mask[rows], logits_to_keep, **options
            )[0]
            self._judge_sampler(logprobs_BT[rows], expected, mask_BT[rows])
            if not self.can_reuse_logprobs(sampled):
                return None
        return logprobs_BT, None, None

    def _judge_sampler(self, found_BT: Tensor, expected_BT: Tensor, mask_BT: Tensor) -> None:
        """Note on every process whether what the sampler kept is what a forward pass gives."""
        difference, tolerance = difference_in_nats(
            found_BT, expected_BT, mask_BT, half_precision=False
        )
        worst, most_tokens = self._largest(difference, float(mask_BT.sum()))
        self._checks_sampler = most_tokens == 0  # all truncated, and masked: then the next batch
        if worst > tolerance:
            self._sampler_problem = f"the sampler's differ by {worst:.2g} nats on the first batch"

    def _largest(self, *values: float) -> list[float]:
        """Return the largest of each value over all processes."""
        local = torch.tensor(values, device=self.accelerator.device)
        largest: list[float] = self.accelerator.gather(local).view(-1, len(values)).amax(0).tolist()
        return largest

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
        try:
            return self._packed_statistics(model, groups, compute_entropy=compute_entropy)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if groups.attended.count:
                raise
            raise SharedPrefixError(
                f"{type(self._causal_lm(model)).__name__} does not hand `shared_prefix` on to its "
                "attention. Set `shared_prefix: never`."
            ) from error

    def _packed_statistics(
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
            longest = int(self._largest(longest)[0])
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
        if model.training and self.args.neftune_noise_alpha is not None:
            return "`neftune_noise_alpha` adds noise to each place of a row"
        if model.training and has_dropout(model):
            return (
                "it has dropout (`disable_dropout: true` switches modules of dropout off; a rate "
                "in the configuration, such as `attention_dropout`, must be 0 there)"
            )
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
            failed = ""
            try:
                found = shared(input_ids, attention_mask)[0]
            except SharedPrefixError as error:  # of the model's code, so on every process
                return self.shared_prefix.refuse(model, str(error))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:  # of a kernel of this device
                failed = f"its first batch failed so ({type(error).__name__}: {error})"
                found = torch.full_like(expected, torch.inf)
        mask_BT = attention_mask[:, -found.shape[1] :]
        half = self.accelerator.mixed_precision != "no" or model.dtype != torch.float32
        difference, tolerance = difference_in_nats(found, expected, mask_BT, half_precision=half)
        worst, most_tokens = self._largest(difference, float(mask_BT.sum()))
        if not most_tokens:  # all truncated, and masked: the next batch is compared
            return True
        if failed:
            return self.shared_prefix.refuse(model, failed)
        return self.shared_prefix.judge(model, worst, tolerance=tolerance)


def _rows_to_check(mask_BT: Tensor) -> list[int]:
    """The first two completions that have tokens, and the last two; one row if none has."""
    rows = mask_BT.any(dim=1).nonzero()[:, 0].tolist() or [0]
    return sorted({*rows[:2], *rows[-2:]})


def _shuffle_groups(
    batch: dict[str, Any], *, group_size: int, micro_batch_size: int
) -> dict[str, Any]:
    """Shuffle groups as TRL does rows, so that a micro-batch is of as few prompts as can be.

    A group that is a multiple of a micro-batch is shuffled in pieces of that size. Values without
    rows stay as they are.
    """
    num_rows = len(batch["advantages"])
    in_pieces = group_size % micro_batch_size == 0
    unit = math.gcd(group_size, micro_batch_size if in_pieces else num_rows)
    rows = torch.randperm(num_rows // unit)[:, None] * unit + torch.arange(unit)

    def shuffled(value: Any) -> Any:
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            return value
        if isinstance(value, Tensor):
            return value[rows.flatten().to(value.device)]
        return [value[row] for row in rows.flatten()]

    return {key: shuffled(value) for key, value in batch.items()}
