"""A short version of the benchmark that kills and resumes; its last line is what programs read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kill_resume.py"


@pytest.mark.parametrize(
    ("kills", "processes"), [(4, 1), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_killed_runs_are_the_undisturbed_run(kills: int, processes: int, tmp_path: Path) -> None:
    options = ["--kills", str(kills), "--processes", str(processes), "--steps", "6"]
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--width", "32", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert json.loads(ran.stdout.splitlines()[-1]) == {
        "kills": kills,
        "bit_identical": True,
        "unusable_checkpoints": 0,
    }
