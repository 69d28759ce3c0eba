"""What the runs of this folder have in common."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _nothing_old_to_collect() -> Iterator[None]:
    """Leave the libraries' objects out of the collection that ends each run, its longest part."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_warning_of_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of TRL, about ``rollout_func`` and ``environment_factory``."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the runs of plain TRL that tests share."""
    return tmp_path_factory.mktemp("trl")
