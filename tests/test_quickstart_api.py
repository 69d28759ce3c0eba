"""The quickstart with its reward over HTTP is the quickstart."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml
from rewards.serve.client import Client, until

from trl_grpo_ext.recipe import read_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
SERVED = "http://127.0.0.1:8000"


def keys_of(name: str) -> dict[str, Any]:
    keys: dict[str, Any] = yaml.safe_load((RECIPES / "configs" / f"{name}.yaml").read_text())
    return keys


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Where the server of the YAML's header answers, in another process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "trl_grpo_ext.cli", "serve-reward", "--reward", "last_number"]
    with subprocess.Popen([*command, "--port", str(port)]) as server:
        try:
            until(lambda: is_up(port), timeout_s=60)
            yield port
        finally:
            server.terminate()


def is_up(port: int) -> bool:
    try:
        return Client(port).get("/health").status == 200
    except OSError:
        return False


def short_run(name: str, *, port: int, folder: Path, model: Path) -> list[dict[str, float]]:
    """Train the tiny model as a YAML of the quickstart says, and return the log of the steps."""
    config = folder / f"{name}.yaml"
    text = (RECIPES / "configs" / config.name).read_text()
    config.write_text(text.replace(SERVED, f"http://127.0.0.1:{port}"))
    arguments = ["--config", str(config), "--model_name_or_path", str(model)]
    arguments += ["--model_source", "auto", "--max_steps", "3", "--output_dir", str(folder / name)]
    recipe = read_recipe([*arguments, "--disable_tqdm", "true"])
    spec = spec_from_file_location("grpo", RECIPES / "grpo.py")
    grpo = module_from_spec(spec)
    spec.loader.exec_module(grpo)
    trainer = grpo.build_trainer(recipe, grpo.load_task(recipe.task))
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_quickstart_over_http_differs_from_the_quickstart_in_the_first_reward_only() -> None:
    local, served = keys_of("quickstart"), keys_of("quickstart_api")
    (first, *others), (service, *same) = local.pop("rewards"), served.pop("rewards")
    assert others == same
    assert (first["name"], first["weight"]) == ("last_number", service["weight"])
    assert service["name"] == "api"
    assert service["arguments"]["base_url"] == SERVED  # where serve-reward listens by default
    assert local.pop("output_dir") != served.pop("output_dir")
    assert local == served


def test_quickstart_over_http_trains_as_the_quickstart_does(
    port: int, tmp_path: Path, tiny_model_dir: Path
) -> None:
    local, served = (
        short_run(name, port=port, folder=tmp_path, model=tiny_model_dir)
        for name in ("quickstart", "quickstart_api")
    )
    assert len(served) == 3
    assert any(step["rewards/last_number/mean"] > 0 for step in served)
    assert all(step["rewards/last_number/requests"] > 0 for step in served)
    for mine, theirs in zip(local, served, strict=True):
        compared = {key for key in mine if "time" not in key and "per_second" not in key}
        assert {"loss", "grad_norm", "kl", "reward", "rewards/last_number/mean"} <= compared
        assert {key: mine[key] for key in compared} == {key: theirs[key] for key in compared}
