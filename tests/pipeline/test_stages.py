"""The stages of the three-stage recipe: their settings, when they are complete, what they say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.pipeline.options import STAGE_KEYS, R1Arguments, r1_problems
from trl_grpo_ext.pipeline.results import summarize_stages, table_rows, write_results
from trl_grpo_ext.pipeline.stages import (
    Stage,
    distinct,
    make_stages,
    missing_stages,
    set_aside_outdated,
)
from trl_grpo_ext.recipe import read_recipe

ROOT = Path(__file__).parents[2]

SHARED = {"model_name_or_path": "tiny", "model_source": "package", "dataset": "rows.jsonl"}


def stages(tmp_path: Path, **changes: Any) -> dict[str, Stage]:
    options = R1Arguments(output_dir=str(tmp_path), seed=3, **changes)
    return {stage.name: stage for stage in make_stages(options, SHARED)}


def test_each_stage_starts_from_what_the_one_before_it_made(tmp_path: Path) -> None:
    made = stages(tmp_path, sft={"solver": "sums"}, grpo={"max_steps": 2, "seed": 7})
    assert list(made) == [
        "evaluation/base",
        "sft",
        "evaluation/sft",
        "grpo",
        "evaluation/grpo",
        "rejection",
        "rejection_sft",
        "evaluation/rejection_sft",
    ]
    models = {name: stage.settings["model_name_or_path"] for name, stage in made.items()}
    assert models == {
        "evaluation/base": "tiny",
        "sft": "tiny",
        "evaluation/sft": str(tmp_path / "sft"),
        "grpo": str(tmp_path / "sft"),
        "evaluation/grpo": str(tmp_path / "grpo"),
        "rejection": str(tmp_path / "grpo"),
        "rejection_sft": str(tmp_path / "sft"),
        "evaluation/rejection_sft": str(tmp_path / "rejection_sft"),
    }
    assert made["rejection_sft"].settings["traces"] == str(tmp_path / "rejection" / "dataset")
    assert made["sft"].settings["solver"] == "sums"
    assert "solver" not in made["rejection_sft"].settings
    assert (made["grpo"].settings["seed"], made["sft"].settings["seed"]) == (7, 3)
    assert made["grpo"].settings["max_steps"] == 2
    from_base = stages(tmp_path, rejection_sft_from="base")["rejection_sft"]
    assert from_base.settings["model_name_or_path"] == "tiny"
    assert from_base.settings["model_source"] == "package"


def test_what_is_not_there_yet_has_stand_ins_in_a_check(tmp_path: Path) -> None:
    made = stages(tmp_path, sft={"solver": "sums"})
    real = yaml.safe_load(made["rejection_sft"].to_yaml())
    checked = yaml.safe_load(made["rejection_sft"].to_yaml(checkable=True))
    assert (real["model_source"], checked["model_source"]) == ("auto", "package")
    assert checked["model_name_or_path"] == "tiny"
    assert "traces" not in checked
    assert checked["solver"] == "sums"
    assert [stage.name for stage in distinct(list(made.values()))] == [
        "evaluation/base",
        "sft",
        "grpo",
        "rejection",
        "rejection_sft",
    ]


def test_a_stage_is_complete_with_its_summary_and_the_same_settings(tmp_path: Path) -> None:
    stage, other = (stages(tmp_path, grpo=own)["grpo"] for own in ({}, {"max_steps": 5}))
    assert not stage.is_complete()
    stage.write_settings()
    assert not stage.is_complete()
    assert not other.is_complete()  # nothing was made with the settings that are there
    (stage.folder / "checkpoint-1").mkdir()
    assert not stage.is_complete()
    with pytest.raises(ConfigurationError, match=r"other settings \(`max_steps` differ\)"):
        other.is_complete()
    (stage.folder / "summary.json").write_text("{}")
    assert stage.is_complete()
    with pytest.raises(ConfigurationError, match=r"other settings \(`max_steps` differ\)"):
        other.is_complete()


def complete(*made: Stage) -> None:
    for stage in made:
        stage.write_settings()
        (stage.folder / "summary.json").write_text("{}")


@pytest.mark.parametrize("left", ["", "model_name_or_path: [", "- a list"])
def test_a_stage_whose_settings_cannot_be_read_is_refused(tmp_path: Path, left: str) -> None:
    stage = stages(tmp_path)["sft"]
    stage.write_settings()
    (stage.folder / "checkpoint-1").mkdir()
    assert not stage.is_complete()
    (stage.folder / "stage.yaml").write_text(left)
    with pytest.raises(ConfigurationError, match="was made with other settings"):
        stage.is_complete()


def test_a_kill_while_settings_are_first_written_leaves_no_stage(tmp_path: Path) -> None:
    stage = stages(tmp_path)["sft"]
    stage.folder.mkdir(parents=True)
    (stage.folder / ".stage.yaml").write_text("half of")
    assert not stage.is_complete()
    stage.write_settings()
    assert [path.name for path in stage.folder.iterdir()] == ["stage.yaml"]


def test_what_was_made_from_an_output_that_is_made_again_is_moved_aside(tmp_path: Path) -> None:
    made = stages(tmp_path)
    complete(*made.values())
    assert missing_stages(list(made.values())) == []
    # The user runs stage 1 again, with another rate: all that came from it is outdated.
    changed = stages(tmp_path, sft={"learning_rate": 1.0e-5})
    (tmp_path / "sft").rename(tmp_path / "sft_of_before")
    missing = missing_stages(list(changed.values()))
    assert [stage.name for stage in missing] == list(made)[1:]
    moved = set_aside_outdated(missing)
    names = [str(path.relative_to(tmp_path)) for path in moved]
    assert names == [f"{name}.earlier-1" for name in list(made)[2:]]
    assert (tmp_path / "grpo.earlier-1" / "summary.json").is_file()
    assert not (tmp_path / "grpo").exists()
    assert (tmp_path / "evaluation" / "base").exists()


def test_an_evaluation_that_is_missing_runs_alone(tmp_path: Path) -> None:
    made = stages(tmp_path)
    complete(*made.values())
    (made["evaluation/sft"].folder / "summary.json").unlink()
    missing = missing_stages(list(made.values()))
    assert [stage.name for stage in missing] == ["evaluation/sft"]
    assert set_aside_outdated(missing) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grpo": "max_steps"}, "`grpo` is 'max_steps', which is no mapping"),
        ({"sft": ["a"]}, "`sft` is ['a'], which is no mapping"),
        ({"rejection_sft": {"traces": "x"}}, "`rejection_sft` sets `traces`"),
        ({"rejection_sft": {"solver": "sums"}}, "`rejection_sft` sets `solver`"),
        ({"grpo": '{"output_dir": "x"}'}, "`grpo` sets `output_dir`"),
        ({"grpo": {"model_name_or_path": "x"}}, "`grpo` sets `model_name_or_path`"),
        ({"evaluation": {"num_eval_prompts": 1}}, "would hold out other prompts"),
        ({"sft": {"hub_token": "hf_x"}}, "set HF_TOKEN in the environment"),
        ({"sft": {"use_peft": True}}, "sft sets `use_peft`, but the next stage"),
    ],
)
def test_problems_of_the_mappings(changes: dict[str, Any], message: str) -> None:
    (problem,) = r1_problems(R1Arguments(output_dir="out", **changes))
    assert message in problem


def measured(greedy: float | None, low: float, high: float) -> dict[str, float | None]:
    return {
        "greedy/accuracy": greedy,
        "greedy/accuracy/low": low,
        "greedy/accuracy/high": high,
        "pass@4": 0.75,
        "pass@4/low": 0.5,
        "pass@4/high": 1.0,
    }


def test_results_say_what_each_stage_was_worth(tmp_path: Path) -> None:
    made = list(stages(tmp_path).values())
    for name, values in (("base", (0.1, 0.0, 0.2)), ("sft", (0.4, 0.3, 0.5))):
        folder = tmp_path / "evaluation" / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(
            json.dumps({"metrics": measured(*values), "minutes": 1.0})
        )
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "summary.json").write_text(json.dumps({"minutes": 2.5}))
    summary = summarize_stages(made, seed=3, num_processes=2)
    assert summary["accuracy"] == {"base": 0.1, "sft": 0.4}
    assert summary["accuracy_interval"] == {"base": [0.0, 0.2], "sft": [0.3, 0.5]}
    assert summary["minutes"] == 4.5
    assert table_rows(summary) == [
        ("base", "0.100 (0.000 to 0.200)", "0.750 (0.500 to 1.000)", ""),
        ("1: SFT", "0.400 (0.300 to 0.500)", "0.750 (0.500 to 1.000)", "2.5"),
    ]
    report = write_results(tmp_path, summary, made)
    assert "0.400 (0.300 to 0.500)" in report.read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["accuracy"]["sft"] == 0.4
    assert (tmp_path / "plots" / "accuracy_by_stage.png").read_bytes()[:4] == b"\x89PNG"


R1_YAMLS = sorted((ROOT / "recipes" / "configs").glob("r1_*.yaml"))


@pytest.mark.parametrize("path", R1_YAMLS, ids=lambda path: path.stem)
def test_every_stage_of_a_shipped_yaml_is_one_that_its_recipe_takes(
    path: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    keys = yaml.safe_load(path.read_text())
    own = {name: keys.pop(name) for name in (*STAGE_KEYS, "rejection_sft_from") if name in keys}
    options = R1Arguments(output_dir=str(tmp_path / "out"), **own)
    shared = {key: value for key, value in keys.items() if key not in ("output_dir", "seed")}
    shared |= {"model_name_or_path": str(tiny_model_dir), "model_source": "auto"}
    if not shared["dataset"].startswith("reasoning_gym:"):
        shared |= local_rows(tmp_path)
    for stage in distinct(make_stages(options, shared)):
        settings = yaml.safe_load(stage.to_yaml(checkable=True))
        # What needs a GPU, vLLM or thousands of rows is left out.
        for key in ("use_vllm", "num_traces", "num_train_prompts", "eval_dataset_split", "bf16"):
            settings.pop(key, None)
        settings |= {"num_eval_prompts": 4, **({"bf16": False} if "optim" not in settings else {})}
        if stage.recipe in ("evaluation", "rejection_sampling"):
            settings.pop("bf16")
        config = tmp_path / "stage.yaml"
        config.write_text(yaml.safe_dump(settings))
        recipe = runpy.run_path(str(ROOT / "recipes" / f"{stage.recipe}.py"))
        read = recipe.get("read") or read_recipe
        assert read(["--config", str(config)])


def local_rows(folder: Path) -> dict[str, Any]:
    """Write rows of the form that the shipped YAMLs read from the Hub."""
    rows = [
        {
            name: f"{n} + 1 = so\n#### {n + 1}" if name == "answer" else f"{n} + 1 ="
            for name in ("question", "problem", "answer", "solution")
        }
        for n in range(12)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"dataset": str(folder / "train.jsonl"), "dataset_arguments": {}}
