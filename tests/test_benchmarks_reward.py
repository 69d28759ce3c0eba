"""A service that misbehaves costs no score, no socket and no unbounded time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
