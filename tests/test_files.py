"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trl_grpo_ext.files import SUMMARY_FILE, write_atomically, write_summary


def test_summary_is_written_whole_as_strict_json(tmp_path: Path) -> None:
    path = write_summary(tmp_path, {"kept": 3})
    assert path == tmp_path / SUMMARY_FILE
    assert json.loads(path.read_text()) == {"kept": 3}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_summary(tmp_path, {"kept": float("nan")})
    assert json.loads(path.read_text()) == {"kept": 3}
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "before"
