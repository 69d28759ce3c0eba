"""TRL's trainer that can say where its run is, beyond transformers, and go back there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from transformers.utils import logging

from trl_grpo_ext._trl.stopping import StoppingSeams

logger = logging.get_logger(__name__)

_RUN_STATE = "run_state_{}.pt"  # of each process
_LOG_COLUMNS = ("prompt", "completion", "advantages")
_LOG_TABLES = ("rewards", "extra")
EXACT = 1e-9  # [epochs]
_COUNTS = ("num_skipped", "num_skipped_in_a_row")


class RunStateSeams(StoppingSeams):
    """``trl.GRPOTrainer`` with the state of its run as plain values.

    Attributes:
        epoch_ended_at: Optimizer steps at the last end of an epoch.
    """

    _buffered_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.epoch_ended_at: int | None = None
        self._last_rates: tuple[float | None, float | None] = (None, None)  # norm, learning rate
        super().__init__(*args, **kwargs)

    @property
    def run_state_name(self) -> str:
        """Of this process's file in a checkpoint."""
        return _RUN_STATE.format(self.accelerator.process_index)

    def _run_state(self) -> dict[str, Any]:
        """The run as it is, beyond what transformers saves, as values without classes."""
        return {
            "micro_step": self._step,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "logs": self._plain_logs(),
            "loss": self._tr_loss.detach().clone(),
            "last_logged": self._globalstep_last_logged,
            "num_tokens": self.state.num_input_tokens_seen,
            "flos": self.current_flos,
            "rates": self._last_rates,
            "epoch_ends": self._ends_epoch,
            "rewards": self.reward_states(),
        } | {name: getattr(self, name) for name in _COUNTS}

    @property
    def _ends_epoch(self) -> bool:
        """Whether the last step was the last one of its epoch, whose end is still to come."""
        epoch, step = self.state.epoch or 0.0, self.state.global_step
        return step > 0 and abs(epoch - round(epoch)) < EXACT and self.epoch_ended_at != step

    def _plain_logs(self) -> dict[str, Any]:
        if self.reads_images:
            return {}
        logs: dict[str, Any] = {name: list(self._logs[name]) for name in _LOG_COLUMNS}
        for name in _LOG_TABLES:
            logs[name] = {c: [_plain(v) for v in values] for c, values in self._logs[name].items()}
        return logs

    def _restore(self, state: dict[str, Any]) -> None:
        self._step = state["micro_step"]
        self._metrics["train"].clear()
        for name, values in state["metrics"].items():
            self._metrics["train"][name].extend(values)
        logs = state["logs"]
        for name in _LOG_COLUMNS if logs else ():
            _refill(self._logs[name], logs[name])
        for name in _LOG_TABLES if logs else ():
            for column, values in logs[name].items():
                _refill(self._logs[name][column], values)
        self._tr_loss = state["loss"].to(self.args.device)
        self._globalstep_last_logged = state["last_logged"]
        self.state.num_input_tokens_seen = state["num_tokens"]
        self.restore_rewards(state.get("rewards", {}))
        for name in _COUNTS:
            setattr(self, name, state[name])

    def _read_run_state(self, checkpoint: Path) -> dict[str, Any] | None:
        processes = self.accelerator.num_processes
        path = checkpoint / self.run_state_name
        if path.is_file():
            kept = torch.load(path, map_location="cpu", weights_only=True)
            kept["buffer"] = send_to_device(kept["buffer"], self.accelerator.device)
            self._compare_references(kept["reference"])
            if kept["num_processes"] == processes:
                return cast(dict[str, Any], kept)
            why = f"it is of a run with {kept['num_processes']} processes, this one has {processes}"
        else:
            why = (
                f"it has no {path.name}, so plain TRL wrote it, a run with fewer processes, or one "
                "with `save_only_model`"
            )
        logger.warning(
            f"{checkpoint.name} is resumed as plain TRL does: {why}. Weights and optimizer go on; "
            "pending generations are drawn anew, so the run is not the undisturbed one."
        )
        self._restore_rewards_of(checkpoint)
        return None

    def _restore_rewards_of(self, checkpoint: Path) -> None:
        """Give rewards what they remembered, which is the same on every process."""
        path = checkpoint / _RUN_STATE.format(0)
        if path.is_file():
            kept = torch.load(path, map_location="cpu", weights_only=True)
            self.restore_rewards(kept["state"].get("rewards", {}))

    def _compare_references(self, began_with: str) -> None:
        if began_with != self.reference_source and self.is_world_process_zero():
            logger.warning(
                f"The run began with the reference '{began_with}' and goes on with "
                f"'{self.reference_source}', so its KL is another one. Give the `model` and the "
                "`reference` that it began with."
            )


def _refill(log: Any, values: list[Any]) -> None:
    log.clear()
    log.extend(values)


def _plain(value: Any) -> Any:
    """What a reward function logged, as a value that ``weights_only`` reads again."""
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    # Of an exact type: an enumeration of numbers is a number too.
    return value if value is None or type(value) in (str, int, float, bool) else repr(value)
