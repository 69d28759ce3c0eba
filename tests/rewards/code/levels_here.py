"""The sandboxes that are there to test."""

from __future__ import annotations

import pytest

from trl_grpo_ext.rewards.code.jail import Sandbox
from trl_grpo_ext.rewards.code.levels import LEVELS, Level, make_sandbox, unavailable
from trl_grpo_ext.rewards.code.limits import MEBIBYTE, Limits

TIGHT = Limits(
    time_limit_s=3.0,
    memory_bytes=512 * MEBIBYTE,
    max_output_bytes=100_000,
    scratch_bytes=4 * MEBIBYTE,
)

FULL = ("namespaces", "bubblewrap")


def skip_unless_there(level: Level, *, max_processes: int = 1) -> None:
    if reason := unavailable(level, max_processes=max_processes):
        pytest.skip(f"{level} does not work on this machine: {reason}")


def sandbox_of(level: Level, limits: Limits = TIGHT) -> Sandbox:
    skip_unless_there(level, max_processes=limits.max_processes)
    return make_sandbox(level, require_isolation=level != "rlimits", limits=limits)


__all__ = ["FULL", "LEVELS", "TIGHT", "sandbox_of", "skip_unless_there"]
