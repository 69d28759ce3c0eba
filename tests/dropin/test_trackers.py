"""What ``report_to`` names is given every metric, at its step."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from dropin.compare import ours
from tensorboardX.proto.event_pb2 import Event
from transformers.integrations import rewrite_logs

_LENGTH = struct.Struct("<Q4x")  # of the event that follows, and a checksum; another one is behind


def events(path: Path) -> Iterator[Event]:
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        yield Event.FromString(data[at : at + length])
        at += length + 4


def test_tensorboard_gets_every_metric_of_training_and_evaluation(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    changes = {"report_to": "tensorboard", "log_completions": True, "eval_strategy": "steps"}
    rows = [{"prompt": text} for text in ("3 + 4 =", "two", "1, 2,")]
    trainer = ours(tiny_model_dir, tmp_path, **changes, eval_dataset=rows, eval_steps=2)
    trainer.train()

    (path,) = (tmp_path / "runs").glob("events.*")
    found = {
        (value.tag, event.step): value.simple_value
        for event in events(path)
        for value in event.summary.value
    }
    logged = {
        (name.replace("@", "_"), entry["step"]): value  # TensorBoard's names have no @
        for entry in trainer.state.log_history
        for name, value in rewrite_logs({k: v for k, v in entry.items() if k != "step"}).items()
    }
    assert {name for name, _ in logged} > {"train/reward", "train/kl", "eval/accuracy"}
    assert {key: found.get(key) for key in logged} == pytest.approx(logged, nan_ok=True)
