"""What changes when something does that decides about the candidates, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from trl import ModelConfig

from trl_grpo_ext.rejection.options import RejectionArguments
from trl_grpo_ext.rejection.provenance import made_with, prompt_ids, weights_digest

REWARD = {"name": "math", "weight": 1.0, "arguments": {"api_key": "secret"}}


def settings(weights: str = "some/model", **changes: Any) -> dict[str, Any]:
    rewards = changes.pop("rewards", [REWARD])
    sampler = changes.pop("made_by", "group_sample")
    model = ModelConfig(dtype=changes.pop("dtype", "float32"))
    options = RejectionArguments(**{"output_dir": "out"} | changes)
    return made_with(options, model=model, weights=weights, rewards=rewards, sampler=sampler)


@pytest.mark.parametrize(
    "changes",
    [
        *({"seed": 1}, {"temperature": 0.9}, {"num_generations": 4}, {"max_completion_length": 9}),
        {"made_by": "vllm"},
        *({"top_p": 0.9}, {"top_k": 5}, {"generation_kwargs": {"min_p": 0.1}}),
        *({"chat_template_kwargs": {"a": 1}}, {"weights": "another/model"}, {"dtype": "bfloat16"}),
        *({"rewards": ["math"]}, {"rewards": [{**REWARD, "arguments": {"api_key": "other"}}]}),
    ],
)
def test_what_shapes_candidates_changes_the_settings(changes: dict[str, Any]) -> None:
    assert settings(**changes) != settings()


@pytest.mark.parametrize(
    "changes",
    [
        *({"sampler": "group_sample"}, {"vllm_gpu_memory_utilization": 0.5}),
        *({"best_n": 9}, {"correct_threshold": 0.9}, {"prompts_per_batch": 3}, {"output_dir": "b"}),
        *({"scripts": ["Latin"]}, {"balance": "uniform"}, {"rewards": [{**REWARD, "weight": 2}]}),
    ],
)
def test_what_chooses_among_candidates_does_not(changes: dict[str, Any]) -> None:
    assert settings(**changes) == settings()


def test_settings_hold_no_argument_of_a_reward() -> None:
    assert "secret" not in str(settings())


def test_weights_digest_changes_with_the_weights_not_with_the_place(tmp_path: Path) -> None:
    def saved(name: str, weight: torch.Tensor) -> str:
        folder = tmp_path / name
        folder.mkdir()
        save_file({"weight": weight}, folder / "model.safetensors")
        return str(folder)

    one, copy, other = (
        saved(name, weight)
        for name, weight in {
            "one": torch.zeros(3),
            "copy": torch.zeros(3),
            "other": torch.tensor([0.0, 1e-6, 0.0]),
        }.items()
    )
    assert weights_digest(one) == weights_digest(copy) != weights_digest(other)
    assert weights_digest("some/model") is None
    assert settings(one) == settings(copy) != settings(other)


def test_weights_digest_covers_every_tensor_and_what_stands_beside_them(tmp_path: Path) -> None:
    found = set()
    for name in ("first", "last", "config.json", "chat_template.jinja", "tokenizer.json", "none"):
        tensors = {"first": torch.zeros(2**19), "last": torch.zeros(2**19)}  # 2 MiB each
        if name in tensors:
            tensors[name][7] = 1.0
        save_file(tensors, tmp_path / "model.safetensors")
        for beside in ("config.json", "chat_template.jinja", "tokenizer.json"):
            (tmp_path / beside).write_text("1" if name == beside else "0")
        found.add(weights_digest(str(tmp_path)))
    assert len(found) == 6
    for later in ("training_args.bin", "summary.json", "README.md"):  # of the run, not the model
        (tmp_path / later).write_text("new")
    assert weights_digest(str(tmp_path)) in found


def test_the_length_that_vllm_reads_counts_for_it_alone() -> None:
    assert settings(vllm_max_model_length=9) == settings()
    assert settings(vllm_max_model_length=9, made_by="vllm") != settings(made_by="vllm")


def test_prompt_ids_stand_for_all_that_a_reward_reads() -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "2"}]
    first, second = prompt_ids(Dataset.from_list(rows))
    assert first != second
    assert prompt_ids(Dataset.from_list(rows[::-1])) == [second, first]
