"""TRL's trainer that stops at a safe point when a signal asks it to, on all processes alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trl_grpo_ext._trl.saving import SavingSeams
from trl_grpo_ext.sampling import SamplingStopped
from trl_grpo_ext.signals import StopSignals


class StopRequested(BaseException):
    """The run leaves its loop, so that the state of the last optimizer boundary can be saved.

    Not an ``Exception``: a reward function that catches those must not hold it back.
    """


class StoppingSeams(SavingSeams):
    """``trl.GRPOTrainer`` with safe points: between tokens, micro-batches and phases of a step."""

    _signals: StopSignals | None = None
    _samples_in_step = False  # whether all processes sample now, and will agree on what comes next

    def is_asked_to_stop(self) -> bool:
        """Return whether a signal asked this process to stop."""
        return self._signals is not None and self._signals.received != 0

    def should_stop_sampling(self) -> bool:
        """Return whether sampling may end between two tokens, and is to."""
        return self._samples_in_step and self.is_asked_to_stop()

    def stop_if_asked(self) -> None:
        """Leave the loop if any process was asked to stop; every process must call it."""
        if self._signals is not None and self._anywhere(self.is_asked_to_stop())[0]:
            raise StopRequested

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run TRL's step, unless the run is to stop before it."""
        self.stop_if_asked()
        return super().training_step(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        # A rollout function may sample more often on one process than on another.
        if self._signals is None or not self.samples_itself or self.rollout_func is not None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self._samples_in_step = True
        try:
            result = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        except SamplingStopped:
            result = None
        finally:
            self._samples_in_step = False
        asked, cut_off = self._anywhere(self.is_asked_to_stop(), result is None)
        if not cut_off:
            self.keep_completions()
        if asked:
            raise StopRequested
        return result

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run TRL's step, unless the evaluation is to stop before it."""
        self.stop_if_asked()
        return super().prediction_step(*args, **kwargs)

    def between_batches(self) -> None:
        """Leave a greedy pass if any process was asked to stop."""
        self.stop_if_asked()

    def keep_completions(self) -> None:
        """Note what was sampled, so that a run that stops before it is scored has it."""

    def _anywhere(self, *flags: bool) -> list[bool]:
        """Whether each flag is true on any process."""
        if self.accelerator.num_processes == 1:
            return list(flags)
        local = torch.tensor(flags, dtype=torch.int32, device=self.accelerator.device)
        return [bool(count) for count in self.accelerator.reduce(local, reduction="sum").tolist()]
