"""What recipes share: reading and checking a YAML, stopping well; and every YAML there is."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from datasets import Dataset
from rewards.api.services import Asked, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_grpo_ext.errors import ConfigurationError, RewardOutageError
from trl_grpo_ext.evaluation import Accuracy
from trl_grpo_ext.evaluation.measuring import refuse_outage
from trl_grpo_ext.recipe import (
    read_recipe,
    run_recipe,
    set_cpu_threads,
)

ROOT = Path(__file__).parents[1]
# Of other recipes, or with a reward model that must be trained first: their tests read them.
ELSEWHERE = {"reward_model_sums", "process_model_sums", "rejection_quickstart"}
ELSEWHERE |= {"quickstart_outcome_model", "quickstart_process_model", "sft_sums"}
YAMLS = sorted(
    path
    for path in (ROOT / "recipes" / "configs").glob("*.yaml")
    if path.stem not in ELSEWHERE and not path.stem.startswith("r1_")
)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{a} + 1 =", "answer": "{a + 1}"}}\n' for a in range(12)))
    return path


@pytest.fixture
def write(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> Any:
    """Write a YAML of a run that works, with changes; ``None`` removes a key."""

    def written(**changes: Any) -> list[str]:
        keys = {
            "model_name_or_path": str(tiny_model_dir),
            "dataset": str(rows),
            "num_eval_prompts": 4,
            "rewards": ["last_number", {"name": "number_distance", "arguments": {"span": 5}}],
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_completion_length": 6,
            "bf16": False,
            "beta": 0.05,
            "reference": "quantized",
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "log_completions": True,
            "num_completions_to_print": 0,
            "report_to": "none",
            "eval_samples": 2,
            "save_strategy": "no",
            "cpu_threads": 1,
        } | changes
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}))
        return ["--config", str(path)]

    return written


def problems(arguments: list[str]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read_recipe(arguments)
    return str(caught.value)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_has_only_options_that_exist(
    path: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    # What is on the Hub is replaced by local rows of the same form.
    keys = yaml.safe_load(path.read_text())
    arguments = ["--config", str(path), "--model_name_or_path", str(tiny_model_dir)]
    arguments += ["--model_source", "auto", "--bf16", "False"]
    if not keys["dataset"].startswith("reasoning_gym:"):
        for split, numbers in (("train", range(8)), ("test", range(8, 12))):
            question = keys["prompt_column"]
            rows = [{question: f"{n} + 1 =", "answer": f"so #### {n + 1}"} for n in numbers]
            text = "\n".join(map(json.dumps, rows))
            (tmp_path / f"{split}.jsonl").write_text(text)
        arguments += ["--dataset", str(tmp_path), "--dataset_arguments", "{}"]
        arguments += ["--num_eval_prompts", "4"]
    recipe = read_recipe(arguments)
    assert recipe.training.beta > 0
    assert recipe.training.reference == keys["reference"]


def test_recipe_command_line_wins_over_yaml(write: Any) -> None:
    recipe = read_recipe([*write(learning_rate=1e-5), "--learning_rate", "3e-5"])
    assert recipe.training.learning_rate == 3e-5


def test_recipe_reports_everything_at_once(write: Any, rows: Path) -> None:
    text = problems(
        write(
            learning_rat=1e-5,
            num_generations=7,
            kl_estimator="k4",
            rewards=["last_numbr"],
            prompt_column="question",
            eval_samples=-1,
        )
    )
    assert "sets `learning_rat`, which is not an option" in text
    assert "Did you mean `learning_rate`?" in text
    assert "`num_generations`=7" in text
    assert "`kl_estimator` is 'k4'" in text
    assert "last_number" in text
    assert "`prompt_column`='question'" in text
    assert "prompt, answer" in text
    assert "`eval_samples` is -1" in text
    assert text.startswith("6 problems")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": []}, "`rewards` is empty"),
        ({"model_name_or_path": None}, "`model_name_or_path` is not set"),
        ({"model_name_or_path": "./nowhere"}, "nowhere"),
        ({"model_source": "package"}, "package"),
        ({"resume_from_checkpoint": "nowhere/checkpoint-3"}, "which is not a folder"),
        ({"reward_weights": [1.0, 2.0]}, "give each reward its `weight`"),
        ({"cpu_threads": 0}, "`cpu_threads` is 0"),
        ({"use_peft": True}, "Set `reference: auto`"),
        ({"load_in_4bit": True}, "Set `reference: auto`"),
    ],
)
def test_recipe_refuses_what_cannot_work(write: Any, changes: Any, message: str) -> None:
    assert message in problems(write(**changes))


def test_recipe_refuses_an_output_dir_that_cannot_be_made(write: Any, tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("")
    path = tmp_path / "a_file" / "run"
    message = f"`output_dir` is {path}, but {tmp_path / 'a_file'} is a file, so"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        read_recipe([*write(), "--output_dir", str(path)])


@pytest.mark.skipif(os.access("/", os.W_OK), reason="this user may write everywhere")
def test_recipe_refuses_an_output_dir_that_may_not_be_written_to(write: Any) -> None:
    with pytest.raises(ConfigurationError, match="but / may not be written to"):
        read_recipe([*write(), "--output_dir", "/run_of_trl_grpo_ext"])


def test_recipe_refuses_a_yaml_that_is_not_there_or_no_mapping(tmp_path: Path) -> None:
    assert "is not a file" in problems(["--config", str(tmp_path / "none.yaml")])
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "is not a mapping" in problems(["--config", str(tmp_path / "list.yaml")])
    (tmp_path / "broken.yaml").write_text("a: [1")
    assert "is not YAML" in problems(["--config", str(tmp_path / "broken.yaml")])
    assert "needs a file" in problems(["--config"])
    assert "Write `--config FILE`" in problems(["--config=run.yaml"])


def test_recipe_refuses_a_flag_that_does_not_exist(write: Any) -> None:
    assert "--no_such_flag" in problems([*write(), "--no_such_flag", "1"])


def test_recipe_settings_are_what_was_given_and_hold_no_token(write: Any) -> None:
    settings = read_recipe([*write(hub_token="hf_secret"), "--seed", "5"]).settings
    assert settings["seed"] == 5
    assert settings["num_generations"] == 4
    assert settings["reference"] == "quantized"
    assert "temperature" not in settings
    assert "hf_secret" not in str(settings)


def test_set_cpu_threads_shares_the_cores_only_where_the_launcher_left_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    monkeypatch.setattr("trl_grpo_ext.recipe._num_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    set_cpu_threads(None)
    assert chosen == []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    set_cpu_threads(None)
    set_cpu_threads(1)
    assert chosen == [4, 1]
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    set_cpu_threads(None)
    assert chosen == [4, 1]


# The script itself ----------------------------------------------------------------------------


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]
LAUNCH += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0"]


def processes_on_cpu(number: int) -> list[str]:
    """With `--cpu`, accelerate 1.15 starts one process, whatever the number that it is given."""
    return ["--cpu" if number == 1 else "--multi_gpu", "--num_processes", str(number)]


def run(arguments: list[str], *, processes: int = 1) -> subprocess.CompletedProcess[str]:
    script = [str(ROOT / "recipes" / "grpo.py"), *arguments]
    return subprocess.run(
        [*LAUNCH, *processes_on_cpu(processes), *script],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_grpo_recipe_dry_run_loads_no_model(write: Any, tmp_path: Path) -> None:
    done = run([*write(), "--dry_run"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "training prompts: 8, held out: 4" in done.stdout
    assert "no model was loaded" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_rank": 33}, "`reference_rank` is 33, but model.layers.0."),
        ({"reference_keep_modules": ["up"]}, "`reference_keep_modules` names 'up', but Llama"),
    ],
)
def test_a_dry_run_holds_the_reference_to_the_layers_of_the_model(
    options: dict[str, Any], message: str, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rank = {"reference_compensation": "low_rank"} if "reference_rank" in options else {}
    given = write(reference="quantized", beta=0.1, **options, **rank)
    assert run_recipe(lambda _: 0, [*given, "--dry_run"]) == 1
    assert message in capsys.readouterr().err


def test_grpo_recipe_prints_the_problems_without_a_traceback(write: Any) -> None:
    done = run(write(kl_estimator="k4"))
    assert done.returncode != 0
    assert "`kl_estimator` is 'k4', which is not known. Use one of: k1, k2, k3." in done.stderr


def test_grpo_recipe_trains_and_leaves_what_it_promises(write: Any, tmp_path: Path) -> None:
    done = run(write())
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2
    assert 0 <= summary["accuracy_before"] <= 1
    assert 0 <= summary["accuracy_after"] <= 1
    assert summary["minutes"] > 0
    assert summary["versions"]["trl"]
    assert f"Accuracy before: {summary['accuracy_before']:.3f} (8 replies to 4" in done.stdout
    for plot in ("reward", "kl", "length", "grad_norm", "time"):
        assert (out / "plots" / f"{plot}.png").read_bytes()[:4] == b"\x89PNG"
    assert "plots/reward.png" in (out / "report.md").read_text()
    completions = pandas.read_parquet(out / "completions" / "completions_00002.parquet")
    assert len(completions) == 8
    assert {"prompt", "completion", "last_number", "advantage"} <= set(completions.columns)
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(out).eos_token


def test_grpo_recipe_saves_on_ctrl_c_and_resumes(write: Any, tmp_path: Path) -> None:
    arguments = write(max_steps=300, num_eval_prompts=0)
    # As `make quickstart` does it: the launcher ignores Ctrl-C, which a terminal sends to all.
    launcher = shlex.join([*LAUNCH, *processes_on_cpu(1)])
    script = f"trap '' INT; {launcher} {ROOT}/recipes/grpo.py {shlex.join(arguments)}"
    with subprocess.Popen(
        ["sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step "):
                os.killpg(process.pid, signal.SIGINT)
                break
        lines += process.stdout.readlines()
    output = "".join(lines)
    assert process.returncode != 0
    assert "exit status 130" in output
    assert "SIGINT: stopping at the next safe point, then saving a checkpoint" in output
    step = int(re.search(r"Saved \S+/checkpoint-(\d+)", output)[1])
    assert 1 <= step < 300
    goal = ["--max_steps", str(step + 2), "--resume_from_checkpoint", "last-good"]
    done = run([*arguments, *goal])
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == step + 2


@pytest.mark.slow
def test_grpo_recipe_runs_with_two_processes(write: Any, tmp_path: Path) -> None:
    done = run(write(per_device_train_batch_size=4), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["num_processes"], summary["steps"]) == (2, 2)
    assert done.stdout.count("Accuracy after") == 1


KEY = "sk-nobody/may+see=this"


def test_a_run_leaves_no_key_behind(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in logs, checkpoints, cards, tables, cache or errors, though the service says it."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    written = [KEY, urllib.parse.quote(KEY, safe=""), base64.b64encode(KEY.encode()).decode()]
    asked = []

    def answer(request: Asked) -> Any:
        asked.append(request.headers["Authorization"])
        if len(asked) > 60:
            return 401, {}, f"no longer valid: {' '.join(written)}".encode()
        if len(asked) % 5 == 0:
            return 503, {"X-Key": KEY}, f"overloaded, {written}".encode()
        return 200, {}, json.dumps({"score": len(request.payload["text"]), "you": KEY}).encode()

    arguments = {
        "protocol": "generic_json",
        "template": {"text": "{completion}"},
        "score_path": "score",
        "api_key_env": "JUDGE_KEY",
        "backoff_s": 0.001,
        "cache_dir": str(tmp_path / "scores"),
    }
    with serving(answer) as service:
        rewards = [
            "last_number",
            {"name": "api", "arguments": {"base_url": service.url, **arguments}},
        ]
        options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
        done = run(write(rewards=rewards, **options))
    assert asked[0] == f"Bearer {KEY}"
    assert done.returncode == 1
    assert "HTTP 401: no longer valid" in done.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in left}
    assert {"metrics.jsonl", "trainer_state.json", "run_state_0.pt", "cache.db"} <= names
    tables = [pandas.read_parquet(path) for path in left if path.suffix == ".parquet"]
    assert tables
    told = [path.read_bytes() for path in left]
    told += [table.to_csv().encode() for table in tables]
    told += [done.stdout.encode(), done.stderr.encode()]
    for text in told:
        for form in written:
            assert form.encode() not in text


def test_an_accuracy_without_scores_is_refused(write: Any, tmp_path: Path) -> None:
    """Before training, so that nothing is lost; afterwards the model is saved already."""
    with serving(lambda _: (503, {}, b"")) as service:
        options = {"protocol": "openrlhf", "backoff_s": 0.001, "max_attempts": 2}
        reward = {"name": "api", "arguments": {"base_url": service.url, **options}}
        dry, done = run([*write(rewards=[reward]), "--dry_run"]), run(write(rewards=[reward]))
    assert "Not asked: the reward services" in dry.stdout
    assert done.returncode == 1
    assert "has no score for 8 of the 8 replies" in done.stderr
    assert "(HTTP 503)" in done.stderr
    assert "step 1/2" not in done.stdout


def test_gates_of_rewards_that_are_not_there_are_found_by_a_dry_run(write: Any) -> None:
    done = run([*write(reward_gates={"formatt": 1.0}), "--dry_run"])
    assert done.returncode != 0
    assert "`reward_gates` names 'formatt', but the rewards of this run are" in done.stderr


def test_ctrl_c_outside_of_training_is_told_without_a_traceback(
    write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(recipe: Any) -> int:
        raise KeyboardInterrupt

    assert run_recipe(interrupted, write()) == 130
    assert capsys.readouterr().err.endswith("the same command starts again.\n")


class OfCode:
    """A reward of rows with tests; its service does not answer."""

    on_missing, __name__, failure = "exclude", "code", "HTTP 503"

    def applies(self, row: Any) -> bool:
        return row["tests"] is not None


def test_rows_that_a_reward_does_not_apply_to_are_no_outage() -> None:
    rows = Dataset.from_dict({"prompt": ["a", "b", "c"], "tests": ["t", None, "t"]})

    def measured(*scores: float | None) -> Accuracy:
        return Accuracy(
            accuracy=1.0, num_prompts=3, num_scored=0, completions=[""] * 6, scores=list(scores)
        )

    kept = measured(1.0, 0.0, None, None, 1.0, None)  # two replies a prompt
    refuse_outage(kept, OfCode(), rows, most=0.25)
    assert kept.num_scored_prompts == 2
    with pytest.raises(RewardOutageError, match="no score for 2 of the 4 replies"):
        refuse_outage(measured(1.0, None, None, None, 1.0, None), OfCode(), rows, most=0.25)
