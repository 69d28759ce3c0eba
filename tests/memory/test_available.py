"""The memory that is free."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from trl_grpo_ext.memory.available import (
    _cgroup_available_bytes,
    available_host_bytes,
    available_memory_bytes,
)


def test_cgroup_available_bytes_is_the_limit_less_what_cannot_be_reclaimed(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 450\ninactive_file 250\n")
    assert _cgroup_available_bytes(tmp_path) == 550


def test_cgroup_available_bytes_is_none_without_a_limit(tmp_path: Path) -> None:
    assert _cgroup_available_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("inactive_file 250\n")
    assert _cgroup_available_bytes(tmp_path) is None


def test_what_torch_keeps_on_a_device_and_does_not_use_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 450)
    assert available_memory_bytes() == 350


def test_available_memory_bytes_is_at_most_the_memory_of_the_machine() -> None:
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
    else:
        total = psutil.virtual_memory().total
    assert 2**20 < available_memory_bytes() <= total
    assert 2**20 < available_host_bytes() <= psutil.virtual_memory().total
