"""``metrics.jsonl``: strict JSON, one line a log, of the run as it stands."""

from __future__ import annotations

import json
import logging
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from runs import settings, vowels
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.metrics_file import MetricsFile, MetricsFileCallback

Log = dict[str, Any]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def lines(path: Path) -> list[Log]:
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def log(step: int, **values: Any) -> Log:
    return {"loss": step / 10, **values, "step": step}


def written(path: Path, *logs: Log, history: list[Log] | None = None, time: float = 7.0) -> None:
    """One run, from the checkpoint that holds ``history``."""
    file = MetricsFile(path, clock=lambda: time)
    file.begin(history or [])
    for entry in logs:
        file.append(entry)


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: a full disk, which takes the first part of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_log_is_a_line_of_json_with_step_and_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    written(path, log(1, reward=0.5), time=1795367406.3131)
    assert path.read_text() == '{"step": 1, "time": 1795367406.313, "loss": 0.1, "reward": 0.5}\n'


def test_value_that_is_no_number_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, log(1, a=math.nan, b=math.inf, c=-math.inf, d=None))
    (entry,) = lines(path)
    assert [entry[name] for name in "abcd"] == [None] * 4


def test_line_is_on_the_disk_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.begin([])
    for step in (1, 2, 3):
        file.append(log(step))
        assert [entry["step"] for entry in lines(file.path)] == list(range(1, step + 1))


def test_log_before_training_is_written_at_once_and_moves_into_the_file_of_the_run(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, log(5))
    file = MetricsFile(path)
    file.append({"eval_reward": 1.0, "step": 0})
    file.append({"eval_reward": 2.0, "step": 0})
    assert [entry["step"] for entry in lines(path)] == [5, 0, 0]
    file.begin([])
    file.append(log(1))
    assert [entry["step"] for entry in lines(path)] == [0, 0, 1]
    assert [entry["step"] for entry in lines(tmp_path / "metrics.1.jsonl")] == [5]


def test_log_before_the_first_run_keeps_no_file_aside(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "new" / "metrics.jsonl")
    file.append({"eval_reward": 1.0, "step": 0})
    assert [entry["step"] for entry in lines(file.path)] == [0]
    file.begin([])
    file.append(log(1))
    assert [entry["step"] for entry in lines(file.path)] == [0, 1]
    assert [found.name for found in file.path.parent.iterdir()] == ["metrics.jsonl"]


def test_log_before_a_resume_stands_behind_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, log(1), log(2), time=1.0)
    file = MetricsFile(path, clock=lambda: 2.0)
    file.append({"eval_reward": 1.0, "step": 0})
    file.begin([log(1)])
    file.append(log(2))
    assert [(entry["step"], entry["time"]) for entry in lines(path)] == [
        (1, 1.0),
        (0, 2.0),
        (2, 2.0),
    ]


def test_log_before_training_drops_the_half_line_of_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, log(1))
    path.write_text(path.read_text() + '{"step": 2, "ti')
    MetricsFile(path).append({"eval_reward": 1.0, "step": 0})
    assert [entry["step"] for entry in lines(path)] == [1, 0]


def test_evaluation_without_training_is_in_the_file(
    tmp_path: Path,
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = Dataset.from_dict({"prompt": ["abc", "2+2="] * 4})
    trainer = ExtGRPOTrainer(
        model=tiny_model,
        reward_funcs=vowels,
        args=ExtGRPOConfig(**settings(tmp_path, per_device_eval_batch_size=8)),
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        processing_class=tiny_tokenizer,
    )
    metrics = trainer.evaluate()
    (entry,) = lines(tmp_path / "out" / "metrics.jsonl")
    assert entry["step"] == 0
    assert entry["time"] > 1.7e9
    assert entry["eval_reward"] == metrics["eval_reward"]
    assert metrics.keys() <= entry.keys()


def test_file_of_an_earlier_run_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for run in range(3):
        written(path, log(1, run=run))
    found = {file.name: lines(file)[0]["run"] for file in tmp_path.iterdir()}
    assert found == {"metrics.jsonl": 2, "metrics.1.jsonl": 0, "metrics.2.jsonl": 1}


def test_resumed_run_goes_on_after_its_checkpoint_and_keeps_the_times(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    history = [log(1), log(2, kl=math.nan)]
    written(path, *history, log(3, attempt=1), log(4, attempt=1), time=1.0)
    written(path, log(3, attempt=2), history=history, time=2.0)
    steps = [(entry["step"], entry["time"], entry.get("attempt")) for entry in lines(path)]
    assert steps == [(1, 1.0, None), (2, 1.0, None), (3, 2.0, 2)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resumed_run_drops_the_half_line_of_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, log(1), time=1.0)
    path.write_text(path.read_text() + '{"step": 2, "ti')
    written(path, log(2), history=[log(1)], time=2.0)
    assert [(entry["step"], entry["time"]) for entry in lines(path)] == [(1, 1.0), (2, 2.0)]


def test_resumed_run_without_its_file_has_the_history_of_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, log(2), history=[log(1)], time=2.0)
    assert [(entry["step"], entry["time"]) for entry in lines(path)] == [(1, None), (2, 2.0)]


def test_resumed_run_does_not_mix_with_the_file_of_another(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, log(1, run="other"))
    written(path, log(2), history=[log(1)])
    assert [entry["step"] for entry in lines(path)] == [1, 2]
    assert [entry["run"] for entry in lines(tmp_path / "metrics.1.jsonl")] == ["other"]


def test_full_disk_is_one_warning_and_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.begin([])
    file.append(log(1))
    with room_for(file.path.stat().st_size + 10):
        file.append(log(2))
        file.append(log(3))
        assert [entry["step"] for entry in lines(file.path)] == [1]
    file.append(log(4))
    assert [entry["step"] for entry in lines(file.path)] == [1, 2, 3, 4]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "No space left" in message
    assert "`log_jsonl: false`" in message


def test_folder_that_cannot_be_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out").write_text("a file, not a folder")
    written(tmp_path / "out" / "metrics.jsonl", log(1), log(2))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_file_of_a_run_has_its_log_history_and_goes_on_when_resumed(
    tmp_path: Path,
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    def trained(max_steps: int, resume: str | None) -> list[Log]:
        given = settings(tmp_path, max_steps=max_steps, save_strategy="steps", save_steps=2)
        trainer = ExtGRPOTrainer(
            model=tiny_model,
            reward_funcs=vowels,
            args=ExtGRPOConfig(**given, lr_scheduler_type="constant"),
            train_dataset=Dataset.from_dict({"prompt": ["abc", "2+2="] * 4}),
            processing_class=tiny_tokenizer,
        )
        while trainer.pop_callback(MetricsFileCallback):
            pass
        trainer.add_callback(MetricsFileCallback(trainer.args.output_dir))
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.log_history

    path = tmp_path / "out" / "metrics.jsonl"
    first = trained(3, None)
    whole = lines(path)
    assert [entry["step"] for entry in whole] == [1, 2, 3, 3]
    assert [{k: v for k, v in entry.items() if k != "time"} for entry in whole] == first
    trained(4, str(tmp_path / "out" / "checkpoint-2"))
    resumed = lines(path)
    assert [entry["step"] for entry in resumed] == [1, 2, 3, 4, 4]
    assert resumed[:2] == whole[:2]
    assert resumed[2]["time"] > whole[3]["time"]
