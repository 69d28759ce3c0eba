"""What a run prints, on a terminal and into a file, and which callbacks it takes for that."""

from __future__ import annotations

import io
import math
import os
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from runs import series, settings, vowels
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.health import HealthCallback
from trl_grpo_ext.log_line import Field, number
from trl_grpo_ext.metrics_file import MetricsFileCallback
from trl_grpo_ext.step_log import BarCallback, StepLogCallback, add_log_callbacks, print_line


class Table(TrainerCallback):
    """Stands for transformers' callback of a notebook, which needs IPython to be imported."""


OURS = (BarCallback, StepLogCallback, MetricsFileCallback, HealthCallback)


class Recorder(TrainerCallback):
    """What an integration such as wandb is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        self.logs.append(dict(logs))


@dataclass
class Trainers:
    """Makes trainers of the tiny model with the log that their options ask for."""

    tmp_path: Path
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast

    def __call__(self, *callbacks: TrainerCallback, **changes: Any) -> ExtGRPOTrainer:
        rows = Dataset.from_dict({"prompt": ["one two", "three", "2+2=", "abc"] * 4})
        trainer = ExtGRPOTrainer(
            model=self.model,
            reward_funcs=vowels,
            args=ExtGRPOConfig(**settings(self.tmp_path, **changes)),
            train_dataset=rows,
            eval_dataset=rows.select(range(2)),
            processing_class=self.tokenizer,
            callbacks=list(callbacks),
        )
        if not any(isinstance(found, HealthCallback) for found in callbacks_of(trainer)):
            add_log_callbacks(trainer, options=trainer.options)
        return trainer


def callbacks_of(trainer: ExtGRPOTrainer) -> list[TrainerCallback]:
    return list(trainer.callback_handler.callbacks)


def printing(trainer: ExtGRPOTrainer) -> set[type]:
    """The classes of callbacks that print or are ours."""
    known = (*OURS, ProgressCallback, PrinterCallback, Table)
    return {type(found) for found in callbacks_of(trainer) if isinstance(found, known)}


@pytest.fixture
def make_trainer(
    tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> Trainers:
    return Trainers(tmp_path, tiny_model, tiny_tokenizer)


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns, and colours wherever there is a terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Standard output and error on a pseudo-terminal; yields what reads what it shows."""
    shown, written = os.openpty()
    os.set_blocking(shown, False)
    termios.tcsetwinsize(written, (24, 80))
    with (
        open(written, "w", encoding="utf-8") as stream,
        redirect_stdout(stream),
        redirect_stderr(stream),
    ):
        yield lambda: os.read(shown, 100_000).decode()
    os.close(shown)


@pytest.mark.usefixtures("columns")
def test_run_prints_a_plain_line_a_log_where_there_is_no_terminal(
    make_trainer: Trainers, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"eval_strategy": "steps", "eval_steps": 3, "disable_tqdm": False}
    trainer = make_trainer(per_device_eval_batch_size=8, **given)
    trainer.train()
    captured = capsys.readouterr()
    sampler, reference, *lines = captured.out.splitlines()
    assert sampler == "sampler: shared_prefill (each prompt is computed once a group)"
    assert reference == f"reference: resident ({trainer.reference_reason})"
    assert [line.split("  ")[0] for line in lines] == [
        "step 1/3",
        "step 2/3",
        "step 3/3",
        "eval 3/3",
        "",  # goes on
        "done: 3 steps",
    ]
    assert "pass@4" in lines[3] + lines[4]
    assert all(line.isprintable() and len(line) <= 80 for line in lines)
    assert all("tok/s" in line and line.endswith("left") for line in lines if "step " in line)
    reward = trainer.state.log_history[0]["reward"]
    assert f"reward {reward:.3f}±" in lines[0]
    assert "\r" not in captured.err


@pytest.mark.usefixtures("columns")
def test_run_says_which_evaluations_are_the_best_and_which_checkpoint_at_the_end(
    make_trainer: Trainers, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(
        per_device_eval_batch_size=8,
        learning_rate=0.1,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="completions/max_terminated_length",
    )
    trainer.train()
    trainer.evaluate()
    lines = capsys.readouterr().out.splitlines()
    name = "completions/max_terminated_length"
    on_start, *values, _ = series(trainer.state.log_history, f"eval_{name}")
    marked = [line for line in lines if name in line and line.startswith("eval")]
    assert f"{name} {on_start:.3f}"[:20] in marked[0]
    best = [values[i] > max([-math.inf, *values[:i]]) for i in range(3)]
    assert ["new best" in line for line in marked] == [False, *best, False]
    step = 1 + max(range(3), key=lambda i: (values[i], -i))
    (end,) = [i for i, line in enumerate(lines) if line.startswith("done: 3 steps  in ")]
    told = f"best: checkpoint-{step} ({name} {number(max(values)).strip()})"
    assert told in "  ".join(lines[end : end + 2])
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.usefixtures("columns")
@pytest.mark.parametrize(
    ("checkpoint", "loads", "told"),
    [
        ("out/checkpoint-30", True, "best: checkpoint-30 (loss 0.250)"),
        ("out/checkpoint-20", True, "best: step 30 (loss 0.250), not saved, checkpoint-20 is load"),
        ("out/checkpoint-20", False, "best: step 30 (loss 0.250), not saved\n"),
        (None, True, "best: step 30 (loss 0.250), not saved\n"),
    ],
)
def test_end_does_not_name_a_checkpoint_that_is_not_the_best(
    checkpoint: str | None, loads: bool, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = TrainerState(global_step=40, max_steps=40, best_metric=0.25, best_global_step=30)
    state.best_model_checkpoint = checkpoint
    args = TrainingArguments(report_to=[], metric_for_best_model="eval_loss")
    args.load_best_model_at_end = loads
    StepLogCallback().on_log(args, state, TrainerControl(), logs={"train_loss": 0.1})
    assert told in capsys.readouterr().out


@pytest.mark.usefixtures("columns")
@pytest.mark.parametrize(
    ("best", "greater", "value", "is_best"),
    [
        (None, True, 0.5, True),
        (0.4, True, 0.5, True),
        (0.5, True, 0.5, False),
        (0.6, False, 0.5, True),
        (0.4, False, 0.5, False),
        (None, True, math.nan, False),
    ],
)
def test_evaluation_is_the_new_best_where_transformers_takes_it_for_that(
    best: float | None,
    greater: bool,
    value: float,
    is_best: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = TrainerState(global_step=40, max_steps=40, best_metric=best)
    args, control = TrainingArguments(report_to=[]), TrainerControl()
    args.metric_for_best_model, args.greater_is_better = "pass@2", greater
    callback, logs = StepLogCallback(), {"eval_runtime": 1.0, "eval_pass@2": value}
    callback.on_train_begin(args, state, control)
    callback.on_log(args, state, control, logs=logs)
    callback.on_train_end(args, state, control)
    callback.on_log(args, state, control, logs=logs)
    control.should_evaluate = True  # as for an evaluation that a resumed run repeats
    callback.on_log(args, state, control, logs=logs)
    _, during, after, repeated = capsys.readouterr().out.splitlines()
    assert ("new best" in during) is ("new best" in repeated) is is_best
    assert "new best" not in after


def test_long_choices_take_several_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    callback = StepLogCallback(["reference: resident (a copy of 0.5 GB fits into 9.1 GB)", "short"])
    args, control = TrainingArguments(report_to=[]), TrainerControl()
    callback.on_train_begin(args, TrainerState(), control)
    assert capsys.readouterr().out == (
        "reference: resident (a copy of 0.5 GB\n  fits into 9.1 GB)\nshort\n"
    )


@pytest.mark.usefixtures("columns")
def test_end_of_a_resumed_run_counts_what_this_session_did(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args, control, callback = TrainingArguments(report_to=[]), TrainerControl(), StepLogCallback()
    state = TrainerState(global_step=40, max_steps=72, num_input_tokens_seen=70_000)
    callback.on_train_begin(args, state, control)
    state.global_step, state.num_input_tokens_seen = 72, 123_000
    callback.on_log(args, state, control, logs={"train_loss": 0.1, "train_runtime": 130.0})
    assert capsys.readouterr().out == (
        "going on after step 40/72\n"
        "done: 72 steps  since the resume: 32 steps  in 2:10  53,000 tokens\n"
    )


@pytest.mark.usefixtures("columns")
def test_integrations_and_history_get_every_metric(
    make_trainer: Trainers, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    line = make_trainer(recorder, max_steps=1)
    line.train()
    assert [entry | {"step": 1} for entry in recorder.logs] == line.state.log_history
    assert {"loss", "kl", "completions/min_length", "clip_ratio/low_min"} <= set(recorder.logs[0])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"disable_tqdm": False}, {*OURS}),
        ({"disable_tqdm": True}, {*OURS} - {BarCallback}),
        (
            {"disable_tqdm": False, "step_log": "hf", "log_jsonl": False},
            {ProgressCallback, HealthCallback},
        ),
        (
            {"disable_tqdm": True, "step_log": "hf"},
            {PrinterCallback, MetricsFileCallback, HealthCallback},
        ),
    ],
)
def test_options_decide_which_callbacks_print(
    changes: dict[str, Any], expected: set[type], make_trainer: Trainers
) -> None:
    assert printing(make_trainer(**changes)) == expected


def test_table_of_a_notebook_and_callbacks_of_the_user_stay(make_trainer: Trainers) -> None:
    class MyBar(ProgressCallback):
        pass

    trainer = make_trainer(MyBar())
    trainer.remove_callback(StepLogCallback)
    trainer.add_callback(Table())
    add_log_callbacks(trainer, options=trainer.options)
    assert printing(trainer) == {
        Table,
        MyBar,
        MetricsFileCallback,
        HealthCallback,
    }


@pytest.mark.usefixtures("columns")
def test_unhealthy_value_is_yellow_on_a_terminal() -> None:
    with terminal() as shown:
        print_line(iter([Field("fine", 0), Field("bad", 1, healthy=False)]))
        assert shown() == "fine  \x1b[33mbad\x1b[0m\r\n"


@pytest.mark.usefixtures("columns")
def test_line_is_plain_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(iter([Field("fine", 0), Field("bad", 1, healthy=False)]))
    assert capsys.readouterr().out == "fine  bad\n"


@pytest.mark.usefixtures("columns")
def test_line_does_not_end_a_run_whose_output_takes_ascii_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr(sys, "stdout", stream)
    print_line(iter([Field("reward 0.5±0.1", 0)]))
    assert stream.buffer.getvalue() == b"reward 0.5?0.1\n"  # type: ignore[attr-defined]


@pytest.mark.usefixtures("columns")
def test_bar_of_a_resumed_run_starts_at_its_step_and_repeats_no_log() -> None:
    args, control = TrainingArguments(report_to=[]), TrainerControl()
    state = TrainerState(global_step=40, max_steps=100)
    bar = BarCallback()
    with terminal() as shown:
        bar.on_train_begin(args, state, control)
        assert " 40%|" in shown()
        state.global_step = 41
        bar.on_step_end(args, state, control)
        assert bar.training_bar.n == 41
        bar.on_log(args, state, control, logs={"loss": 0.123})
        bar.on_train_end(args, state, control)
        assert "0.123" not in shown()


@pytest.mark.usefixtures("columns")
def test_other_processes_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    state = TrainerState(global_step=1, max_steps=2, is_world_process_zero=False)
    args, control = TrainingArguments(report_to=[]), TrainerControl()
    for callback in (StepLogCallback(), BarCallback()):
        callback.on_train_begin(args, state, control)
        callback.on_log(args, state, control, logs={"loss": 0.5})
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("columns")
def test_what_somebody_else_logs_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    state = TrainerState(global_step=1, max_steps=2)
    StepLogCallback().on_log(
        TrainingArguments(report_to=[]), state, TrainerControl(), logs={"mine": 2.0, "text": "a"}
    )
    assert capsys.readouterr().out == "step 1/2  mine 2.000\n"
