"""What is missing on the Hub, kept in a run's folder."""

from __future__ import annotations

from pathlib import Path

from trl_grpo_ext.hub.record import RECORD, Upload, read_record, write_record

MODEL = Upload("me/out", folder=".", message="two", ignore=("_*",))


def test_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    missing = [MODEL, Upload("out", folder=None, repo_type="dataset", private=False)]
    write_record(tmp_path / "new", missing)
    assert read_record(tmp_path / "new") == missing


def test_record_says_nothing_is_missing_or_that_there_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    write_record(tmp_path, [])
    assert read_record(tmp_path) == []


def test_record_that_was_damaged_is_none(tmp_path: Path) -> None:
    for text in ("", "[]", '{"missing": [{"repo_id": "x"}]}', '{"missing": 3}'):
        (tmp_path / RECORD).write_text(text)
        assert read_record(tmp_path) is None


def test_upload_says_what_goes_where() -> None:
    assert str(MODEL) == "the run's folder (to the model me/out)"
    assert str(Upload("me/out", folder="checkpoint-2")) == "checkpoint-2 (to the model me/out)"
    assert str(Upload("out", folder=None)) == "the model repository out"
    assert MODEL.job(Path("/runs/a"))["folder"] == "/runs/a"
