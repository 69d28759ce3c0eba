"""A stand-in for vLLM, which cannot be installed on every machine."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

STAND_IN = Path(__file__).parent / "stand_in"
collect_ignore = ["stand_in"]  # or pytest imports it as `vllm`, and TRL takes it for the real one


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The stand-in, as if it was installed."""
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setitem(sys.modules, "vllm", None)  # so that its end removes what is imported next
    del sys.modules["vllm"]
    return importlib.import_module("vllm")
