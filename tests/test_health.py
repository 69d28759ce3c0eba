"""Warnings that a run cannot learn: each for its cause, and none for runs that learn."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from runs import settings
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.health import HealthCallback, diagnose
from trl_grpo_ext.metrics import find_metric

Log = dict[str, Any]

RUNS = Path(__file__).parent / "data" / "quickstart_runs.jsonl"
HEALTHY: Log = {
    "loss": 0.01,
    "grad_norm": 2.0,
    "reward_std": 0.4,
    "frac_reward_zero_std": 0.25,
    "kl": 0.01,
    "entropy": 0.5,
    "completions/clipped_ratio": 0.1,
}


def history(*, num: int = 20, **changes: Any) -> list[Log]:
    """Logs of a run whose reward goes up and down between 0.2 and 0.8, with other values."""
    changes = {name.replace("__", "/"): value for name, value in changes.items()}
    return [HEALTHY | {"reward": 0.5 + 0.3 * (-1) ** i} | changes for i in range(num)]


def quickstart_runs() -> list[list[Log]]:
    runs: dict[int, list[Log]] = defaultdict(list)
    for line in RUNS.read_text().splitlines():
        entry = json.loads(line)
        runs[entry["run"]].append(entry)
    return list(runs.values())


def warned(logs: list[Log]) -> list[str]:
    """What the callback warns of, log by log."""
    messages: list[str] = []
    callback, state = HealthCallback(messages.append), TrainerState()
    for entry in logs:
        state.log_history.append(entry)
        state.global_step += 5
        callback.on_log(TrainingArguments(report_to=[]), state, TrainerControl(), logs=entry)
    return messages


@pytest.mark.parametrize("run", quickstart_runs(), ids=len)
def test_nothing_is_said_of_runs_that_learn(run: list[Log]) -> None:
    assert statistics.fmean(e["reward"] for e in run[-5:]) > run[0]["reward"] + 1
    assert [diagnose(run[:n]) for n in range(len(run) + 1)] == [{}] * (len(run) + 1)


def test_nothing_is_said_of_a_solved_task_that_stays_solved() -> None:
    solved = {"reward": 2.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0, "entropy": 0.002}
    run = quickstart_runs()[0] + [HEALTHY | solved] * 50
    assert [diagnose(run[:n]) for n in range(len(run))] == [{}] * len(run)


def test_nothing_is_said_of_a_healthy_run_and_of_no_run() -> None:
    assert diagnose(history(num=100)) == {}
    assert diagnose([]) == {}


@pytest.mark.parametrize(
    ("cause", "num", "values"),
    [
        ("unscored", 3, {"reward": None, "reward_std": None, "frac_reward_zero_std": 1.0}),
        ("constant", 10, {"reward": 0.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0}),
        ("silent", 10, {"frac_reward_zero_std": 1.0}),
        ("truncated", 5, {"completions__clipped_ratio": 0.95}),
        ("kl", 10, {"kl": 1.01}),
        ("collapsed", 10, {"entropy": 0.009}),
        ("non_finite", 5, {"grad_norm": math.nan}),
        ("non_finite", 5, {"loss": math.inf}),
    ],
)
def test_each_cause_is_found_alone_and_not_before_its_time(
    cause: str, num: int, values: Log
) -> None:
    assert list(diagnose(history(num=num, **values))) == [cause]
    assert diagnose(history(num=num - 1, **values)) == {}
    assert diagnose(history(num=num, **values) + history(num=num)) == {}


def test_median_forgives_single_tokens_of_a_huge_kl() -> None:
    logs = history(num=10)
    for entry in logs[:4]:
        entry["kl"] = 25.0
    assert diagnose(logs) == {}


def test_kl_is_measured_against_the_floor_of_the_reference() -> None:
    logs = history(kl=2.0)
    logs[0]["reference/kl_floor"] = 0.24  # plain NF4 of SmolLM2-135M
    assert diagnose(logs) == {}
    logs[0]["reference/kl_floor"] = 0.19
    assert "more than 10 times the floor of the quantized reference (0.19)" in diagnose(logs)["kl"]


def test_kl_is_judged_as_the_table_of_metrics_judges_it() -> None:
    metric = find_metric("kl")
    assert metric is not None
    assert metric.high is not None
    assert diagnose(history(kl=metric.high)) == {}
    message = diagnose(history(kl=1.01 * metric.high))["kl"]
    assert f"more than {metric.high:g}, the most that a healthy run shows" in message


@pytest.mark.parametrize(
    ("share", "words"),
    [(1.0, "All completions were"), (0.999, "At least 99% of the completions were")],
)
def test_truncation_is_told_without_rounding_up(share: float, words: str) -> None:
    assert diagnose(history(completions__clipped_ratio=share))["truncated"].startswith(words)


def test_rewards_without_a_score_name_the_metrics_of_functions_and_services() -> None:
    message = diagnose(history(reward=None, reward_std=None))["unscored"]
    for name in ("rewards/<name>/non_finite", "rewards/<name>/unscored_fraction"):
        assert name in message
        assert find_metric(name) is not None


def test_constant_reward_is_the_constant_one_whatever_it_rounds_to() -> None:
    logs = history(reward_std=3e-9, frac_reward_zero_std=1.0)
    for entry, jitter in zip(logs, itertools.cycle([0.0, 7e-9]), strict=False):
        entry["reward"] = 0.1 + jitter
    assert list(diagnose(logs)) == ["constant"]


def test_steps_without_a_generation_do_not_count() -> None:
    """With `num_iterations` 2, every other step has no reward to log."""
    logs = history(num=9, frac_reward_zero_std=1.0)
    with_gaps = [entry for log in logs for entry in (log, {"loss": 0.0, "grad_norm": 1.0})]
    assert diagnose(with_gaps) == {}
    assert list(diagnose([*with_gaps, logs[0]])) == ["silent"]


def test_evaluations_do_not_count() -> None:
    evaluation = {f"eval_{key}": value for key, value in history(num=1, kl=9.0)[0].items()}
    assert diagnose([evaluation] * 20) == {}
    assert list(diagnose([*history(num=10, kl=9.0), evaluation])) == ["kl"]


def test_warning_has_what_was_found_why_and_what_to_do() -> None:
    for values in ({"kl": 3.0}, {"entropy": 0.001}, {"frac_reward_zero_std": 1.0}):
        (message,) = diagnose(history(**values)).values()
        assert "Likely" in message
        assert "`" in message.split("Likely")[1]


def test_warning_comes_once_while_it_lasts_and_begins_with_its_step() -> None:
    (message,) = warned(history(num=40, kl=2.0))
    assert message.startswith("step 50: The KL")  # the tenth log, one every 5 steps


def test_warning_comes_again_after_a_healthy_time() -> None:
    sick, well = history(num=20, kl=2.0), history(num=40)
    assert len(warned(sick + well + sick)) == 2


def test_warning_does_not_come_again_after_a_flicker() -> None:
    sick, well = history(num=20, completions__clipped_ratio=1.0), history(num=1)
    assert len(warned(sick + well + sick)) == 1


def test_two_causes_are_two_warnings() -> None:
    messages = warned(history(num=20, kl=2.0, completions__clipped_ratio=1.0))
    assert len(messages) == 2


def test_run_of_a_constant_reward_is_warned_of(
    tmp_path: Path,
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages: list[str] = []
    trainer = ExtGRPOTrainer(
        model=tiny_model,
        reward_funcs=lambda completions, **_: [0.1] * len(completions),
        args=ExtGRPOConfig(**settings(tmp_path, max_steps=12, max_completion_length=4)),
        train_dataset=Dataset.from_dict({"prompt": ["abc", "2+2="] * 4}),
        processing_class=tiny_tokenizer,
    )
    trainer.add_callback(HealthCallback(messages.append))
    trainer.train()
    assert [
        message.split(" completion")[0] for message in messages if "same reward" in message
    ] == ["step 10: Every"]
