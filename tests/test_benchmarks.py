"""The benchmark of a training step runs, and its last line is what programs read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "step_time.py"


@pytest.mark.slow
def test_step_time_compares_both_trainers_phase_by_phase(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    options = ["--scenario", "multi_step", "--model", "random:tiny", "--completion_length", "4"]
    options += ["--tokenizer", str(tiny_model_dir), "--repeats", "1", "--json"]
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result["scenario"] == "multi_step"
    assert result["ratio"] == pytest.approx(result["trl_s"] / result["ours_s"])
    assert len(result["pass_ratios"]) == 2
    for arm in ("trl", "ours"):
        phases = result["phases"][arm]
        assert sum(phases.values()) == pytest.approx(result[f"{arm}_s"], rel=0.05)
        assert phases["generation"] > 0
        assert result["peak_bytes"][arm]["all"] == max(result["peak_bytes"][arm].values())
    written = json.loads((tmp_path / "outputs/step_time/multi_step.json").read_text())
    assert written == result
    # The old log-probabilities come from the sampler, and there is no second generation.
    assert result["settings"]["num_iterations"] == 2
