"""The benchmark of a training step runs, and its last line is what programs read."""

from __future__ import annotations

import json
import os
import runpy
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
    assert result["failed"] == {}
    assert result["completion_length"] == {"trl": 4, "ours": 4}
    assert result["ratios"]["ours"] == [result["ratio"]] * 3
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


@pytest.mark.slow
def test_step_time_names_a_trainer_that_fails_and_goes_on_with_the_others(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    options = ["--scenario", "short", "--model", "random:tiny", "--completion_length", "4"]
    options += ["--tokenizer", str(tiny_model_dir), "--repeats", "1", "--json"]
    options += ["--arms", "trl", "trl_continuous", "ours"]
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(broken_continuous_batching(tmp_path))},
    )
    assert ran.returncode == 1
    result = json.loads(ran.stdout.splitlines()[-1])
    assert "no pages left" in result["failed"]["trl_continuous"]
    assert set(result["phases"]) == {"trl", "ours"}


def broken_continuous_batching(tmp_path: Path) -> Path:
    """A folder whose ``sitecustomize`` lets transformers' engine fail."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "from transformers import generation\n"
        "def fail(*args, **kwargs): raise RuntimeError('no pages left')\n"
        "generation.ContinuousMixin.generate_batch = fail\n"
    )
    return folder


def test_roofline_by_hand() -> None:
    """One group of 2 completions of 2 tokens after 4: packed 4 + 2 * 2 = 8 tokens."""
    step_time = runpy.run_path(str(SCRIPT))
    scenario = step_time["Scenario"](
        prompt_length=4, completion_length=2, num_generations=2, micro_batch=2, accumulation=1
    )
    model = {
        "body_parameters": 100,
        "head_parameters": 10,
        "attention_width": 3,
        "cache_width": 5,
        "bytes_a_number": 2,
    }
    phases = {"logprobs": 1.0, "update": 2.0, "generation": 4.0}
    # Tokens that each token sees, on average: 4 * 4 / 2 in the prompt, 2 * 2 * (4 + 1) after it.
    forward = 2 * 100 * 8 + 2 * 10 * 4 + 4 * 3 * (8 + 20)
    # Each of 2 tokens reads all weights, and the prompt's 4 entries and half of 2 * 2 own ones.
    decode = 2 * (110 + 5 * (4 + 2)) * 2
    assert step_time["roofline"](scenario, model, phases, (1000.0, 100.0)) == pytest.approx(
        {
            "logprobs": forward / 1000,
            "update": 3 * forward / 1000 / 2,
            "generation": decode / 100 / 4,
        }
    )
