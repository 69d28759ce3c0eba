"""Models by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trl_grpo_ext.errors import ModelPreparationError
from trl_grpo_ext.memory import model_shape
from trl_grpo_ext.memory.models import (
    KnownModel,
    find_known,
    known_models,
    nominal_parameters,
    num_parameters,
    planned_config,
)


@pytest.mark.parametrize("model", known_models(), ids=lambda model: model.name)
def test_known_model_has_the_parameters_that_were_published(model: KnownModel) -> None:
    assert model_shape(planned_config(model.name)).num_parameters == model.parameters


def test_known_names_and_aliases_are_told_apart() -> None:
    names = [name for model in known_models() for name in (model.name, *model.aliases)]
    assert len(names) == len(set(names))
    for model in known_models():
        assert all(find_known(name) is model for name in (model.name, *model.aliases))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Meta-Llama-3-70B"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "Qwen/Qwen2.5-7B"),
        ("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B"),
        ("google/gemma-2-9b-it", "google/gemma-2-9b"),
        ("Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
    ],
)
def test_find_known_looks_at_neither_owner_nor_training(name: str, expected: str) -> None:
    known = find_known(name)
    assert known is not None
    assert known.name == expected


def test_planned_config_reads_a_folder_and_a_file(tiny_model_dir: Path) -> None:
    from_folder = planned_config(str(tiny_model_dir))
    from_file = planned_config(str(tiny_model_dir / "config.json"))
    written = json.loads((tiny_model_dir / "config.json").read_text())
    assert from_folder.hidden_size == from_file.hidden_size == written["hidden_size"]


def test_planned_config_prefers_a_folder_to_a_known_name(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Qwen2.5-7B").symlink_to(tiny_model_dir)
    monkeypatch.chdir(tmp_path)
    assert planned_config("Qwen2.5-7B").hidden_size != 3584


def test_planned_config_names_near_matches_of_an_unknown_model() -> None:
    with pytest.raises(ModelPreparationError) as raised:
        planned_config("Qwen2.5-8B")
    message = str(raised.value)
    assert "'Qwen2.5-8B' is none of the" in message
    assert "so there is nothing to plan for" in message
    assert "Did you mean Qwen2.5-" in message
    assert "Qwen2.5-7B" in message
    assert "a folder with a config.json" in message


def test_planned_config_says_what_the_hub_answered() -> None:
    with pytest.raises(ModelPreparationError, match=r"no configuration: OSError: .*Or give"):
        planned_config("nobody/no-such-model")


def test_planned_config_refuses_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelPreparationError, match="no configuration"):
        planned_config(str(tmp_path))


def test_num_parameters_takes_names_and_sizes() -> None:
    assert num_parameters("7B") == 7 * 10**9
    assert num_parameters("350m") == 350 * 10**6
    assert num_parameters("1.5B") == 1_500_000_000
    assert num_parameters("SmolLM2-135M") == 134_515_008


@pytest.mark.parametrize(
    ("name", "counted", "expected"),
    [
        ("meta-llama/Meta-Llama-3-70B", 70_553_706_496, 70 * 10**9),
        ("Qwen3-30B-A3B", 30_532_122_624, 30 * 10**9),  # not 3 billion
        ("Mixtral-8x7B", 46_702_792_704, 46_702_792_704),  # neither 7 nor 56 billion
        ("SmolLM2-135M", 134_515_008, 135 * 10**6),
        ("/models/mine", 123, 123),
    ],
)
def test_nominal_parameters_are_those_of_the_name_where_it_tells_them(
    name: str, counted: int, expected: int
) -> None:
    assert nominal_parameters(name, counted=counted) == expected
