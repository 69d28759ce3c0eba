"""The command line, called in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from trl.trainer.grpo_trainer import GRPOTrainer
from typer.testing import CliRunner

from trl_grpo_ext import __version__
from trl_grpo_ext.cli import app, recipe_files, recipes_folder

RUN = CliRunner()
ROOT = Path(__file__).parent.parent


def test_version_prints_that_of_the_package() -> None:
    result = RUN.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"{__version__}\n")


def test_no_arguments_shows_the_commands() -> None:
    shown = RUN.invoke(app, []).output
    assert all(command in shown for command in ("env", "recipes"))


def test_env_json_reports_versions_devices_and_features() -> None:
    result = RUN.invoke(app, ["env", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["versions"]["trl"] == version("trl")
    assert report["versions"]["torch"] == version("torch")
    assert report["devices"][0]["name"] == "cpu"
    assert report["features"][0]["name"] == "trainer"
    assert report["features"][0]["usable"] is True


def test_env_table_names_every_feature_and_why() -> None:
    result = RUN.invoke(app, ["env"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for text in ("trainer", f"trl {version('trl')}", "NF4 on", "HF_HUB_OFFLINE is set", "vLLM"):
        assert text in result.stdout


def test_env_exits_1_and_names_the_member_when_trl_breaks_the_contract(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    result = RUN.invoke(app, ["env", "--json"])
    trainer = json.loads(result.stdout)["features"][0]
    assert result.exit_code == 1
    assert trainer["usable"] is False
    assert "_calculate_rewards" in trainer["detail"]
    assert "Install 'trl>=1.16,<1.17'" in trainer["detail"]


def test_recipes_are_those_of_the_checkout() -> None:
    assert recipes_folder() == ROOT / "recipes"
    assert Path("grpo.py") in recipe_files(ROOT / "recipes")
    assert Path("configs/quickstart.yaml") in recipe_files(ROOT / "recipes")


def test_recipes_list_says_what_each_does() -> None:
    result = RUN.invoke(app, ["recipes", "list"], env={"COLUMNS": "200"})
    first_line = (ROOT / "recipes" / "grpo.py").read_text().splitlines()[0]
    assert result.exit_code == 0
    assert first_line.strip('"') in result.stdout
    assert "configs/quickstart.yaml" in result.stdout


def test_recipes_copy_writes_every_file_and_says_what_to_run(tmp_path: Path) -> None:
    target = tmp_path / "new" / "mine"
    result = RUN.invoke(app, ["recipes", "copy", str(target)])
    assert result.exit_code == 0
    for path in recipe_files(ROOT / "recipes"):
        assert (target / path).read_bytes() == (ROOT / "recipes" / path).read_bytes()
    command = f"accelerate launch {target}/grpo.py --config {target}/configs/quickstart.yaml"
    assert command in result.stdout


def test_recipes_copy_keeps_an_edited_file_unless_forced(tmp_path: Path) -> None:
    edited = tmp_path / "grpo.py"
    edited.write_text("mine")
    refused = RUN.invoke(app, ["recipes", "copy", str(tmp_path)])
    assert refused.exit_code == 1
    assert "already has grpo.py" in refused.stderr
    assert "--force" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["grpo.py"]
    assert edited.read_text() == "mine"

    forced = RUN.invoke(app, ["recipes", "copy", str(tmp_path), "--force"])
    assert forced.exit_code == 0
    assert edited.read_bytes() == (ROOT / "recipes" / "grpo.py").read_bytes()


def test_recipes_copy_names_the_problem_when_the_target_is_a_file(tmp_path: Path) -> None:
    target = tmp_path / "occupied"
    target.write_text("")
    result = RUN.invoke(app, ["recipes", "copy", str(target)], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "occupied' is a file" in result.stderr


def test_console_script_runs_the_command_line() -> None:
    script = Path(sys.executable).with_name("trl-grpo-ext")
    if not script.exists():
        pytest.skip("the package is not installed here, only on sys.path")
    shown = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"{__version__}\n"
