"""The recipe itself, in its own processes: its dataset, its resumption, one and two of them."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rejection.shards import MADE_WITH

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "rejection_sampling.py"
YAML = ROOT / "recipes" / "configs" / "rejection_quickstart.yaml"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0"]

REWARDS = '''
import time
from pathlib import Path

def digits(*, completions, **_):
    """Right is a reply with a digit: some of a random model's are."""
    return [float(any(c.isdigit() for c in one[-1]["content"])) for one in completions]

def short(*, completions, **_):
    return [-len(one[-1]["content"]) / 100 for one in completions]

def slow(*, completions, **_):
    """Scores like the others, after so long that somebody can kill the run."""
    if not Path(__file__).with_name("fast").exists():
        time.sleep(0.3)
    return [0.0] * len(completions)
'''


@pytest.fixture
def write(tmp_path: Path, tiny_model_dir: Path) -> Any:
    """Write a YAML of a run of seconds, with changes to the shipped one."""
    (tmp_path / "scoring.py").write_text(REWARDS)
    rows = [{"prompt": f"{a} + 1 =", "answer": str(a + 1)} for a in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def written(**changes: Any) -> list[str]:
        keys = yaml.safe_load(YAML.read_text()) | {
            "model_name_or_path": str(tiny_model_dir),
            "model_source": "auto",
            "dataset": str(tmp_path / "rows.jsonl"),
            "dataset_arguments": None,
            "num_eval_prompts": 0,
            "num_train_prompts": 9,
            "rewards": ["scoring:digits", {"name": "scoring:short", "weight": 0.5}],
            "num_generations": 6,
            "prompts_per_batch": 2,
            "max_completion_length": 8,
            "required_format": None,
            "scripts": None,
            "keep_truncated": True,
            "keep_special_tokens": True,
            "cpu_threads": 1,
            "output_dir": str(tmp_path / "out"),
        }
        path = tmp_path / "run.yaml"
        merged = keys | changes
        path.write_text(yaml.safe_dump({k: v for k, v in merged.items() if v is not None}))
        return [str(SCRIPT), "--config", str(path)]

    return written


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}


def run(arguments: list[str], tmp_path: Path, *, processes: int = 0) -> Any:
    """Run the recipe by itself, or with a launcher and some processes."""
    launcher = [*LAUNCH, "--num_processes", str(processes)] if processes else [sys.executable]
    # With `--cpu`, accelerate 1.15 starts one process, whatever the number that it is given.
    launcher += {0: [], 1: ["--cpu"]}.get(processes, ["--multi_gpu"])
    return subprocess.run(
        [*launcher, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=environment(tmp_path),
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    path = str(folder / "dataset" / "train.parquet")
    found: list[dict[str, Any]] = Dataset.from_parquet(path, keep_in_memory=True).to_list()
    return found


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return {key: value for key, value in found.items() if key not in ("minutes", "versions")}


def test_recipe_writes_the_dataset_and_other_filters_need_no_model(
    write: Any, tmp_path: Path
) -> None:
    done = run(write(), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    found, counts = rows(out), summary(out)
    assert counts["prompts"] == 9
    assert counts["candidates"] == 54 == counts["kept"] + sum(counts["fell"].values())
    assert counts["kept"] == len(found) > 0
    assert counts["fell"]["wrong"] > 0
    for row in found:
        text = row["completion"][0]["content"]
        assert any(c.isdigit() for c in text)
        assert row["prompt"][0] == {"role": "system", "content": "You are a calculator."}
        assert row["rewards"] == {"digits": 1.0, "short": -len(text) / 100}
        assert row["reward"] == pytest.approx(1.0 - len(text) / 200)
        assert 0 < row["pass_rate"] <= 1
    assert "solved at least once" in done.stdout
    candidates = (out / "candidates" / "00000.jsonl").read_bytes()

    # What was sampled is chosen from again, without a model: there is none any more.
    model = write(best_n=1, balance="uniform", dataset_format="messages")
    done = run(model, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sampling:" not in done.stderr
    again = rows(out)
    assert len(again) == counts["prompts_solved"] == len({row["prompt_id"] for row in again})
    best = {row["prompt_id"]: row["completion"] for row in reversed(found)}
    assert {row["prompt_id"]: row["messages"][-1:] for row in again} == best
    assert (out / "candidates" / "00000.jsonl").read_bytes() == candidates


@pytest.mark.slow
def test_other_sampling_in_the_same_folder_is_refused(write: Any, tmp_path: Path) -> None:
    assert run(write(), tmp_path).returncode == 0
    done = run(write(seed=1), tmp_path)
    assert done.returncode == 1
    assert "seed: 0, now 1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_killed_recipe_goes_on_and_ends_as_if_it_had_not_been(write: Any, tmp_path: Path) -> None:
    slow = ["scoring:digits", {"name": "scoring:slow", "weight": 0.5}]
    arguments = write(rewards=slow, prompts_per_batch=1)
    shard = tmp_path / "out" / "candidates" / "00000.jsonl"
    running = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (shard.exists() and shard.read_bytes().count(b"\n") >= 3):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    left = shard.read_bytes()
    assert 3 <= left.count(b"\n") < 9
    shard.write_bytes(left[:-5])  # as if it had been in the middle of a line

    (tmp_path / "fast").touch()
    done = run(arguments, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert shard.read_bytes().startswith(left[: left[:-1].rindex(b"\n") + 1])

    whole = tmp_path / "whole"
    done = run([*arguments, "--output_dir", str(whole)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows(tmp_path / "out") == rows(whole)
    assert summary(tmp_path / "out") == summary(whole)
    assert shard.read_bytes() == (whole / "candidates" / "00000.jsonl").read_bytes()


@pytest.mark.slow
def test_one_and_two_processes_give_the_same_dataset(write: Any, tmp_path: Path) -> None:
    folders = [tmp_path / str(processes) for processes in (1, 2)]
    for processes, folder in enumerate(folders, start=1):
        done = run([*write(), "--output_dir", str(folder)], tmp_path, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("solved at least once") == 1
    one, two = folders
    assert rows(one) == rows(two) != []
    assert summary(one) == summary(two)
    shards = [path.read_bytes().splitlines() for path in sorted(two.glob("candidates/*.jsonl"))]
    assert [len(lines) for lines in shards] == [5, 4]  # batches of 2, 2, 1 prompts, and of 2, 2
    (alone,) = one.glob("candidates/*.jsonl")
    assert sorted(alone.read_bytes().splitlines()) == sorted(shards[0] + shards[1])


@pytest.mark.slow
def test_error_of_one_of_two_processes_ends_both_and_a_later_run_goes_on(
    write: Any, tmp_path: Path
) -> None:
    (tmp_path / "scoring.py").write_text(
        REWARDS
        + '''
def failing(*, completions, prompts, **_):
    """Fails in the second process, which has the second batch."""
    import os
    if os.environ.get("RANK") == "1":
        raise RuntimeError("the reward broke")
    return [0.0] * len(completions)
'''
    )
    arguments = write(rewards=["scoring:digits", "scoring:failing"])
    begun = time.monotonic()
    done = run(arguments, tmp_path, processes=2)
    assert done.returncode != 0
    assert "the reward broke" in done.stderr
    assert time.monotonic() - begun < 120
    assert not (tmp_path / "out" / "summary.json").exists()
    done = run(arguments, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert summary(tmp_path / "out")["prompts"] == 9


def test_reading_says_everything_that_is_wrong_at_once(write: Any) -> None:
    read = runpy.run_path(str(SCRIPT))["read"]
    with pytest.raises(ConfigurationError) as caught:
        read(write(best_n=0, best=4, scripts=["English"], use_peft=True, rewards=[])[1:])
    text = str(caught.value)
    for told in (
        "sets `best`, which is not an option",
        "`best_n` is 0",
        "'English' among its `scripts`",
        "`use_peft` is set",
        "`rewards` is empty",
    ):
        assert told in text
    assert text.startswith("5 problems")


def test_dry_run_shows_the_task_and_writes_nothing(write: Any, tmp_path: Path) -> None:
    done = run([*write(), "--dry_run"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "prompts: 9 x 6 replies of at most 8 tokens; 0 prompts are sampled" in done.stdout
    assert not (tmp_path / "out").exists()


def test_dry_run_refuses_candidates_of_other_settings(write: Any, tmp_path: Path) -> None:
    candidates = tmp_path / "out" / "candidates"
    candidates.mkdir(parents=True)
    (candidates / MADE_WITH).write_text('{"seed": 5}')
    done = run([*write(), "--dry_run"], tmp_path)
    assert done.returncode == 1
    assert "were made with other settings (" in done.stderr
    assert "seed: 5, now 0" in done.stderr


@pytest.mark.parametrize("path", [YAML], ids=["quickstart"])
def test_shipped_yaml_can_be_read(path: Path, tiny_model_dir: Path) -> None:
    read = runpy.run_path(str(SCRIPT))["read"]
    arguments = ["--config", str(path), "--model_source", "auto"]
    recipe = read([*arguments, "--model_name_or_path", str(tiny_model_dir)])
    assert recipe.options.num_generations == 16


@pytest.mark.slow
def test_nothing_kept_is_an_error_that_says_why(write: Any, tmp_path: Path) -> None:
    done = run(write(min_tokens=8, max_tokens=8, forbidden_patterns=["[0-9]"]), tmp_path)
    assert done.returncode == 1
    assert "of 54 replies is kept" in done.stderr
    assert "forbidden" in done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "summary.json").exists()
