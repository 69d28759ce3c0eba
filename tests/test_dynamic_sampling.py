"""Batches that are full of groups with something to learn, and what they were drawn from."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from launching import launch
from runs import series, settings, train

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.advantages import multi_reward_advantages
from trl_grpo_ext.dynamic_sampling import (
    FurtherPrompts,
    fill_slots,
    join_rows,
    merge_metrics,
    num_groups_to_draw,
    reward_metrics,
    take_rows,
    trim_padding,
)
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.losses import LOSS_TYPE_REDUCTIONS
from trl_grpo_ext.signals import TrainingInterrupted

NAN = math.nan

# How many groups to draw -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "num_informative", "num_drawn", "multiple_of", "expected"),
    [
        (0, 8, 8, 1, 0),
        (6, 2, 8, 1, 8),  # 6 / (2 / 8) = 24: a whole batch at most
        (2, 6, 8, 1, 3),  # 2 / (6 / 8) = 2.67
        (1, 10, 20, 1, 2),
        (2, 6, 8, 2, 4),  # 3, in pairs
        (8, 0, 8, 1, 8),
        (1, 0, 8, 1, 8),
    ],
)
def test_num_groups_to_draw_is_what_the_rate_so_far_asks_for(
    missing: int, num_informative: int, num_drawn: int, multiple_of: int, expected: int
) -> None:
    found = num_groups_to_draw(
        missing=missing,
        num_informative=num_informative,
        num_drawn=num_drawn,
        most=8,
        multiple_of=multiple_of,
    )
    assert found == expected


# Which prompts -----------------------------------------------------------------------------------

ROWS = [{"prompt": f"{number}"} for number in range(10)]
USED = ["2", "3", "5"]


def test_further_prompts_come_once_each_and_leave_out_those_of_the_batch() -> None:
    further = FurtherPrompts(ROWS, used=USED, key=(7, 3, 0))
    drawn = further.draw(4) + further.draw(3)
    assert sorted(drawn) == [0, 1, 4, 6, 7, 8, 9]


def test_further_prompts_repeat_when_all_were_drawn() -> None:
    further = FurtherPrompts(ROWS, used=USED, key=(7, 3, 0))
    drawn = further.draw(7 + 10 + 10)
    assert sorted(drawn[7:17]) == sorted(drawn[17:]) == list(range(10))


def test_further_prompts_of_the_same_key_are_the_same() -> None:
    orders = [FurtherPrompts(ROWS, used=USED, key=(7, step, 0)).draw(7) for step in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_further_prompts_are_compared_by_what_they_say() -> None:
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("a", "a", "b")]
    further = FurtherPrompts(rows, used=[rows[0]["prompt"]], key=(1,))
    assert further.draw(1) == [2]
    texts = [rows[index]["prompt"] for index in FurtherPrompts(rows, used=[], key=(1,)).draw(2)]
    assert rows[0]["prompt"] in texts
    assert rows[2]["prompt"] in texts


# Rounds become a batch ---------------------------------------------------------------------------


@given(
    st.lists(st.booleans(), min_size=4, max_size=4), st.lists(st.booleans(), min_size=0, max_size=9)
)
def test_fill_slots_equals_a_slow_reference(batch: list[bool], further: list[bool]) -> None:
    spare = [4 + place for place, informative in enumerate(further) if informative]
    expected = []
    for place, informative in enumerate(batch):
        expected.append(place if informative or not spare else spare.pop(0))
    found = fill_slots(torch.tensor([*batch, *further]), num_slots=4)
    assert found.tolist() == expected


def test_rows_of_several_rounds_become_those_of_one_batch() -> None:
    first = {
        "prompt_ids": torch.tensor([[0, 5], [6, 7]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[8], [9]]),
        "completion_mask": torch.tensor([[1], [1]]),
        "old_per_token_logps": torch.tensor([[-1.0], [-2.0]]),
        "importance_sampling_ratio": torch.tensor([[1.0], [1.5]]),
        "advantages": torch.tensor([0.5, -0.5]),
    }
    second = {
        "prompt_ids": torch.tensor([[1, 2, 3], [0, 0, 4]]),
        "prompt_mask": torch.tensor([[1, 1, 1], [0, 0, 1]]),
        "completion_ids": torch.tensor([[4, 5, 6], [7, 8, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "old_per_token_logps": torch.tensor([[-3.0, -4.0, -5.0], [-6.0, -7.0, 0.0]]),
        "importance_sampling_ratio": torch.tensor([[2.0], [2.5]]),
        "advantages": torch.tensor([0.1, -0.1]),
    }
    joined = join_rows([first, second], padding={"completion_ids": 99})
    assert joined["prompt_ids"].tolist() == [[0, 0, 5], [0, 6, 7], [1, 2, 3], [0, 0, 4]]
    assert joined["completion_ids"].tolist() == [[8, 99, 99], [9, 99, 99], [4, 5, 6], [7, 8, 0]]
    batch = trim_padding(take_rows(joined, torch.tensor([3, 0])))
    assert {name: value.tolist() for name, value in batch.items()} == {
        "prompt_ids": [[4], [5]],
        "prompt_mask": [[1], [1]],
        "completion_ids": [[7, 8], [8, 99]],
        "completion_mask": [[1, 1], [1, 0]],
        "old_per_token_logps": [[-6.0, -7.0], [-1.0, 0.0]],
        "importance_sampling_ratio": [[2.5], [1.0]],
        "advantages": pytest.approx([-0.1, 0.5]),
    }


def test_trim_padding_keeps_multiples_and_at_least_one_column() -> None:
    rows = {
        "prompt_mask": torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]]),
        "completion_mask": torch.zeros(1, 8, dtype=torch.long),
    }
    assert {k: v.shape[1] for k, v in trim_padding(rows).items()} == {
        "prompt_mask": 3,
        "completion_mask": 1,
    }
    assert {k: v.shape[1] for k, v in trim_padding(rows, multiple_of=4).items()} == {
        "prompt_mask": 4,
        "completion_mask": 4,
    }


# Metrics -----------------------------------------------------------------------------------------

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=6)


def _logged(completions: list[tuple[int, bool]], num_tokens: float) -> dict[str, list[float]]:
    """What trl 1.16.0 logs of completions, each a length and whether it was cut off."""
    lengths = [length for length, _ in completions]
    ended = [length for length, cut_off in completions if not cut_off] or [0]
    found = {
        "num_tokens": num_tokens,
        "completions/mean_length": statistics.fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": statistics.fmean(cut_off for _, cut_off in completions),
        "completions/mean_terminated_length": statistics.fmean(ended),
        "completions/min_terminated_length": min(ended),
        "completions/max_terminated_length": max(ended),
    }
    return {name: [float(value)] for name, value in found.items()}


@given(st.lists(LENGTHS, min_size=1, max_size=4))
def test_merged_metrics_are_those_of_all_completions(
    rounds: list[list[tuple[int, bool]]],
) -> None:
    logged = [_logged(completions, 100.0 * i) for i, completions in enumerate(rounds)]
    merged = merge_metrics(logged, [len(completions) for completions in rounds])
    everything = [row for completions in rounds for row in completions]
    together = _logged(everything, 100.0 * (len(rounds) - 1))
    assert merged == pytest.approx({name: values[0] for name, values in together.items()})


def test_merged_metrics_sum_counts_weigh_calls_and_leave_nan_out() -> None:
    first = {
        "rewards/exact/non_finite": [2.0],
        "tools/call_frequency": [1.0],
        "tools/failure_frequency": [0.5],
        "mine": [NAN],
        "minutes": [4.0],
    }
    second = {
        "rewards/exact/non_finite": [1.0],
        "tools/call_frequency": [3.0],
        "tools/failure_frequency": [0.0],
        "mine": [3.0],
        "minutes": [1.0],
    }
    merged = merge_metrics([first, second], [4, 2])
    assert merged["rewards/exact/non_finite"] == 3
    assert merged["tools/call_frequency"] == pytest.approx(10 / 6)
    assert merged["tools/failure_frequency"] == pytest.approx(2 / 10)  # 2 of 4 + 6 calls
    assert merged["mine"] == 3
    assert merged["minutes"] == 3  # a mean, in spite of its name
    assert math.isnan(merge_metrics([{"mine": [NAN]}], [4])["mine"])


def test_reward_metrics_are_means_and_deviations_of_what_was_scored() -> None:
    rewards = torch.tensor([[1.0, 0.0], [3.0, NAN], [NAN, NAN], [2.0, 4.0]])
    found = reward_metrics(rewards, weights_R=torch.tensor([1.0, 0.5]), names=["a", "b"])
    assert found == {
        "rewards/a/mean": 2.0,
        "rewards/a/std": 1.0,
        "rewards/b/mean": 2.0,
        "rewards/b/std": pytest.approx(math.sqrt(8)),
        "reward": pytest.approx(8 / 3),  # 1, 3, 4
        "reward_std": pytest.approx(statistics.stdev([1, 3, 4])),
    }


# Runs --------------------------------------------------------------------------------------------

NUM_PROMPTS = 48


def teaches(prompt: str) -> bool:
    """One prompt in four has completions of different rewards."""
    return int(prompt.split()[0]) % 4 == 0


def mostly_silent(*, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that tells completions apart for few prompts only."""
    return [
        float(sum(map(ord, text)) % 1009) / 100 if teaches(prompt) else 0.25
        for prompt, text in zip(prompts, completions, strict=True)
    ]


def half_silent(*, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that tells completions apart for every second prompt."""
    doubled = [f"{2 * int(prompt.split()[0])} + 1 =" for prompt in prompts]
    return mostly_silent(prompts=doubled, completions=completions)


class Watched(ExtGRPOTrainer):
    """Keeps what each generation returned, with log-probabilities computed row by row."""

    def sample_completions(self, model: Any, prompts: Any, keys: Any, step: int) -> Any:
        vars(self).setdefault("keys", []).extend((step, key) for key in keys)
        return super().sample_completions(model, prompts, keys, step)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        training = self.model.training
        output = super()._generate_and_score_completions(inputs)
        if training:
            kept = vars(self).setdefault("generations", [])
            kept.append(output | {"slow_policy": slow_logprobs(self.model, output)})
            if self.ref_model is not None:
                kept[-1]["slow_reference"] = slow_logprobs(self.ref_model, output)
            kept[-1]["table"] = {
                name: list(self._logs[name]) for name in ("prompt", "completion", "advantages")
            }
        return output


@torch.no_grad()
def slow_logprobs(model: Any, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """The log-probability of each token, one completion at a time, without padding."""
    result = torch.zeros(rows["completion_ids"].shape)
    for row, (prompt, prompt_mask, completion, mask) in enumerate(
        zip(
            rows["prompt_ids"],
            rows["prompt_mask"],
            rows["completion_ids"],
            rows["completion_mask"],
            strict=True,
        )
    ):
        prompt, completion = prompt[prompt_mask.bool()], completion[mask.bool()]
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        found = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
        result[row, : len(completion)] = found
    return result


def texts(trainer: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> list[str]:
    """What the rows say."""
    return [
        trainer.processing_class.decode(ids[mask], skip_special_tokens=True)
        for ids, mask in zip(ids_BT, mask_BT, strict=True)
    ]


def build(model: Path, tmp_path: Path, reward: Any = mostly_silent, **changes: Any) -> Watched:
    # 4 groups of 4 completions a generation.
    options = {"per_device_train_batch_size": 16, "dynamic_sampling": True, "max_steps": 2}
    config = ExtGRPOConfig(**settings(tmp_path, **(options | changes)))
    prompts = Dataset.from_dict({"prompt": [f"{number} + 1 =" for number in range(NUM_PROMPTS)]})
    evaluated = prompts.select(range(4)) if config.eval_strategy != "no" else None
    return Watched(str(model), reward, config, prompts, evaluated)


def test_a_run_is_full_of_groups_that_teach_something(tiny_model_dir: Path, tmp_path: Path) -> None:
    seen: Counter[tuple[int, str]] = Counter()

    def reward(*, prompts: Any, completions: Any, trainer_state: Any, **_: Any) -> list[float]:
        seen.update((trainer_state.global_step, prompt) for prompt in prompts)
        return mostly_silent(prompts=prompts, completions=completions)

    trainer = build(tiny_model_dir, tmp_path, reward, max_steps=6)
    trainer.train()
    assert set(seen.values()) == {4}  # no generation drew a prompt twice
    for generation in trainer.generations:
        table = generation["table"]
        assert all(map(teaches, table["prompt"]))
        assert set(Counter(table["prompt"]).values()) == {4}
        advantages = torch.tensor(table["advantages"]).view(4, 4)
        assert (advantages != 0).any(dim=1).all()
    assert len(set(trainer.keys)) == len(trainer.keys)  # no two share random numbers
    history = trainer.state.log_history
    assert series(history, "dynamic_sampling/unfilled") == [0] * 6
    drawn = series(history, "dynamic_sampling/groups_drawn")
    assert min(drawn) > 4
    assert series(history, "dynamic_sampling/cost") == [number / 4 for number in drawn]
    assert all(rounds >= 2 for rounds in series(history, "dynamic_sampling/rounds"))


REUSED = {"num_iterations": 2, "loss_type": "dapo"}
MASKED = {"scale_rewards": "batch", "mask_truncated_completions": True}
MASKED |= {"dynamic_sampling_max_rounds": 99}  # most groups hold truncated completions only
SPLIT = {"multi_objective_aggregation": "normalize_then_sum", "per_device_train_batch_size": 8}
SPLIT |= {"steps_per_generation": 2}
RECOMPUTED = REUSED | {"old_logprobs": "recompute", "group_sampler": "transformers"}


@pytest.mark.parametrize(
    ("changes", "old"),
    [(REUSED, True), (MASKED, False), (SPLIT, True), (RECOMPUTED, True)],
    ids=["reused", "masked", "split", "recomputed"],
)
def test_the_batch_is_what_trl_would_have_made_of_its_completions(
    tiny_model_dir: Path, tmp_path: Path, changes: dict[str, Any], old: bool
) -> None:
    trainer = build(tiny_model_dir, tmp_path, **changes)
    trainer.train()
    for rows in trainer.generations:
        table, mask = rows["table"], rows["completion_mask"].bool()
        prompts = texts(trainer, rows["prompt_ids"], rows["prompt_mask"].bool())
        assert prompts == table["prompt"]
        completions = texts(trainer, rows["completion_ids"], mask)
        for found, wanted in zip(completions, table["completion"], strict=True):
            assert found in (wanted, "")  # nothing is left of those that are masked
        rewards = torch.tensor(
            mostly_silent(prompts=table["prompt"], completions=table["completion"])
        )
        expected = multi_reward_advantages(
            rewards[:, None],
            group_size=4,
            aggregation=trainer.multi_objective_aggregation,
            scale=trainer.scale_rewards,
        )
        torch.testing.assert_close(rows["advantages"], expected)
        assert rows["num_items_in_batch"] == mask.sum()
        assert mask.any(dim=0).all()  # nothing is padding throughout
        assert mask.view(4, -1).any(dim=1).all()  # each group has something to learn from
        expected = rows["slow_reference"]
        torch.testing.assert_close(rows["ref_per_token_logps"] * mask, expected * mask)
        assert ("old_per_token_logps" in rows) == old
        if old:
            expected = rows["slow_policy"]
            torch.testing.assert_close(rows["old_per_token_logps"] * mask, expected * mask)


def test_metrics_are_of_all_completions_that_were_sampled(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    scored: list[tuple[float, int, str]] = []

    def reward(*, prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        scores = mostly_silent(prompts=prompts, completions=completions)
        lengths = map(len, completion_ids)
        scored.extend(zip(scores, lengths, prompts, strict=True))
        return scores

    trainer = build(tiny_model_dir, tmp_path, reward, max_steps=1)
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "reward" in entry)
    scores, lengths, prompts = zip(*scored, strict=True)
    teach = list(map(teaches, prompts))
    assert len(scores) == 4 * logged["dynamic_sampling/groups_drawn"] > 16
    assert logged["reward"] == pytest.approx(statistics.fmean(scores))
    assert logged["reward_std"] == pytest.approx(statistics.stdev(scores))
    assert logged["rewards/reward/std"] == pytest.approx(statistics.stdev(scores))
    assert logged["completions/mean_length"] == pytest.approx(statistics.fmean(lengths))
    assert logged["frac_reward_zero_std"] == pytest.approx(1 - statistics.fmean(teach))
    assert logged["dynamic_sampling/informative_fraction"] == pytest.approx(statistics.fmean(teach))
    assert logged["num_tokens"] == trainer.state.num_input_tokens_seen
    assert trainer.state.num_input_tokens_seen > sum(lengths)


def test_a_batch_that_cannot_be_filled_is_used_as_it_is_and_told_once(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def nothing(*, completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    caplog.set_level(logging.WARNING)
    trainer = build(tiny_model_dir, tmp_path, nothing, dynamic_sampling_max_rounds=3)
    history, weights = train(trainer)
    assert series(history, "dynamic_sampling/unfilled") == [4, 4]
    assert series(history, "dynamic_sampling/rounds") == [3, 3]
    assert series(history, "dynamic_sampling/groups_drawn") == [12, 12]
    (told,) = [text for text in caplog.messages if "`dynamic_sampling`" in text]
    assert "0 informative groups for the 4 places of a batch among 12" in told
    assert "`dynamic_sampling_max_rounds`" in told
    plain, expected = train(build(tiny_model_dir, tmp_path, nothing, dynamic_sampling=False))
    assert series(history, "loss") == series(plain, "loss")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_batch_that_is_full_at_once_changes_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    def distinct(*, completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 1009) for text in completions]

    runs = [
        train(build(tiny_model_dir, tmp_path, distinct, dynamic_sampling=asked, logging_steps=2))
        for asked in (True, False)
    ]
    (history, weights), (plain, expected) = runs
    assert series(history, "dynamic_sampling/rounds") == [1]
    for key in ("loss", "reward", "reward_std", "kl", "num_tokens", "completions/mean_length"):
        assert series(history, key) == pytest.approx(series(plain, key)), key
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("loss_type", sorted(LOSS_TYPE_REDUCTIONS))
def test_every_loss_trains_with_it(tiny_model_dir: Path, tmp_path: Path, loss_type: str) -> None:
    trainer = build(tiny_model_dir, tmp_path, loss_type=loss_type)
    history, weights = train(trainer)
    assert series(history, "dynamic_sampling/unfilled") == [0, 0]
    assert all(norm > 0 for norm in series(history, "grad_norm"))
    assert all(weight.isfinite().all() for weight in weights.values())


def assert_same(trainer: Any, expected: Any) -> None:
    """Both runs logged the same, and ended with the same weights, bit for bit."""
    logs = trainer.state.log_history, expected.state.log_history
    for key in ("loss", "reward", "num_tokens", "dynamic_sampling/groups_drawn"):
        assert series(logs[0], key) == series(logs[1], key)
    weights, wanted = trainer.model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_a_run_repeats_itself_and_goes_on_from_a_checkpoint(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    alone = build(tiny_model_dir, tmp_path / "a", **options)
    alone.train()
    again = build(tiny_model_dir, tmp_path / "b", **options)
    again.train()
    assert_same(again, alone)
    resumed = build(tiny_model_dir, tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "out" / "checkpoint-2"))
    assert_same(resumed, alone)


def test_a_run_that_is_stopped_in_a_later_round_goes_on_there(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    calls: list[int] = []

    def reward(*, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        calls.append(len(prompts))
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return mostly_silent(prompts=prompts, completions=completions)

    stop_at = 0
    alone = build(tiny_model_dir, tmp_path / "alone", reward, max_steps=3)
    alone.train()
    rounds = [int(number) for number in series(alone.state.log_history, "dynamic_sampling/rounds")]
    assert min(rounds[:2]) > 1
    stop_at = len(calls) + rounds[0] + 2  # the second round of the second generation
    stopped = build(tiny_model_dir, tmp_path / "ended", reward, max_steps=3)
    with pytest.raises(TrainingInterrupted):
        stopped.train()
    resumed = build(tiny_model_dir, tmp_path / "ended", reward, max_steps=3)
    resumed.train("last-good")
    assert_same(resumed, alone)


def test_evaluation_draws_nothing_more(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "per_device_eval_batch_size": 4, "eval_steps": 1}
    found, expected = (
        build(tiny_model_dir, tmp_path, dynamic_sampling=asked, **options).evaluate()
        for asked in (True, False)
    )
    timed = {name for name in expected if "time" in name or "per_second" in name}
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in expected.keys() - timed)


def test_the_table_of_completions_is_the_batch_with_every_column_as_long(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    def reward(*, prompts: Any, completions: Any, log_extra: Any, **_: Any) -> list[float]:
        if not any(map(teaches, prompts[:4])):  # in some rounds only
            log_extra("seen", [f"{prompt}!" for prompt in prompts])
            seen.extend(prompts)
        return mostly_silent(prompts=prompts, completions=completions)

    seen: list[str] = []

    changes = {"log_completions": True, "num_completions_to_print": 0, "max_steps": 3}
    trainer = build(tiny_model_dir, tmp_path, reward, **changes)
    trainer.train()
    paths = sorted((tmp_path / "out" / "completions").glob("*.parquet"))
    assert len(paths) == 3
    for path in paths:
        table = pd.read_parquet(path)
        assert len(table) == 16
        assert all(map(teaches, table["prompt"]))
        scores = mostly_silent(prompts=table["prompt"], completions=table["completion"])
        assert table["reward"].tolist() == pytest.approx(scores)
    columns = pd.concat(list(map(pd.read_parquet, paths)))[["prompt", "seen"]]
    told = columns.dropna()
    assert 0 < len(told) < len(columns)
    assert (told["seen"] == told["prompt"] + "!").all()
    assert set(told["prompt"]) <= set(seen)


def rollout(prompts: Any, trainer: Any) -> Any:
    """Never called."""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rollout_func": rollout}, "a `rollout_func` is given"),
        ({"environment_factory": object}, "an? `environment_factory` is given"),
        (
            {"train_dataset": Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset()},
            "`train_dataset` is a stream",
        ),
        (
            {"train_dataset": Dataset.from_dict({"prompt": ["a"], "image": ["b"]})},
            "has the column `image`",
        ),
    ],
    ids=["rollout", "environment", "stream", "images"],
)
def test_what_has_no_further_prompts_is_refused_before_a_model_loads(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    config = ExtGRPOConfig(**settings(tmp_path, dynamic_sampling=True))
    given = {"train_dataset": Dataset.from_dict({"prompt": ["a"]})} | given
    with pytest.raises(ConfigurationError, match=message):
        ExtGRPOTrainer("there/is-no-such-model", mostly_silent, config, **given)


# Processes ---------------------------------------------------------------------------------------

TRAIN = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from test_dynamic_sampling import drawn_in_pairs, run_of_shared_groups
import torch
result = run_of_shared_groups(Path(sys.argv[1]), Path(sys.argv[2]))
result["drawn"] = drawn_in_pairs(Path(sys.argv[1]), Path(sys.argv[2]))
if torch.distributed.get_rank() == 0:
    torch.save(result, sys.argv[2] + ".pt")
torch.distributed.destroy_process_group()
"""


def shared_groups() -> dict[str, Any]:
    """Options of a run with 4 groups of 3: two processes share a group."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return {"per_device_train_batch_size": 12 // processes, "num_generations": 3, "max_steps": 4}


def drawn_in_pairs(model: Path, out: Path) -> list[float]:
    """The groups that each generation drew, of a run where many teach something."""
    trainer = build(model, out, half_silent, **shared_groups())
    trainer.train()
    return series(trainer.state.log_history, "dynamic_sampling/groups_drawn")


def run_of_shared_groups(model: Path, out: Path) -> dict[str, Any]:
    """Train, and return what two processes and one must agree on."""
    changes = shared_groups() | {"num_iterations": 2, "optim": "sgd", "learning_rate": 1e-2}
    trainer = build(model, out, **changes)
    trainer.train()
    names = ("loss", "reward", "kl", "grad_norm", "num_tokens", "completions/", "dynamic_sampling/")
    history = [
        {name: value for name, value in entry.items() if name.startswith(names)}
        for entry in trainer.state.log_history
    ]
    weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    table = {name: list(trainer._logs[name]) for name in ("prompt", "completion", "advantages")}
    return {"history": history, "weights": weights} | table


def test_two_processes_draw_and_learn_what_one_does(tiny_model_dir: Path, tmp_path: Path) -> None:
    one = run_of_shared_groups(tiny_model_dir, tmp_path / "one")
    tests = Path(__file__).parent
    two = launch(TRAIN, tmp_path, tiny_model_dir, tmp_path / "two", tests, processes=2)
    assert max(series(two["history"], "dynamic_sampling/rounds")) >= 2
    assert two["prompt"] == one["prompt"]
    assert two["completion"] == one["completion"]
    assert two["advantages"] == pytest.approx(one["advantages"], abs=1e-5)
    for left, right in zip(one["history"], two["history"], strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-5)
    assert any(number % 2 for number in drawn_in_pairs(tiny_model_dir, tmp_path / "pairs"))
    assert not any(number % 2 for number in two["drawn"])
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, two["weights"][name], atol=1e-5, rtol=1e-4)


# The benchmark -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_compares_both_by_steps_and_by_minutes(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "dynamic_sampling.py"
    options = ["--steps", "2", "--eval_every", "1", "--eval_prompts", "8", "--max_rounds", "2"]
    ran = subprocess.run(
        [sys.executable, str(script), *options, "--model", str(tiny_model_dir), "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "outputs/dynamic_sampling/curves.json").read_text())
    dynamic, plain = (result["curves"][arm] for arm in ("dynamic", "plain"))
    assert [point["step"] for point in dynamic] == [0, 1, 2]
    assert plain[-1]["step"] >= 2
    assert plain[-1]["minutes"] >= dynamic[-1]["minutes"]
    # Random weights are never right, so both rounds of 8 groups are silent.
    assert [point["cost"] for point in dynamic[1:]] == [2.0, 2.0]
    assert result["summary"]["plain"]["cost"] == 1.0
    assert result["summary"]["dynamic"]["steps_to_target"] is None
    assert (tmp_path / "outputs/dynamic_sampling/curves.png").stat().st_size > 1000
