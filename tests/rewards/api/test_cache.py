"""Scores on disk: finite ones only, whole after a kill, and no code from a foreign database."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import diskcache
import pytest

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.api.cache import ScoreCache, default_folder, request_key
from trl_grpo_ext.rewards.api.wire import WireRequest

REQUEST = WireRequest("/score", {"text": "a", "model": "m"}, (0,), {"answer": "7"})


def test_scores_come_back_in_another_object(tmp_path: Path) -> None:
    first, second = ScoreCache(tmp_path), ScoreCache(tmp_path)
    first.put("k", [0.1, -2.0])
    assert second.get("k", num_scores=2) == [0.1, -2.0]
    assert second.get("other", num_scores=2) is None
    assert second.get("k", num_scores=1) is None
    first.close()
    second.close()


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_only_finite_scores_are_kept(tmp_path: Path, score: float | None) -> None:
    cache = ScoreCache(tmp_path)
    cache.put("k", [1.0, score])
    assert cache.get("k", num_scores=2) is None
    cache.close()


class Bomb:
    def __reduce__(self) -> Any:
        return os.abort, ()


@pytest.mark.parametrize("value", [Bomb(), "[NaN]", "[1e999]", "[1", "{}", "[true]", b"[1.0]", 1.0])
def test_foreign_values_are_neither_run_nor_believed(tmp_path: Path, value: object) -> None:
    with diskcache.Cache(tmp_path) as theirs:
        theirs.set("k", value)
    cache = ScoreCache(tmp_path)
    assert cache.get("k", num_scores=1) is None
    cache.close()


def test_key_follows_everything_that_determines_the_score() -> None:
    changed = [
        dataclasses.replace(REQUEST, path="/other"),
        dataclasses.replace(REQUEST, payload={"text": "b", "model": "m"}),
        dataclasses.replace(REQUEST, payload={"text": "a", "model": "n"}),
        dataclasses.replace(REQUEST, expected={"answer": "8"}),
    ]
    keys = {request_key(request, identity=["https://a", "1"]) for request in [REQUEST, *changed]}
    keys |= {request_key(REQUEST, identity=identity) for identity in (["https://b", "1"], ["", ""])}
    assert len(keys) == 7


def test_key_is_the_same_wherever_the_item_stands_and_however_names_are_ordered() -> None:
    moved = dataclasses.replace(REQUEST, indices=(5,), payload={"model": "m", "text": "a"})
    assert request_key(moved, identity=1) == request_key(REQUEST, identity=1)


WRITER = """
import sys
from pathlib import Path
from trl_grpo_ext.rewards.api.cache import ScoreCache
cache = ScoreCache(Path(sys.argv[1]))
for number in range(10**9):
    cache.put(f"{sys.argv[2]}-{number}", [float(number)])
    if number == 200:
        print("busy", flush=True)
"""


def test_scores_survive_processes_that_are_killed_while_they_write(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    for writer in writers:
        assert writer.stdout
        assert writer.stdout.readline() == "busy\n"
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    cache = ScoreCache(tmp_path)
    assert [cache.get(f"a-{n}", num_scores=1) for n in range(200)] == [[n] for n in range(200)]
    assert [cache.get(f"b-{n}", num_scores=1) for n in range(200)] == [[n] for n in range(200)]
    cache.put("after", [1.0])
    assert cache.get("after", num_scores=1) == [1.0]
    cache.close()


def test_folder_that_cannot_be_used_is_an_error_of_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"`cache_dir`=.*file.* cannot hold scores"):
        ScoreCache(tmp_path / "file")


def test_database_that_breaks_is_reported_once_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ScoreCache(tmp_path)
    with sqlite3.connect(tmp_path / "cache.db") as connection:
        connection.execute("DROP TABLE Cache")
    connection.close()
    with caplog.at_level(logging.WARNING):
        cache.put("k", [1.0])
        assert cache.get("k", num_scores=1) is None
    (record,) = caplog.records
    assert "Scores are asked for instead" in record.getMessage()
    cache.close()


def test_folder_is_in_the_cache_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_GRPO_EXT_CACHE", "/somewhere")
    assert default_folder() == Path("/somewhere/rewards")
    monkeypatch.delenv("TRL_GRPO_EXT_CACHE")
    assert default_folder() == Path.home() / ".cache" / "trl_grpo_ext" / "rewards"
