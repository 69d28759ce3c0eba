"""What a run prints: one line a log, beside a plain progress bar; and its other callbacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, cast

from rich.console import Console
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trl_grpo_ext.health import HealthCallback
from trl_grpo_ext.log_line import (
    LAST,
    Field,
    Logs,
    Pace,
    evaluation_fields,
    last_fields,
    line,
    other_fields,
    training_fields,
)
from trl_grpo_ext.log_options import LogOptions
from trl_grpo_ext.metrics import EVALUATION
from trl_grpo_ext.metrics_file import MetricsFileCallback

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed}"


def add_log_callbacks(trainer: Trainer, *, options: LogOptions) -> None:
    """Give a trainer the log that the options ask for.

    With ``step_log='line'``, transformers' callback that prints every metric makes way for one
    line a log and, unless ``disable_tqdm``, a bar on a terminal. The table that transformers shows
    in a notebook stays. What ``report_to`` names goes on getting all metrics.
    """
    if options.step_log == "line":
        _replace_printing(trainer)
    if options.log_jsonl and trainer.args.output_dir is not None:
        trainer.add_callback(MetricsFileCallback(trainer.args.output_dir))
    trainer.add_callback(HealthCallback())


def _replace_printing(trainer: Trainer) -> None:
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) is ProgressCallback:
            trainer.remove_callback(callback)
            trainer.add_callback(BarCallback())
            trainer.add_callback(StepLogCallback())
        elif type(callback) is PrinterCallback:
            trainer.remove_callback(callback)
            trainer.add_callback(StepLogCallback())


class StepLogCallback(TrainerCallback):
    """Prints a line a log to standard output, above the bars, on the main process."""

    def __init__(self) -> None:
        self.pace = Pace()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the pace of an earlier training."""
        self.pace = Pace()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.pace.begin_step(state.num_input_tokens_seen)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        self.pace.end_step(state.num_input_tokens_seen)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Logs | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the line."""
        if state.is_world_process_zero and logs:
            print_line(self._fields(logs, state))

    def _fields(self, logs: Logs, state: TrainerState) -> Iterator[Field]:
        step, max_steps = state.global_step, state.max_steps
        if any(key.startswith(EVALUATION) for key in logs):
            return evaluation_fields(logs, step=step, max_steps=max_steps)
        if LAST in logs:
            return last_fields(logs, step=step, num_tokens=state.num_input_tokens_seen)
        if "loss" in logs:
            return training_fields(logs, step=step, max_steps=max_steps, pace=self.pace)
        return other_fields(logs, step=step, max_steps=max_steps)


class BarCallback(ProgressCallback):
    """transformers' progress bar, on a terminal only, and without a copy of every log."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, at the step that the run goes on from."""
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                disable=None,  # off where standard error is no terminal
                leave=False,
                dynamic_ncols=True,
                bar_format=BAR,
            )
        self.current_step = state.global_step

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Move the bar of an evaluation on, on a terminal."""
        if sys.stderr.isatty():
            inherited = cast(Any, super())
            inherited.on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Logs | None = None,
        **kwargs: Any,
    ) -> None:
        """Leave the log to :class:`StepLogCallback`."""


def print_line(fields: Iterator[Field]) -> None:
    """Print fields as a line of at most the terminal's width; plain where there is no terminal."""
    console = Console(file=sys.stdout, highlight=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(line(fields, width=console.width), no_wrap=True, soft_wrap=True, end="")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    tqdm.write(captured.get().encode(encoding, "replace").decode(encoding), file=sys.stdout)
    sys.stdout.flush()
