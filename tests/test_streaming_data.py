"""Streams (``IterableDataset``) and data loader workers train like data in memory, as in TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import series, settings, train, vowels

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer

PROMPTS = Dataset.from_dict({"prompt": [f"{a} + {a} =" for a in range(12)]})
# Python 3.12 and later say so wherever a process with threads forks, as torch's workers do.
FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
ALL_ON: dict[str, Any] = {
    "group_sampler": "shared_prefill",
    "shared_prefix": "always",
    "reference": "quantized",
    "reference_calibration_tokens": 300,
    "advantage_baseline": "leave_one_out",
    "num_iterations": 2,
    "shuffle_dataset": False,
}


def run(
    model: Path, tmp_path: Path, data: Any, **changes: Any
) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    config = ExtGRPOConfig(**settings(tmp_path, **changes))
    trainer = ExtGRPOTrainer(str(model), vowels, config, data, eval_dataset=PROMPTS.select([0, 1]))
    return trainer, *train(trainer)


def assert_same_run(left: Any, right: Any, *, exactly: bool) -> None:
    assert list(left[0]._logs["prompt"]) == list(right[0]._logs["prompt"])
    assert list(left[0]._logs["completion"]) == list(right[0]._logs["completion"])
    tolerance = {"rel": 0, "abs": 0} if exactly else {"rel": 1e-4, "abs": 1e-6}
    for key in ("loss", "reward", "kl", "grad_norm"):
        assert series(left[1], key) == pytest.approx(series(right[1], key), **tolerance), key
    for name, weight in left[2].items():
        if exactly:
            assert torch.equal(weight, right[2][name])
        else:
            torch.testing.assert_close(weight, right[2][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("workers", [0, 2], ids=["stream", "workers"])
@FORKS
def test_sampling_by_transformers_gives_what_plain_trl_gives(
    tiny_model_dir: Path, tmp_path: Path, workers: int
) -> None:
    data = PROMPTS if workers else PROMPTS.to_iterable_dataset()
    runs = [
        run(tiny_model_dir, tmp_path, data, dataloader_num_workers=workers, **options)
        for options in (
            {"extensions": False},
            {"group_sampler": "transformers", "shared_prefix": "never", "onednn_linear": False},
        )
    ]
    assert_same_run(*runs, exactly=False)  # the advantages are rounded differently


@pytest.mark.parametrize(("streams", "workers"), [(True, 0), (False, 2)], ids=["stream", "workers"])
@FORKS
def test_the_order_of_the_data_alone_decides_with_everything_on(
    tiny_model_dir: Path, tmp_path: Path, streams: bool, workers: int
) -> None:
    data = PROMPTS.to_iterable_dataset() if streams else PROMPTS
    here = run(tiny_model_dir, tmp_path / "here", PROMPTS, **ALL_ON)
    there = run(tiny_model_dir, tmp_path / "there", data, dataloader_num_workers=workers, **ALL_ON)
    assert_same_run(here, there, exactly=True)
    assert here[0].reference_kind == there[0].reference_kind == "quantized"
    assert here[0].group_sampler == there[0].group_sampler == "shared_prefill"


def test_a_stream_is_evaluated_as_data_in_memory_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    rewards = []
    for data in (PROMPTS.select([0, 1]), PROMPTS.select([0, 1]).to_iterable_dataset()):
        config = ExtGRPOConfig(**settings(tmp_path, group_sampler="shared_prefill"))
        trainer = ExtGRPOTrainer(str(tiny_model_dir), vowels, config, PROMPTS, eval_dataset=data)
        rewards.append(trainer.evaluate()["eval_reward"])
    assert rewards[0] == rewards[1]


def test_a_stream_is_read_by_one_worker(tiny_model_dir: Path, tmp_path: Path) -> None:
    """More would cut its groups; TRL says so and goes on."""
    stream = PROMPTS.to_iterable_dataset()
    trainer, history, _ = run(tiny_model_dir, tmp_path, stream, dataloader_num_workers=2)
    assert trainer.args.dataloader_num_workers == 0
    assert len(series(history, "loss")) == 3


def test_a_stream_without_max_steps_is_refused_by_name(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = ExtGRPOConfig(**settings(tmp_path, max_steps=-1))
    with pytest.raises(ValueError, match="max_steps"):
        ExtGRPOTrainer(str(tiny_model_dir), vowels, config, PROMPTS.to_iterable_dataset())
