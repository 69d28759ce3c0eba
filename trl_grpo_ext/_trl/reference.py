"""TRL's trainer with a reference of this package in the place of its own."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer import grpo_trainer
from trl.trainer.callbacks import SyncRefModelCallback

from trl_grpo_ext._trl.logprobs import LogprobSeams
from trl_grpo_ext.layerwise import decoder_layers, run_layerwise
from trl_grpo_ext.reference.keeper import ReferenceKeeper
from trl_grpo_ext.reference.layer_stream import streamed_layers
from trl_grpo_ext.sampling.gathered import gathered_weights


class ReferenceSeams(LogprobSeams):
    """``trl.GRPOTrainer`` whose reference is built from the live policy and kept on disk."""

    reference_keeper: ReferenceKeeper | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.reference_keeper = None
        with _reference_from(self):
            super().__init__(*args, **kwargs)
        self._keep_reference()

    def _keep_reference(self) -> None:
        if self.reference_keeper is None:
            return
        self.remove_callback(SyncRefModelCallback)
        self.add_callback(ReferenceCallback(self))

    def log_fidelity(self) -> None:
        """Have the next log say how faithful the reference is."""
        fidelity = None if self.reference_keeper is None else self.reference_keeper.fidelity
        for name, value in ({} if fidelity is None else fidelity.metrics()).items():
            self._metrics["train"][name].append(value)

    def make_reference(self, policy: PreTrainedModel) -> nn.Module | None:
        """Return the frozen reference for this policy, or ``None`` to have TRL load its own."""
        return None

    def load_reference(self, *args: Any, **kwargs: Any) -> Any:
        """Return the reference model: the hook's, or TRL's own."""
        reference = self.make_reference(self.model) if self.extended else None
        return (
            grpo_trainer.create_model_from_path(*args, **kwargs) if reference is None else reference
        )

    @property
    def bare_reference(self) -> PreTrainedModel:
        """The reference model below the wrappers of accelerate."""
        return self._causal_lm(cast(nn.Module, self.ref_model))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,  # noqa: FBT001 - transformers' signature
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Train; a resumed run has the reference that it started with."""
        if self.reference_keeper is not None and isinstance(resume_from_checkpoint, str):
            self.reference_keeper.resume(Path(resume_from_checkpoint), self.bare_reference)
        self.log_fidelity()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Note in each checkpoint which reference it goes with."""
        super()._save_checkpoint(model, trial)
        if self.reference_keeper is not None and self.is_world_process_zero():
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            self.reference_keeper.note_in(folder, self.bare_reference)

    def prune_references(self, run_dir: Path) -> None:
        """Remove the saved references that no checkpoint of the run goes with any more."""
        if self.reference_keeper is not None and self.is_world_process_zero():
            self.reference_keeper.prune(run_dir)

    def _shared_prefix_logprobs(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *args: Any, **kw: Any
    ) -> Any:
        """Have the micro-batches of a streamed model go through it in step, layer by layer."""
        inner = self._causal_lm(model)
        compute = functools.partial(super()._shared_prefix_logprobs, model)
        size = kw.get("batch_size")
        in_step = size and len(input_ids) > size and streamed_layers(inner)
        if not in_step or self._checks_prefix(inner, input_ids.shape[1], **kw):
            return compute(input_ids, attention_mask, *args, **kw)
        parts = zip(input_ids.split(size), attention_mask.split(size), strict=True)
        passes = [functools.partial(compute, *part, *args, **kw) for part in parts]
        with gathered_weights(inner):  # FSDP2 would free embedding and head after the first pass
            found = run_layerwise(list(decoder_layers(inner)), passes)
        return tuple(
            None if values[0] is None else torch.cat(values) for values in zip(*found, strict=True)
        )

    def _checks_prefix(self, model: PreTrainedModel, longest: int, **kwargs: Any) -> bool:
        """Whether this pass also is compared with padded rows, which is done on the whole batch."""
        unknown = self.shared_prefix.needs_check(model)
        return unknown and self._shares_prefix(model, longest, **kwargs)


class ReferenceCallback(TrainerCallback):
    """Moves the reference where ``sync_ref_model`` asks for it."""

    def __init__(self, trainer: ReferenceSeams) -> None:
        self._trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the reference, as TRL's callback does for its own."""
        trainer, keeper = self._trainer, self._trainer.reference_keeper
        if keeper is None or not trainer.args.sync_ref_model:
            return
        if state.global_step % trainer.args.ref_model_sync_steps == 0:
            with trainer.accelerator.main_process_first():
                keeper.sync(
                    trainer.bare_reference,
                    trainer._causal_lm(trainer.model),
                    alpha=trainer.args.ref_model_mixup_alpha,
                )
            if keeper.settings.kind == "quantized":
                trainer.log_fidelity()


@contextmanager
def _reference_from(trainer: ReferenceSeams) -> Iterator[None]:
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
