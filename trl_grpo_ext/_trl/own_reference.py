"""TRL's trainer with the reference that the options ask for: chosen, built and kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from trl_grpo_ext._trl.kept_reference import KeptReference
from trl_grpo_ext.checkpointing import newest_checkpoint
from trl_grpo_ext.cpu_linear import use_onednn
from trl_grpo_ext.errors import ConfigurationError, ReferenceModelError
from trl_grpo_ext.memory import ReferenceChoice, RunSettings
from trl_grpo_ext.memory.settings import Sharding
from trl_grpo_ext.reference import KLPenalty
from trl_grpo_ext.reference.choice import choose_kind
from trl_grpo_ext.reference.keeper import ReferenceKeeper
from trl_grpo_ext.reference.options import ReferenceKind, ReferenceSettings, reference_problems
from trl_grpo_ext.reference.sampling import (
    CalibrationSampler,
    different_prompts,
)
from trl_grpo_ext.reference.sharing import of_main
from trl_grpo_ext.reference.store import FOLDER, ReferenceNote, ReferenceStore, noted
from trl_grpo_ext.reference.whole import blueprint, is_partitioned, whole_policy

logger = logging.get_logger(__name__)

_MAX_COMPLETION = 256  # [tokens] that a reference is calibrated on


class OwnReference(KeptReference):
    """``trl.GRPOTrainer`` with a reference of this package.

    Attributes:
        reference_kind: What the KL is measured against.
        reference_reason: Why.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.reference_kind: ReferenceKind = "resident"
        self.reference_reason = "TRL's own, `extensions` is false"
        super().__init__(*args, **kwargs)
        if self.beta == 0.0:
            self._tell_reference("none", "`beta` is 0")
        elif hasattr(self.model, "peft_config"):
            self._tell_reference("adapter", "switched off, the policy is its own exact reference")

    @property
    def reference_source(self) -> str:
        """What the KL is measured against, so that a resumed run can compare."""
        if self.ref_model is None:
            return self.reference_kind
        source = f"{self.reference_kind}, loaded from {self.reference_path}"
        return source + " as it is now" * self._reference_is_another

    def make_reference(self, policy: PreTrainedModel) -> nn.Module | None:
        """Return the frozen reference that ``reference`` asks for; ``None`` for TRL's own."""
        choice = self._choose_reference(policy)
        kind = choice.kind
        self._tell_reference(kind, choice.reason)
        self._check_sync(kind)
        copies = choice.saved or self._copies(policy)
        if self.options.reference == "auto" and kind == "resident" and not copies:
            return None
        on_cpu = self.accelerator.device.type == "cpu"
        if on_cpu and self.runs_onednn:
            use_onednn(policy)
        samples = kind == "quantized" and not self.reads_images
        sampler = self._calibration_sampler() if samples else None
        settings = ReferenceSettings.of(self.options, kind=kind)
        settings = dataclasses.replace(settings, on_disk=choice.on_disk)
        keeper = ReferenceKeeper(
            settings,
            sample=sampler,
            drawn_from="" if sampler is None else sampler.identity,
            penalty=KLPenalty(
                self.options.kl_estimator,
                clamp=self.options.kl_clamp,
                bias_correction=self.args.use_bias_correction_kl,
                temperature=self.args.temperature,
            ),
            store=self._reference_store(settings),
            onednn=on_cpu and self.runs_onednn,
            progress=not self.args.disable_tqdm and self.is_local_process_zero(),
        )
        if self.shards_weights and self.args.sync_ref_model:
            self.plan = blueprint(policy)
        if is_partitioned(policy):
            policy = whole_policy(policy, blueprint(policy))
        self.check_resumable(keeper)
        reference = self.build_reference(keeper, policy)
        self.reference_keeper = keeper
        return reference

    def _copies(self, policy: PreTrainedModel) -> bool:
        """Whether ``auto`` copies the policy: TRL cannot load it again, or would not save its own.

        TRL does not save what ``sync_ref_model`` has moved, so that a resume would not have it.
        """
        if self.reads_images or is_partitioned(policy):
            return False
        return not policy.name_or_path or (self.args.sync_ref_model and not self.uses_fsdp1)

    def _tell_reference(self, kind: ReferenceKind, reason: str) -> None:
        self.reference_kind, self.reference_reason = kind, reason
        logger.info(f"reference: {kind} ({reason})")

    def _choose_reference(self, policy: PreTrainedModel) -> ReferenceChoice:
        on_disk = self.options.reference_on_disk
        if self.options.reference != "auto":
            return ReferenceChoice(self.options.reference, "as asked", bool(on_disk))
        if self.reads_images:
            return ReferenceChoice("resident", "TRL's own, which reads images too")
        if self.shards_weights and not self._has_whole(policy):
            return ReferenceChoice("resident", "each process holds a part of it")
        allowed = on_disk is not False and not self.args.sync_ref_model  # which writes it anew
        choice = choose_kind(
            policy,
            self._run_settings(policy),
            device=self.accelerator.device,
            disk=self._reference_folder if on_disk or allowed else None,
            in_host_memory=not on_disk,
        )
        # Free memory differs between processes, and all must go the same way.
        return cast(ReferenceChoice, of_main(self._begun_with(policy) or choice))

    def _begun_with(self, policy: PreTrainedModel) -> ReferenceChoice | None:
        """What ``auto`` was for the run whose checkpoints lie here, which may be resumed."""
        folder = Path(str(self.args.output_dir))
        last = newest_checkpoint(folder)
        try:
            found = ReferenceNote() if last is None else noted(last)
        except ReferenceModelError:  # damaged: of interest only when it is resumed
            return None
        path = str(policy.name_or_path)
        same = found.path is not None and _is_same(found.path, path)
        if found.kind is None or not (same or _is_same(Path(path).parent, folder)):
            return None
        reason = f"as for {last}; an empty `output_dir` has it chosen anew"
        asked = self.options.reference_on_disk
        on_disk = found.on_disk if asked is None else asked and found.kind == "streamed"
        return ReferenceChoice(cast(Any, found.kind), reason, on_disk, found.key is not None)

    def _has_whole(self, policy: PreTrainedModel) -> bool:
        """Whether each process has all weights now, and could follow them once they are split."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        loads_once = plugin is not None and bool(plugin.cpu_ram_efficient_loading)
        return not (self.uses_fsdp1 or loads_once or is_partitioned(policy))

    def _check_sync(self, kind: ReferenceKind) -> None:
        """Refuse what the options alone do not tell: what `auto` came to, and how weights lie."""
        args = self.args
        options = dataclasses.replace(self.options, reference=kind)
        problems = list(
            reference_problems(
                options,
                beta=args.beta,
                mixes=args.sync_ref_model,
                mixup_alpha=args.ref_model_mixup_alpha,
            )
        )
        if args.sync_ref_model and kind in ("streamed", "quantized") and self.uses_fsdp1:
            problems.append(
                f"`sync_ref_model` is true and `reference` is {kind!r}, but FSDP1 flattens the "
                "policy's weights, so that it cannot move towards them. Use FSDP2, or set "
                "`sync_ref_model: false`, or `reference: auto`."
            )
        if problems:
            raise ConfigurationError(problems)

    @property
    def _reference_folder(self) -> Path:
        return Path(str(self.args.output_dir)) / FOLDER

    def _reference_store(self, settings: ReferenceSettings) -> ReferenceStore | None:
        """Where the reference is saved: for a resume, for other processes, or to be read there."""
        saves = self.args.save_strategy != "no"
        if settings.kind == "quantized":
            saves = saves or self.accelerator.num_processes > 1
        elif self.uses_fsdp1:  # it flattens weights, so that they cannot be gathered one by one
            saves = False
        return ReferenceStore(self._reference_folder) if saves or settings.on_disk else None

    def _run_settings(self, policy: PreTrainedModel) -> RunSettings:
        """What the planner must know of this run; a prompt is taken to have its 512 tokens."""
        args = self.args
        half = policy.dtype != torch.float32
        return RunSettings(
            num_gpus=self.accelerator.num_processes,
            dtype="bfloat16" if half else "mixed" if args.bf16 or args.fp16 else "float32",
            optimizer="adamw_8bit" if "8bit" in str(args.optim) else "adamw",
            sharding=self._sharding,
            gradient_checkpointing=bool(args.gradient_checkpointing),
            micro_batch=args.per_device_train_batch_size,
            num_generations=cast(int, args.num_generations),
            generation_batch=args.per_device_train_batch_size
            * cast(int, args.steps_per_generation),
            completion_tokens=args.max_completion_length or 256,
            reward_parameters=sum(
                parameter.numel()
                for reward in self.reward_funcs
                if isinstance(reward, nn.Module)
                for parameter in reward.parameters()
            ),
        )

    @property
    def _sharding(self) -> Sharding:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None:
            stages: tuple[Sharding, ...] = ("none", "zero1", "zero2", "zero3")
            return stages[int(plugin.zero_stage)]
        return "fsdp" if self.is_fsdp_enabled else "none"

    def _calibration_sampler(self) -> CalibrationSampler:
        args, settings = self.args, ReferenceSettings.of(self.options, kind="quantized")
        return CalibrationSampler(
            tokenizer=cast(PreTrainedTokenizerBase, self.processing_class),
            prompts=different_prompts(self.train_dataset),
            num_tokens=0 if settings.compensation == "none" else settings.calibration_tokens,
            max_new_tokens=min(args.max_completion_length or _MAX_COMPLETION, _MAX_COMPLETION),
            seed=args.seed,
            sampling={
                "temperature": args.temperature,
                "top_p": args.top_p,
                "top_k": args.top_k,
                "min_p": args.min_p,
                "repetition_penalty": args.repetition_penalty,
                "chat_template_kwargs": args.chat_template_kwargs,
            },
            progress=not args.disable_tqdm and self.is_local_process_zero(),
        )


def _is_same(one: str | Path, other: str | Path) -> bool:
    """Whether two names of models, or of folders, mean the same."""
    return Path(one).resolve() == Path(other).resolve()
