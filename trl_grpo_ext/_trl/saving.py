"""TRL's trainer whose checkpoints are whole before they have a name."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from trl_grpo_ext._trl.hub import HubSeams
from trl_grpo_ext.checkpointing import (
    LAST_GOOD,
    UNFINISHED,
    finish_checkpoint,
    remove_unfinished,
    rotate,
)
from trl_grpo_ext.errors import CheckpointError

_NEARLY_NOTHING = 1e6  # [bytes]


class SavingSeams(HubSeams):
    """``trl.GRPOTrainer`` that writes checkpoints aside, and names, pushes and rotates them after.

    Attributes:
        last_saved_step: Optimizer steps of the last checkpoint of this run.
    """

    last_saved_step: int | None = None
    _saving_to: Path | None = None

    def save_run_state(self, folder: Path) -> None:
        """Write to the checkpoint what a resumed run needs beyond what transformers saves."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_to or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Have transformers write a checkpoint aside, and give it its name when it is whole.

        Pushing and rotating, which transformers does inside its own save, come after that.
        """
        if not self.extended:
            super()._save_checkpoint(model, trial)
            return
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._saving_to = run_dir / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
            self._finish(self._saving_to / name, run_dir / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.args.should_save:
                remove_unfinished(run_dir)
            raise CheckpointError(_unwritten(run_dir / name, error)) from error
        finally:
            self._saving_to = None
        self.last_saved_step = self.state.global_step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate(run_dir, limit=limit, best=best)
        self.prune_references(run_dir)

    def _finish(self, folder: Path, final: Path) -> None:
        if not self.args.save_only_model:
            self.save_run_state(folder)
        if self.state.best_model_checkpoint == str(folder):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish_checkpoint(folder, final)
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving_to is None:
            super()._push_from_checkpoint(checkpoint_folder)


def _unwritten(checkpoint: Path, error: Exception) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    there = checkpoint.parent if checkpoint.parent.is_dir() else Path.cwd()
    free = shutil.disk_usage(there).free
    said = (str(error).splitlines() or [type(error).__name__])[0]
    why = "the disk is full" if full or free < _NEARLY_NOTHING else said
    return (
        f"{checkpoint} could not be written: {why}. What was written of it is removed, and earlier "
        f"checkpoints are untouched. Make room ({free / 1e9:.2f} GB are free; `save_total_limit` "
        f"bounds the checkpoints), and go on with `resume_from_checkpoint: {LAST_GOOD}`."
    )
