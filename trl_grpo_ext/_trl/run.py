"""TRL's trainer with what the other seams ask about a run, and the seconds of its phases."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from trl_grpo_ext._trl.contract import check_contract
from trl_grpo_ext.config import ExtensionOptions

check_contract()


class RunSeams(GRPOTrainer):
    """``trl.GRPOTrainer`` that answers questions and logs ``time/*``."""

    args: GRPOConfig
    model: PreTrainedModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._phase_seconds: dict[str, float] = defaultdict(float)
        super().__init__(*args, **kwargs)

    @property
    def options(self) -> ExtensionOptions:
        """This package's options of the run."""
        return ExtensionOptions.of(self.args)

    @property
    def extended(self) -> bool:
        """Whether anything of this package is used (``extensions``)."""
        return self.options.extensions

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
    def runs_onednn(self) -> bool:
        """Whether float32 linear layers run in oneDNN on a CPU; the inductor has no code for it."""
        return self.options.onednn_linear and not self.args.torch_compile

    @property
    def shards_weights(self) -> bool:
        """Whether no process holds all weights."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    @property
    def uses_fsdp1(self) -> bool:
        """Whether FSDP flattens the weights, so that they cannot be told apart."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        return plugin is not None and plugin.fsdp_version == 1

    @property
    def _checkpointing_kwargs(self) -> dict[str, Any] | None:
        return cast(dict[str, Any] | None, self.args.gradient_checkpointing_kwargs)

    def _causal_lm(self, model: nn.Module) -> PreTrainedModel:
        """The model below the wrappers of accelerate and PEFT."""
        inner = self.accelerator.unwrap_model(model)
        return cast(
            PreTrainedModel, inner.get_base_model() if hasattr(inner, "peft_config") else inner
        )

    # Stop: nobody asks for it here ----------------------------------------------------------------

    def is_asked_to_stop(self) -> bool:
        """Return whether a signal asked this process to stop."""
        return False

    def stop_if_asked(self) -> None:
        """Leave the loop if any process was asked to stop; every process must call it."""

    # Time a phase ---------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run TRL's step; at the end of an optimizer step, log the seconds that each phase took."""
        if not self.extended:
            return cast(Tensor, super().training_step(*args, **kwargs))
        before, start = sum(self._phase_seconds.values()), time.perf_counter()
        loss: Tensor = super().training_step(*args, **kwargs)
        _wait_for_device()
        elsewhere = sum(self._phase_seconds.values()) - before
        self._phase_seconds["update"] += time.perf_counter() - start - elsewhere
        if self._step % self.current_gradient_accumulation_steps == 0:
            for phase, seconds in self._phase_seconds.items():
                self._metrics["train"][f"time/{phase}"].append(seconds)
                self._phase_seconds[phase] = 0.0  # so that a step without it counts in the mean
        return loss

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Count the seconds spent inside towards phase ``name`` of the current optimizer step."""
        if self.extended:
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
