"""The command line, called in this process."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
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
    assert all(command in shown for command in ("env", "plan", "recipes"))


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


def test_plan_prints_the_comparison_a_verdict_and_yaml() -> None:
    asked = ["--model", "Llama-3-70B", "--gpus", "8", "--gpu-memory-gb", "80", "--ppo"]
    result = RUN.invoke(app, ["plan", *asked], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    for text in ("140 + 140 + 140 + 140 = 560", "140 + 35 = 175", "value model (PPO)", "Verdict:"):
        assert text in result.stdout
    assert "model_name_or_path: meta-llama/Meta-Llama-3-70B" in result.stdout


def test_plan_passes_every_option_on(tmp_path: Path) -> None:
    options = {
        "model": "Qwen3-8B",
        "gpus": 4,
        "gpu-memory-gb": 48,
        "host-memory-gb": 500,
        "reserve": 0.2,
        "dtype": "bfloat16",
        "optimizer": "sgd",
        "sharding": "zero2",
        "micro-batch": 2,
        "gradient-accumulation": 6,
        "num-generations": 4,
        "prompt-tokens": 300,
        "completion-tokens": 700,
        "reference": "quantized",
        "reference-quantization": "fp4",
        "reference-block-size": 128,
        "reference-rank": 16,
        "reference-embedding-bits": 8,
        "reward": "7B",
        "plot": tmp_path / "plan.png",
    }
    flags = ["--no-gradient-checkpointing", "--no-reference-double-quantization", "--shared-prefix"]
    given = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    result = RUN.invoke(app, ["plan", *given, *flags, "--json"])
    plan = json.loads(result.stdout)
    assert plan["settings"] == {
        "num_gpus": 4,
        "dtype": "bfloat16",
        "optimizer": "sgd",
        "sharding": "zero2",
        "lora_rank": 0,
        "gradient_checkpointing": False,
        "micro_batch": 2,
        "num_generations": 4,
        "generation_batch": 12,
        "prompt_tokens": 300,
        "completion_tokens": 700,
        "reference": "quantized",
        "storage": {
            "quantization": "fp4",
            "block_size": 128,
            "double_quantization": False,
            "rank": 16,
            "bits": None,
            "embedding_bits": 8,
        },
        "reward_parameters": 7 * 10**9,
        "has_value_model": False,
        "shared_prefix": True,
    }
    assert (plan["gpu_bytes"], plan["usable_bytes"]) == (48 * 10**9, 38_400_000_000)
    assert (tmp_path / "plan.png").stat().st_size > 0


def test_plan_takes_bits_or_a_rank() -> None:
    bits = ["plan", "--model", "Qwen3-8B", "--reference", "quantized", "--reference-bits", "4.5"]
    plan = json.loads(RUN.invoke(app, [*bits, "--json"]).stdout)
    assert plan["settings"]["storage"]["bits"] == 4.5
    both = RUN.invoke(app, [*bits, "--reference-rank", "16"])
    assert both.exit_code == 1
    assert "--reference-rank and --reference-bits are both set" in both.stderr


def test_plan_by_default_is_of_the_first_reference_that_fits() -> None:
    asked = ["plan", "--model", "Qwen2.5-1.5B", "--gpu-memory-gb", "40", "--json"]
    auto = json.loads(RUN.invoke(app, asked).stdout)
    assert (auto["fits"], auto["settings"]["reference"]) == (True, "streamed")
    named = json.loads(RUN.invoke(app, [*asked, "--reference", "resident"]).stdout)
    assert (named["fits"], named["settings"]["reference"]) == (False, "resident")
    assert named["suggestion"]["settings"] == auto["settings"]


def test_plan_says_what_is_wrong_with_the_path_of_a_plot(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "plan.png", tmp_path / "plan.doc"):
        result = RUN.invoke(app, ["plan", "--model", "Llama-3-8B", "--plot", str(path)])
        assert result.exit_code == 1
        assert f"{path} could not be written" in result.stderr
        assert "Name a .png, .pdf or .svg in a folder that exists." in result.stderr


def test_plan_takes_the_adapter_as_reference_where_there_is_one() -> None:
    result = RUN.invoke(app, ["plan", "--model", "Qwen3-8B", "--lora", "16", "--json"])
    plan = json.loads(result.stdout)
    assert (plan["settings"]["reference"], plan["settings"]["lora_rank"]) == ("adapter", 16)


def test_plan_takes_a_reward_model_of_the_size_of_the_policy() -> None:
    result = RUN.invoke(app, ["plan", "--model", "Qwen3-8B", "--reward", "model", "--json"])
    plan = json.loads(result.stdout)
    assert plan["settings"]["reward_parameters"] == plan["num_parameters"] == 8_190_735_360
    assert plan["stages"]["none"]["parts"]["reward"] == 2 * 8_190_735_360


def test_plan_names_what_is_wrong_all_at_once() -> None:
    bad = ["--dtype", "fp8", "--sharding", "zero4"]
    result = RUN.invoke(app, ["plan", "--model", "Qwen3-8B", *bad])
    assert result.exit_code == 1
    assert "2 problems" in result.stderr
    assert "--dtype is 'fp8', which is not known" in result.stderr
    assert "Use one of: none, zero1, zero2, zero3, fsdp" in result.stderr


def test_plan_names_near_matches_of_an_unknown_model() -> None:
    result = RUN.invoke(app, ["plan", "--model", "Llama-3-71B"])
    assert result.exit_code == 1
    assert "Did you mean Meta-Llama-3-70B" in result.stderr


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


def test_serve_reward_needs_one_model_or_one_reward() -> None:
    for given in ([], ["--model", "folder", "--reward", "last_number"]):
        result = RUN.invoke(app, ["serve-reward", *given])
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert "`--model`" in result.stderr or "`model`" in result.stderr


def test_check_reward_asks_the_service_of_a_yaml(tmp_path: Path) -> None:
    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            scores = [float("4" in text.rpartition("?")[2]) for text in asked["query"]]
            body = json.dumps({"rewards": scores}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    config = tmp_path / "recipe.yaml"
    with HTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        arguments = {"base_url": f"http://127.0.0.1:{server.server_port}", "protocol": "openrlhf"}
        config.write_text(yaml.safe_dump({"rewards": [{"name": "api", "arguments": arguments}]}))
        shown = RUN.invoke(app, ["check-reward", "--config", str(config), "--column", "answer=4"])
        found = RUN.invoke(app, ["check-reward", "--config", str(config), "--json"])
        server.shutdown()
    assert shown.exit_code == 0, shown.output
    assert "score 1.0 for '2 + 2 is 4.'" in shown.stdout
    assert "score 0.0 for 'I would rather not say.'" in shown.stdout
    assert [score for one in json.loads(found.stdout) for score in one["scores"]] == [1.0, 0.0]
    config.write_text("rewards: [last_number]")
    refused = RUN.invoke(app, ["check-reward", "--config", str(config)])
    assert refused.exit_code == 1
    assert "None of the `rewards` is from an API" in refused.stderr
