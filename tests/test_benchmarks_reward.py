"""A service that misbehaves costs no score, no socket and no unbounded time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "reward_faults.py"


def test_faults_of_the_service_neither_falsify_nor_lose_a_score() -> None:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--requests", "150", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["requests"] == 150
    assert found["retries"] > 100  # so the service did misbehave
    assert found["false_scores"] == 0
    assert found["lost_though_retriable"] == 0
    assert found["unscored"] == 2  # the request that is never answered
    assert found["leaked_tasks"] == found["leaked_sockets"] == found["leaked_threads"] == 0
    assert found["peak_memory_growth_bytes"] < 200 * 2**20
    assert found["down_unscored_fraction"] == 1
    assert found["down_seconds"] < 20


@pytest.mark.slow
def test_overlap_hides_what_a_service_takes() -> None:
    """With a model that small the work is short, so only that it waits no longer is sure."""
    ran = subprocess.run(
        [
            *(sys.executable, str(SCRIPT.with_name("reward_api.py")), "--json"),
            *("--steps", "1", "--width", "32", "--max_completion_length", "64"),
            *("--scenarios", "constant"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["no_overlap_s"] >= 2.0
    assert found["trl_s"] >= 2.0
    assert 0.0 < found["hidden_fraction"] <= 1.0
