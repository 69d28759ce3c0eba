"""What a run prints: one line a log, beside a plain progress bar; and its other callbacks."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.text import Text
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

from trl_grpo_ext.evaluation.options import best_key
from trl_grpo_ext.health import HealthCallback
from trl_grpo_ext.log_line import (
    LAST,
    Field,
    Logs,
    evaluation_fields,
    last_fields,
    line,
    number,
    other_fields,
    training_fields,
    wrapped,
)
from trl_grpo_ext.log_options import LogOptions
from trl_grpo_ext.metrics import EVALUATION
from trl_grpo_ext.metrics_file import MetricsFileCallback
from trl_grpo_ext.pace import Pace

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed}"


def add_log_callbacks(
    trainer: Trainer, *, options: LogOptions, opening: Sequence[str] = ()
) -> None:
    """Give a trainer the log that the options ask for.

    With ``step_log='line'``, transformers' callback that prints every metric makes way for one
    line a log and, unless ``disable_tqdm``, a bar on a terminal. The table that transformers shows
    in a notebook stays. What ``report_to`` names goes on getting all metrics.

    Args:
        trainer: Whose callbacks these are.
        options: Which there are.
        opening: Lines that are printed before the first step.
    """
    if options.step_log == "line":
        _replace_printing(trainer, opening)
    if options.log_jsonl and trainer.args.output_dir is not None:
        trainer.add_callback(MetricsFileCallback(trainer.args.output_dir))
    trainer.add_callback(HealthCallback())


def _replace_printing(trainer: Trainer, opening: Sequence[str]) -> None:
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) is ProgressCallback:
            trainer.remove_callback(callback)
            trainer.add_callback(BarCallback())
            trainer.add_callback(StepLogCallback(opening))
        elif type(callback) is PrinterCallback:
            trainer.remove_callback(callback)
            trainer.add_callback(StepLogCallback(opening))


class StepLogCallback(TrainerCallback):
    """Prints a line a log to standard output, above the bars, on the main process.

    Args:
        opening: Lines that are printed when training begins.
    """

    def __init__(self, opening: Sequence[str] = ()) -> None:
        self.opening, self.pace = opening, Pace()
        self._first_step, self._first_tokens = 0, 0.0
        self._is_training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the pace of an earlier training, and note, and say, where this one begins."""
        self.pace = Pace()
        self._first_step, self._first_tokens = state.global_step, state.num_input_tokens_seen
        self._is_training = True
        if not state.is_world_process_zero:
            return
        for text in self.opening:
            for row in textwrap.wrap(text, _console().width, subsequent_indent="  "):
                print_line([Field(row, 0)])
        if state.global_step:
            print_line([Field(f"going on after step {state.global_step}/{state.max_steps}", 0)])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that no evaluation makes another model the best from here on."""
        self._is_training = False

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
        """Print the line; of an evaluation and at the end, all of it."""
        if not (state.is_world_process_zero and logs):
            return
        step, max_steps = state.global_step, state.max_steps
        if any(key.startswith(EVALUATION) for key in logs):
            print_lines(self._evaluation(logs, args, state, control))
        elif LAST in logs:
            print_lines(self._end(logs, args, state))
        elif "loss" in logs:
            print_line(training_fields(logs, step=step, max_steps=max_steps, pace=self.pace))
        else:
            print_line(other_fields(logs, step=step, max_steps=max_steps))

    def _evaluation(
        self, logs: Logs, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> Iterator[Field]:
        best = None if args.metric_for_best_model is None else best_key(args.metric_for_best_model)
        # A resumed run repeats an interrupted evaluation just before it begins.
        is_judged = self._is_training or control.should_evaluate
        return evaluation_fields(
            logs,
            step=state.global_step,
            max_steps=state.max_steps,
            best=best,
            is_new_best=is_judged and _is_new_best(logs.get(best or ""), args, state),
        )

    def _end(self, logs: Logs, args: TrainingArguments, state: TrainerState) -> Iterator[Field]:
        return last_fields(
            logs,
            step=state.global_step,
            num_tokens=state.num_input_tokens_seen - self._first_tokens,
            first_step=self._first_step,
            best=_best(args, state),
        )


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


def print_line(fields: Iterable[Field]) -> None:
    """Print fields as a line of at most the terminal's width; plain where there is no terminal."""
    console = _console()
    _print(console, line(fields, width=console.width))


def print_lines(fields: Iterable[Field]) -> None:
    """Print fields likewise, in as many lines as they take."""
    console = _console()
    _print(console, wrapped(fields, width=console.width))


def _is_new_best(value: float | None, args: TrainingArguments, state: TrainerState) -> bool:
    """Whether transformers is about to take this evaluation for the best.

    It does not judge that of ``eval_on_start``, of which there is no checkpoint.
    """
    if value is None or math.isnan(value) or state.global_step == 0:
        return False
    if state.best_metric is None:
        return True
    return value > state.best_metric if args.greater_is_better else value < state.best_metric


def _best(args: TrainingArguments, state: TrainerState) -> str | None:
    """The best checkpoint and its value, or the best step if it was not saved."""
    if state.best_metric is None or not state.best_global_step:
        return None
    saved = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
    name = str(args.metric_for_best_model).removeprefix(EVALUATION)
    value = f"({name} {number(state.best_metric).strip()})"
    if saved == f"checkpoint-{state.best_global_step}":
        return f"{saved} {value}"
    loads = f", {saved} is loaded" if args.load_best_model_at_end and saved else ""
    return f"step {state.best_global_step} {value}, not saved{loads}"


def _console() -> Console:
    return Console(file=sys.stdout, highlight=False, force_jupyter=False)


def _print(console: Console, text: Text) -> None:
    with console.capture() as captured:
        console.print(text, no_wrap=True, soft_wrap=True, end="")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    tqdm.write(captured.get().encode(encoding, "replace").decode(encoding), file=sys.stdout)
    sys.stdout.flush()
