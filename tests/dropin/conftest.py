"""What the runs of this folder have in common."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_warning_of_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of TRL, about ``rollout_func`` and ``environment_factory``."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the runs of plain TRL that tests share."""
    return tmp_path_factory.mktemp("trl")
