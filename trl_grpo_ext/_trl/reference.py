"""TRL's trainer with a reference of this package in the place of its own."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
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
from trl_grpo_ext.reference.whole import near, whole_policy
from trl_grpo_ext.sampling.gathered import gathered_weights
from trl_grpo_ext.zero3 import without_zero3


class ReferenceSeams(LogprobSeams):
    """``trl.GRPOTrainer`` whose reference is built from the live policy."""

    reference_keeper: ReferenceKeeper | None
    plan: PreTrainedModel | None  # to gather a sharded policy by, where the reference follows it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.reference_keeper = self.plan = None
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

    def build_reference(self, keeper: ReferenceKeeper, policy: PreTrainedModel) -> PreTrainedModel:
        """Return the reference of a whole policy: the main process builds it, the others read it.

        Those that do not see its disk get it from there.
        """
        device = self.accelerator.device
        with near(policy, device):
            # First of all the main process, then the first one of each machine.
            together = self.accelerator
            with together.main_process_first(), together.local_main_process_first():
                reference = keeper.build(policy)
            keeper.share(reference, device=device)
        return reference

    def load_reference(self, *args: Any, **kwargs: Any) -> Any:
        """Return the reference model: the hook's, or TRL's own."""
        reference = self.make_reference(self.model) if self.extended else None
        return (
            grpo_trainer.create_model_from_path(*args, **kwargs) if reference is None else reference
        )

    def _policy_to_follow(self, keeper: ReferenceKeeper) -> PreTrainedModel:
        """The policy of this moment; whole, unless the reference is split as it is."""
        policy = self._causal_lm(self.model)
        if self.plan is None or keeper.settings.kind == "resident":
            return policy
        return whole_policy(policy, self.plan)

    @property
    def bare_reference(self) -> PreTrainedModel:
        """The reference model below the wrappers of accelerate."""
        return self._causal_lm(cast(nn.Module, self.ref_model))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the first log says how faithful the reference is."""
        self.log_fidelity()
        return super().train(*args, **kwargs)

    def move_reference(self, keeper: ReferenceKeeper) -> None:
        """Move the reference towards the policy of this moment, as ``sync_ref_model`` asks."""
        policy = self._policy_to_follow(keeper)
        if keeper.settings.kind == "quantized":
            keeper.take(self.build_reference(keeper, policy), into=self.bare_reference)
            self.log_fidelity()
        else:
            alpha = self.args.ref_model_mixup_alpha
            keeper.mix(self.bare_reference, policy, alpha=alpha)

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """Have TRL gather nothing of a reference that is whole on each process."""
        if not self._is_whole_reference(model):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        with without_zero3():
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _is_whole_reference(self, model: nn.Module) -> bool:
        """Whether it is a reference of ours that nothing splits."""
        keeper = self.reference_keeper if model is self.ref_model else None
        return keeper is not None and keeper.settings.kind != "resident"

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
            trainer.move_reference(keeper)


@contextmanager
def _reference_from(trainer: ReferenceSeams) -> Iterator[None]:
    """While TRL constructs ``trainer``, let the trainer provide the reference model.

    TRL calls ``create_model_from_path`` for the policy before ``Trainer.__init__`` sets
    ``self.model``, and for the reference after it: that tells the two apart. DeepSpeed gets a
    reference of ours as it is; ZeRO-3 would split what the quantized and the streamed kind keep
    whole.
    """
    load, prepare = grpo_trainer.create_model_from_path, grpo_trainer.prepare_deepspeed

    @functools.wraps(load)
    def load_policy_or_reference(*args: Any, **kwargs: Any) -> Any:
        if "model" not in vars(trainer):
            return load(*args, **kwargs)
        grpo_trainer.create_model_from_path = load
        return trainer.load_reference(*args, **kwargs)

    @functools.wraps(prepare)
    def prepare_model(model: nn.Module, accelerator: Accelerator) -> Any:
        if not trainer._is_whole_reference(model):
            return prepare(model, accelerator)
        with _without_zero(accelerator):
            return prepare(model, accelerator)

    grpo_trainer.create_model_from_path = load_policy_or_reference
    grpo_trainer.prepare_deepspeed = prepare_model
    try:
        yield
    finally:
        grpo_trainer.create_model_from_path = load
        grpo_trainer.prepare_deepspeed = prepare


@contextmanager
def _without_zero(accelerator: Accelerator) -> Iterator[None]:
    """While inside, what DeepSpeed gets to prepare stays whole on each process."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = config["zero_optimization"]
    config["zero_optimization"] = {"stage": 0}
    try:
        yield
    finally:
        config["zero_optimization"] = zero
