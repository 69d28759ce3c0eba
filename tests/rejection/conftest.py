"""A stand-in for vLLM, which cannot be installed on every machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

STAND_IN = Path(__file__).parent / "stand_in"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in, as if it was installed."""
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(STAND_IN)
    import vllm

    yield vllm
    del sys.modules["vllm"]
