"""The table of metrics, against what runs log."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from runs import settings, vowels
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl.trainer import grpo_trainer

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.losses import LOSS_TYPE_REDUCTIONS
from trl_grpo_ext.metrics import METRICS, Metric, find_metric

PROMPTS = ["one two", "three", "2+2=", "abc"] * 4


def lengths(*, completions: list[str], **_: Any) -> list[float | None]:
    """A reward of its own name, that does not score everything."""
    return [None if i == 0 else float(len(text)) for i, text in enumerate(completions)]


def rows_of(key: str) -> list[Metric]:
    return [row for part in METRICS.values() for row in part if row.matches(key)]


def logged_keys(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **changes: Any
) -> set[str]:
    """Every key that a short run logs, but for ``step`` and what its evaluations log."""
    given = settings(tmp_path, **{"max_steps": 1, "per_device_eval_batch_size": 8} | changes)
    rows = Dataset.from_dict({"prompt": PROMPTS})
    trainer = ExtGRPOTrainer(
        model=model,
        reward_funcs=[vowels, lengths],
        args=ExtGRPOConfig(**given),
        train_dataset=rows,
        eval_dataset=rows.select(range(2)),
        processing_class=tokenizer,
    )
    trainer.train()
    keys = {key for entry in trainer.state.log_history for key in entry}
    return {key for key in keys - {"step"} if not key.startswith("eval_")}


@pytest.mark.parametrize("loss_type", LOSS_TYPE_REDUCTIONS)
def test_every_logged_metric_has_one_row_whatever_the_loss(
    loss_type: str,
    tmp_path: Path,
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    keys = logged_keys(tmp_path, tiny_model, tiny_tokenizer, loss_type=loss_type)
    assert {key: len(rows_of(key)) for key in keys} == dict.fromkeys(keys, 1)
    assert {"loss", "kl", "rewards/lengths/mean", "train_runtime", "epoch"} <= keys


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.0, "mask_truncated_completions": True, "scale_rewards": "batch"},
        {
            "entropy_coef": 0.01,
            "max_steps": 2,
            "num_iterations": 2,
            "gradient_accumulation_steps": 2,
        },
        {
            "use_adaptive_entropy": True,
            "importance_sampling_level": "sequence",
            "loss_type": "grpo",
        },
        {"kl_estimator": "k2", "use_bias_correction_kl": False, "eval_strategy": "steps"},
        {"include_num_input_tokens_seen": "all", "skip_memory_metrics": False},
        {"multi_objective_aggregation": "normalize_then_sum", "group_sampler": "transformers"},
        {"dynamic_sampling": True},
        {"advantage_clip": 0.5},
        {"reference": "quantized", "reference_calibration_tokens": 64},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_logged_metric_has_one_row_whatever_the_options(
    changes: dict[str, Any],
    tmp_path: Path,
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    keys = logged_keys(tmp_path, tiny_model, tiny_tokenizer, **changes)
    assert {key: len(rows_of(key)) for key in keys} == dict.fromkeys(keys, 1)


def test_metric_names_are_unique() -> None:
    names = [row.name for part in METRICS.values() for row in part]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("metric", "value", "healthy"),
    [
        (Metric("m", "", "", low=0, high=1), 0.0, True),
        (Metric("m", "", "", low=0, high=1), 1.0, True),
        (Metric("m", "", "", low=0, high=1), 1.1, False),
        (Metric("m", "", "", low=0), -0.1, False),
        (Metric("m", "", "", high=1), -9.0, True),
        (Metric("m", "", ""), 9.0, True),
        (Metric("m", "", ""), math.nan, False),
    ],
)
def test_value_is_healthy_within_the_limits(metric: Metric, value: float, healthy: bool) -> None:
    assert metric.is_healthy(value) is healthy


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (Metric("m", "", ""), ""),
        (Metric("m", "", "", "near 1"), "near 1"),
        (Metric("m", "", "", low=0, high=0), "0"),
        (Metric("m", "", "", low=0, high=0.25), "0 to 0.25"),
        (Metric("m", "", "", "falls", high=1), "at most 1; falls"),
    ],
)
def test_healthy_range_in_words(metric: Metric, text: str) -> None:
    assert metric.healthy_range == text


def test_metric_of_a_reward_is_found_by_its_pattern() -> None:
    found = find_metric("rewards/a/b [c]/std")
    assert found is not None
    assert found.name == "rewards/<name>/std"


def test_metric_of_an_evaluation_is_that_of_training() -> None:
    assert find_metric("eval_kl") is find_metric("kl")


def test_unknown_key_has_no_metric() -> None:
    assert find_metric("rewards/mine") is None
    assert find_metric("kl2") is None


def test_every_metric_that_trl_can_log_has_one_row() -> None:
    """Tools, mixtures of experts and vLLM included, which the runs above do not have."""
    source = Path(grpo_trainer.__file__).read_text(encoding="utf-8")
    found = re.findall(r'_metrics\[[^\]]+\]\[f?"([^"]+)"\]', source)
    keys = {re.sub(r"{\w+}", "some_name", key) for key in found}
    assert {"rewards/some_name/std", "tools/failure_frequency", "aux_loss"} <= keys
    assert {key: len(rows_of(key)) for key in keys} == dict.fromkeys(keys, 1)
