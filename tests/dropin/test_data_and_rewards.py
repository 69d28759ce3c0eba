"""Rewards, data sets, logs and what else is handed to the constructor, beside plain TRL."""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from dropin.cases import LIKELIEST, LORA
from dropin.compare import (
    CHATS,
    PROMPTS,
    Options,
    Run,
    assert_same_run,
    differ,
    ours,
    rollout,
    texts,
    theirs,
    trl_run,
    vowels,
)
from peft import get_peft_model
from tiny import build_tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

# Rewards ------------------------------------------------------------------------------------------


def sometimes(*, completions: list[str], **_: Any) -> list[float | None]:
    return [None if index % 5 == 0 else float(len(text)) for index, text in enumerate(completions)]


def never(*, completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


async def later(*, completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0.01)
    return vowels(completions=completions)


class Answers:
    """An object that reads a column of the data."""

    __name__ = "answers"

    def __call__(self, *, answer: list[str], **_: Any) -> list[float]:
        return [float(text) + index % 3 for index, text in enumerate(answer)]


class LaterAnswers(Answers):
    async def __call__(self, **columns: Any) -> list[float]:
        return super().__call__(**columns)


def positional(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(len(p) * i % 5) for i, p in enumerate(prompts)]


def telling(
    *,
    completions: list[str],
    log_extra: Callable[[str, list[Any]], None],
    log_metric: Callable[[str, float], None],
    trainer_state: Any,
    **_: Any,
) -> list[float]:
    log_extra("characters", [len(text) for text in texts(completions)])
    log_metric("step_of_reward", trainer_state.global_step + 0.5)
    return vowels(completions=completions)


REWARDS: dict[str, Any] = {
    "none for some": [sometimes],
    "none for some, another for all": [sometimes, vowels],
    "one that gives none": [never, vowels],
    "asynchronous, with another": [later, sometimes],
    "an object": [Answers()],
    "an asynchronous object": [LaterAnswers(), later],
    "not in a list": positional,
    "a partial": [functools.partial(sometimes)],
    "what it logs": [telling],
}


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS.keys())
def test_rewards_train_as_in_trl(
    tiny_model_dir: Path, tmp_path: Path, rewards: Any, aggregation: str
) -> None:
    options = {"rollout_func": rollout, "multi_objective_aggregation": aggregation}
    given = [list(rewards) if isinstance(rewards, list) else rewards for _ in range(2)]
    found = Run.of(ours(tiny_model_dir, tmp_path, reward_funcs=given[0], **options))
    expected = Run.of(theirs(tiny_model_dir, tmp_path, reward_funcs=given[1], **options))
    assert expected.moves
    assert_same_run(found, expected)
    if rewards == [telling]:
        assert found.log[1]["step_of_reward"] == 1.5


@pytest.mark.parametrize("value", [None, 0.1], ids=["no rewards", "equal rewards"])
def test_a_batch_that_teaches_nothing_leaves_the_weights_as_in_trl(
    tiny_model_dir: Path, tmp_path: Path, value: float | None
) -> None:
    def constant(*, completions: list[str], **_: Any) -> list[float | None]:
        return [value] * len(completions)

    options = {"rollout_func": rollout, "beta": 0.0, "reward_funcs": constant}
    found = Run.of(ours(tiny_model_dir, tmp_path, **options))
    expected = Run.of(theirs(tiny_model_dir, tmp_path, **options))
    assert set(found.advantages) == {0.0}
    assert_same_run(found, expected)


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A folder with a reward model."""
    folder = tmp_path_factory.mktemp("reward") / "tiny-reward"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    model.save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("conversations", [False, True])
def test_a_reward_model_by_name_trains_as_in_trl(
    tiny_model_dir: Path, tmp_path: Path, reward_dir: Path, conversations: bool
) -> None:
    options = LIKELIEST | {"train_dataset": CHATS if conversations else PROMPTS}
    # With a tokenizer of its own, and a function that needs none.
    options |= {"reward_processing_classes": [build_tiny_tokenizer(), None]}
    runs = [
        Run.of(
            make(tiny_model_dir, tmp_path, **options | {"reward_funcs": [str(reward_dir), vowels]})
        )
        for make in (ours, theirs)
    ]
    assert abs(runs[1].log[0]["rewards/tiny-reward/mean"]) > 1e-3
    assert_same_run(*runs)


# Data and evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_dataset": PROMPTS.select(range(3))},
        {"eval_dataset": PROMPTS.select(range(3)), "num_generations_eval": 1},
        {"eval_dataset": {"one": PROMPTS.select(range(3)), "two": CHATS.select(range(3))}},
        {"eval_dataset": PROMPTS.select(range(3)).to_iterable_dataset(), "eval_on_start": True},
    ],
    ids=["a set", "num_generations_eval", "several sets", "a stream"],
)
def test_evaluation_leaves_training_alone_and_scores_as_trl_does(
    tiny_model_dir: Path, tmp_path: Path, changes: Options
) -> None:
    # One batch a set, because ours counts each prompt once, and TRL means batches.
    options = LIKELIEST | {"reward_funcs": vowels, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"per_device_eval_batch_size": 3 * changes.get("num_generations_eval", 4)}
    found = Run.of(ours(tiny_model_dir, tmp_path, **options, **changes))
    expected = Run.of(theirs(tiny_model_dir, tmp_path, **options, **changes))
    assert expected.moves
    names = ("_loss", "reward", "kl", "entropy", "grad_norm", "loss", "completions/mean_length")
    for entries in zip(found.log, expected.log, strict=True):
        ours_logged, theirs_logged = map(_without_set, entries)
        for key in [key for key in theirs_logged if key.endswith(names)]:
            assert ours_logged[key] == pytest.approx(theirs_logged[key], rel=1e-4, abs=1e-6), key
    assert any("eval_reward" in entry for entry in expected.log)


def _without_set(entry: dict[str, Any]) -> dict[str, Any]:
    """Name metrics without the eval set; TRL has its name in some of them, ours in all."""
    return {re.sub("^eval_(one|two)_", "eval_", key): value for key, value in entry.items()}


def test_rewards_get_the_columns_of_a_stream(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {"rollout_func": rollout, "train_dataset": PROMPTS.to_iterable_dataset()}
    found = Run.of(ours(tiny_model_dir, tmp_path, reward_funcs=Answers(), **options))
    expected = Run.of(theirs(tiny_model_dir, tmp_path, reward_funcs=Answers(), **options))
    assert_same_run(found, expected)


# Logs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_completions_to_print": 2, "log_unique_prompts": True, "train_dataset": CHATS},
    ],
    ids=["log_completions", "num_completions_to_print"],
)
def test_logged_completions_are_those_of_trl(
    tiny_model_dir: Path, tmp_path: Path, changes: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    options = LIKELIEST | {"log_completions": True, "reward_funcs": telling} | changes
    tables, printed = [], []
    for make in (ours, theirs):
        folder = tmp_path / make.__name__
        Run.of(make(tiny_model_dir, folder, **options))
        found = sorted(folder.rglob("completions_*.parquet"))
        tables.append([pd.read_parquet(path) for path in found])
        printed.append(capsys.readouterr().out.count("│"))  # borders of the printed table
    assert len(tables[0]) == len(tables[1]) == 2
    assert printed[0] == printed[1] > 0
    for left, right in zip(*tables, strict=True):
        assert {"prompt", "completion", "telling", "characters", "advantage"} <= set(right.columns)
        pd.testing.assert_frame_equal(left, right, atol=1e-6)


# What else the constructor takes ------------------------------------------------------------------


class Noted(TrainerCallback):
    """Counts what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.events.append("step")

    def on_log(self, *_: Any, **__: Any) -> None:
        self.events.append("log")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.events.append("end")


def test_objects_are_taken_as_trl_takes_them(tiny_model_dir: Path, tmp_path: Path) -> None:
    runs, events = [], []
    for make in (ours, theirs):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        noted = Noted()
        trainer = make(
            model,
            tmp_path,
            rollout_func=rollout,
            processing_class=build_tiny_tokenizer(),
            optimizers=(torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9), None),
            callbacks=[noted],
        )
        runs.append(Run.of(trainer))
        events.append(noted.events)
        assert trainer.model is model
    assert events[0] == events[1] == ["step", "log", "step", "log", "log", "end"]
    assert differ(runs[1], trl_run(tiny_model_dir, tmp_path, rollout_func=rollout))
    assert_same_run(*runs)


@pytest.mark.parametrize("beta", [0.1, 0.0])
def test_a_peft_model_with_a_trained_adapter_is_its_own_reference_as_in_trl(
    tiny_model_dir: Path, tmp_path: Path, beta: float
) -> None:
    runs = []
    for make in (ours, theirs):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        model = get_peft_model(base, LORA)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zero in a new adapter
                    parameter.normal_(0, 0.1)
        options = {"beta": beta, "num_iterations": 2, "learning_rate": 0.5, "max_steps": 4}
        options |= {"rollout_func": rollout, "processing_class": build_tiny_tokenizer()}
        runs.append(Run.of(make(model, tmp_path, **options)))
    assert runs[1].moves
    assert any(".ref." in name for name in runs[1].weights) is (beta > 0)
    assert_same_run(*runs)


# Rollouts that sample with the trainer ------------------------------------------------------------


def prompts_left_out(prompts: list[str], trainer: Any) -> Options:
    """Sample with an example before the prompt, and train without it."""
    tokenizer = trainer.processing_class
    ids, bare = (
        [tokenizer(before + prompt).input_ids for prompt in prompts]
        for before in ("an example first. ", "")
    )
    rows, _ = trainer._generate_single_turn(ids, None, {}, trainer.num_generations)
    return {"prompt_ids": bare, "completion_ids": rows, "logprobs": None}


def test_old_logprobs_are_not_the_samplers_if_a_rollout_changed_the_prompts(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    # Nothing is learned, so the second update finds the policy that the first one found.
    options = {"rollout_func": prompts_left_out, "num_iterations": 2, "learning_rate": 0.0}
    found = Run.of(ours(tiny_model_dir, tmp_path, **options))
    expected = Run.of(ours(tiny_model_dir, tmp_path, old_logprobs="recompute", **options))
    assert found.completions == expected.completions
    assert_same_run(found, expected)


def test_a_rollout_that_samples_twice_draws_other_numbers(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    drawn: list[list[list[int]]] = []

    def one_by_one(prompts: list[str], trainer: Any) -> Options:
        ids = [trainer.processing_class(prompt).input_ids for prompt in prompts]
        rows = [trainer._generate_single_turn([row], None, {}, 1)[0][0] for row in ids]
        drawn.append(rows)
        return {"prompt_ids": ids, "completion_ids": rows, "logprobs": None}

    ours(tiny_model_dir, tmp_path, rollout_func=one_by_one, max_steps=1).train()
    (rows,) = drawn
    groups = [rows[start : start + 4] for start in range(0, 12, 4)]
    assert all(len({tuple(row) for row in group}) > 1 for group in groups)
