"""The recipes of the three stages as programs: alone, together, killed, with two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_rejection_recipe import LAUNCH
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "configs"
QUICK = {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none"}
STAGES: dict[str, Any] = {
    "sft": {
        "solver": "sums",
        "num_traces": 8,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1.0e-3,
        "max_length": 256,
        **QUICK,
    },
    "grpo": {
        "max_steps": 2,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 8,
        "beta": 0.0,
        **QUICK,
    },
    "rejection": {
        "num_train_prompts": 6,
        "num_generations": 8,
        "prompts_per_batch": 2,
        "max_completion_length": 8,
        "keep_truncated": True,
        "keep_special_tokens": True,
        "max_repetition": None,
    },
    "rejection_sft": {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": 256,
        **QUICK,
    },
    "evaluation": {"num_samples": 2, "max_completion_length": 8},
}
SCORING = '''
def digits(*, completions, **_):
    """Right is a reply with a digit: some of a random model's are."""
    return [float(any(c.isdigit() for c in one[-1]["content"])) for one in completions]
'''


@pytest.fixture
def write(tmp_path: Path, tiny_model_dir: Path) -> Any:
    """Write the YAML of a run of seconds, for a recipe."""
    (tmp_path / "scoring.py").write_text(SCORING)
    rows = [{"prompt": f"{a} + 1 - 2 =", "answer": str(a - 1)} for a in range(2, 14)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def written(recipe: str = "r1", **changes: Any) -> list[str]:
        keys = {
            "model_name_or_path": str(tiny_model_dir),
            "dataset": str(tmp_path / "rows.jsonl"),
            "num_eval_prompts": 3,
            "rewards": ["scoring:digits"],
            "cpu_threads": 1,
            "output_dir": str(tmp_path / "out"),
            **(STAGES if recipe == "r1" else STAGES[recipe]),
            **changes,
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}))
        return [str(ROOT / "recipes" / f"{recipe}.py"), "--config", str(path)]

    return written


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}


def run(arguments: list[str], tmp_path: Path, *, processes: int = 0) -> Any:
    """Run a recipe by itself, or with a launcher and some processes."""
    launcher = [*LAUNCH, "--num_processes", str(processes)] if processes else [sys.executable]
    launcher += {0: [], 1: ["--cpu"]}.get(processes, ["--multi_gpu"])
    return subprocess.run(
        [*launcher, *arguments],
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
        env=environment(tmp_path),
    )


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_sft_trains_and_leaves_what_it_promises(write: Any, tmp_path: Path) -> None:
    done = run(write("sft", max_completion_length=8), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Training on 8 traces." in done.stdout
    found = summary(tmp_path / "out")
    assert (found["num_traces"], found["steps"], found["num_eval_prompts"]) == (8, 2, 3)
    assert 0 <= found["accuracy_after"] <= 1
    assert (tmp_path / "out" / "plots" / "loss.png").is_file()
    assert "# Training report" in (tmp_path / "out" / "report.md").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.slow
def test_sft_of_two_processes_gives_the_losses_of_one(write: Any, tmp_path: Path) -> None:
    losses = []
    for processes, batch in ((1, 4), (2, 2)):
        out = tmp_path / f"of{processes}"
        arguments = write(
            "sft",
            output_dir=str(out),
            per_device_train_batch_size=batch,
            logging_steps=1,
            save_strategy="steps",
            save_steps=2,
            measure_accuracy=False,
        )
        done = run(arguments, tmp_path, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert summary(out)["num_processes"] == processes
        state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_r1_checks_every_stage_before_one_runs(write: Any, tmp_path: Path) -> None:
    changed = {**STAGES["rejection_sft"], "max_stepz": 2}
    done = run([*write(rejection_sft=changed)], tmp_path)
    assert done.returncode == 1
    assert "the stage rejection_sft cannot run with these settings" in done.stderr
    assert "Did you mean `max_steps`" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_r1_runs_all_stages_and_skips_those_that_are_complete(write: Any, tmp_path: Path) -> None:
    done = run(write(), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    found = summary(out)
    assert list(found["accuracy"]) == ["base", "sft", "grpo", "rejection_sft"]
    assert all(0 <= value <= 1 for value in found["accuracy"].values())
    for name, of_model in found["metrics"].items():
        alone = summary(out / "evaluation" / name)["metrics"]
        assert of_model == alone
    assert (out / "plots" / "accuracy_by_stage.png").is_file()
    assert "All stages are complete" in done.stdout
    # Again: nothing runs. Without the last model: only that is trained and evaluated.
    before = (out / "grpo" / "model.safetensors").stat().st_mtime_ns
    done = run(write(), tmp_path)
    assert done.stdout.count("is complete") == 8
    for name in ("rejection_sft", "evaluation/rejection_sft"):
        (out / name / "summary.json").unlink()
    done = run(write(), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("is complete") == 6
    assert (out / "grpo" / "model.safetensors").stat().st_mtime_ns == before
    # Other settings for a stage that is complete are refused.
    done = run(write(grpo={**STAGES["grpo"], "max_steps": 3}), tmp_path)
    assert done.returncode == 1
    assert "was made with other settings (`max_steps` differ)" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_r1_with_two_processes(write: Any, tmp_path: Path) -> None:
    done = run(write(), tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    assert summary(out)["num_processes"] == 2
    for name in ("sft", "grpo", "rejection_sft", "evaluation/base"):
        assert summary(out / name)["num_processes"] == 2
    assert done.stdout.count("Stage 4 of 8") == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_r1_that_is_stopped_goes_on(write: Any, tmp_path: Path, number: int) -> None:
    arguments = write(
        grpo={**STAGES["grpo"], "max_steps": 400, "save_strategy": "steps", "save_steps": 5}
    )
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, *arguments], env=environment(tmp_path), stdout=subprocess.DEVNULL
    ) as running:
        wait_for(lambda: list((out / "grpo").glob("checkpoint-*")))
        running.send_signal(number)
        running.wait(timeout=60)
    assert running.returncode == (143 if number == signal.SIGTERM else -9)
    wait_for(lambda: not programs(out / "grpo"))
    assert not (out / "grpo" / "summary.json").exists()
    # It goes on from a checkpoint, not from the beginning: steps before it are not logged again.
    steps = max(int(path.name.split("-")[1]) for path in (out / "grpo").glob("checkpoint-*"))
    arguments = write(
        grpo={**STAGES["grpo"], "max_steps": 400, "save_strategy": "steps", "save_steps": 5}
    )
    with subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout
        said = []
        for line in running.stdout:
            said.append(line)
            if "step " in line and "/400" in line:
                break
        running.send_signal(signal.SIGTERM)
        running.stdout.read()
    assert "Stage 3 of 8, evaluation/sft, is complete.\n" in said
    first = int(said[-1].split("step")[1].split("/")[0])
    assert first >= steps >= 5


def wait_for(condition: Any, *, seconds: float = 240) -> None:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.1)


def programs(folder: Path) -> list[str]:
    """Return the processes whose settings are in a folder."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if f"--config {folder}" in line]


@pytest.mark.slow
def test_evaluation_of_one_and_of_two_processes_is_the_same(write: Any, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        out = tmp_path / f"of{processes}"
        done = run(write("evaluation", output_dir=str(out)), tmp_path, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append((summary(out)["metrics"], (out / "replies.jsonl").read_text()))
    assert found[0] == found[1]
    assert summary(tmp_path / "of2")["num_processes"] == 2
