"""Runs of plain TRL and of ours on the tiny model, and whether they agree."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import settings
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer

Options = dict[str, Any]
Log = list[dict[str, Any]]

PROMPTS = Dataset.from_dict(
    {
        "prompt": [f"{s}{i}" for i in range(3) for s in ("1 + ", "what is 23 + ", "a", "abc " * 5)],
        "answer": [str(i) for i in range(12)],
    }
)
CHATS = Dataset.from_dict(
    {"prompt": [[{"role": "user", "content": prompt}] for prompt in PROMPTS["prompt"]]}
)
TRAINER_ARGUMENTS = frozenset(
    {
        *("reward_funcs", "train_dataset", "eval_dataset", "processing_class", "callbacks"),
        *("reward_processing_classes", "optimizers", "quantization_config", "peft_config"),
        *("tools", "rollout_func", "environment_factory"),
    }
)
BASE: Options = {
    "per_device_train_batch_size": 12,
    "learning_rate": 0.05,
    "optim": "sgd",
    "max_grad_norm": 1e9,
    "beta": 0.1,
    "max_steps": 2,
}
# TRL's sampler and padded rows: with these our run does TRL's arithmetic, in TRL's order.
TRL_PATHS: Options = {
    "group_sampler": "transformers",
    "shared_prefix": "never",
    "onednn_linear": False,
}
# What a run measures of itself, or what means something else in ours by design.
NOT_COMPARED = frozenset(
    {
        *("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"),
        *("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "total_flos"),
        "frac_reward_zero_std",
    }
)


# Rewards and completions --------------------------------------------------------------------------


def texts(completions: Sequence[Any]) -> list[str]:
    """The text of each completion, of a conversation the first message's."""
    return [c if isinstance(c, str) else c[0]["content"] for c in completions]


def vowels(*, completions: Sequence[Any], **_: Any) -> list[float]:
    """Differ within a group of other texts."""
    return [
        float(sum(character in "aeiou13579" for character in text)) for text in texts(completions)
    ]


def by_place(*, completions: Sequence[Any], **_: Any) -> list[float]:
    """Differ also within a group of equal texts."""
    return [float(index * index % 7) for index in range(len(completions))]


def rollout(prompts: list[str], trainer: Any) -> Options:
    """Give 1 to 8 tokens that depend on the prompt and the place in the group only."""
    tokenizer, rows = trainer.processing_class, []
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(sum(map(ord, prompt)) * 10 + index % 4)
        length = 1 + int(torch.randint(8, (), generator=generator))
        rows.append(torch.randint(4, 60, (length,), generator=generator).tolist())
        if index % 2:
            rows[-1][-1] = tokenizer.eos_token_id
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    return {"prompt_ids": ids, "completion_ids": rows, "logprobs": None}


def scored_rollout(prompts: list[str], trainer: Any) -> Options:
    """Also say how likely a sampler (another one than the policy) took each token to be."""
    output = rollout(prompts, trainer)
    logprobs = [[-1.0 - 0.3 * (i % 5) for i in row] for row in output["completion_ids"]]
    return output | {"logprobs": logprobs}


def masked_rollout(prompts: list[str], trainer: Any) -> Options:
    """Also say that each third token came from an environment, and hand out a column."""
    output = rollout(prompts, trainer)
    mask = [[int(i % 3 != 1) for i in range(len(row))] for row in output["completion_ids"]]
    return output | {"env_mask": mask, "place": list(range(len(prompts)))}


# Runs ---------------------------------------------------------------------------------------------


def trainer_of(cls: Any, config: Any, model: Any, folder: Path, **changes: Any) -> Any:
    """A trainer with the options of ``BASE``; ``changes`` also holds arguments of the trainer."""
    given = {name: changes.pop(name) for name in TRAINER_ARGUMENTS & changes.keys()}
    arguments = {"reward_funcs": vowels, "train_dataset": PROMPTS} | given
    args = config(**settings(folder, **(BASE | changes)))
    return cls(str(model) if isinstance(model, Path) else model, args=args, **arguments)


def ours(model: Any, folder: Path, **changes: Any) -> Any:
    return trainer_of(ExtGRPOTrainer, ExtGRPOConfig, model, folder, **changes)


def theirs(model: Any, folder: Path, **changes: Any) -> Any:
    return trainer_of(GRPOTrainer, GRPOConfig, model, folder, **changes)


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    log: Log
    weights: dict[str, torch.Tensor]
    completions: list[Any]
    advantages: list[float]

    @classmethod
    def of(cls, trainer: Any) -> Run:
        """Train, and keep the numbers."""
        trainer.train()
        return cls(
            log=trainer.state.log_history,
            weights={name: value.clone() for name, value in trainer.model.state_dict().items()},
            completions=list(trainer._logs["completion"]),
            advantages=list(trainer._logs["advantages"]),
        )

    @property
    def moves(self) -> bool:
        """Whether the weights were trained at all."""
        norms = [entry["grad_norm"] for entry in self.log if "grad_norm" in entry]
        return all(map(math.isfinite, norms)) and max(norms) > 1e-3


_CHANGES: dict[str, Options] = {}


def trl_run(model: Path, folder: Path, **changes: Any) -> Run:
    """The run of plain TRL with these changes; run once, however often it is asked for."""
    key = repr(sorted(changes.items()))
    _CHANGES[key] = changes
    return _trl_run(model, folder, key)


@functools.cache
def _trl_run(model: Path, folder: Path, key: str) -> Run:
    return Run.of(theirs(model, folder, **_CHANGES[key]))


# Agreement ----------------------------------------------------------------------------------------


def assert_same_run(
    found: Run,
    expected: Run,
    *,
    rel: float = 1e-4,
    weights: tuple[float, float] = (2e-6, 1e-5),
    but: Sequence[str] = (),
) -> None:
    """Every number that TRL logged, each advantage and all weights; with ``rel=0`` bit for bit.

    Args:
        found: Ours.
        expected: Of plain TRL.
        rel: Tolerance of a metric, relative; a hundredth of it is the absolute one.
        weights: Tolerances of a weight, absolute and relative.
        but: Metrics that are left out.
    """
    assert found.completions == expected.completions
    assert len(found.log) == len(expected.log)
    for ours_logged, theirs_logged in zip(found.log, expected.log, strict=True):
        for key in theirs_logged.keys() - NOT_COMPARED - set(but):
            if key.startswith("time/"):  # where both runs are ours
                continue
            left, right = ours_logged[key], theirs_logged[key]
            assert left == right or left == pytest.approx(right, rel=rel, abs=rel / 100), key
    assert found.advantages == pytest.approx(expected.advantages, abs=2e-6 if rel else 0)
    assert found.weights.keys() == expected.weights.keys()
    atol, rtol = weights if rel else (0.0, 0.0)
    for name, weight in found.weights.items():
        torch.testing.assert_close(weight, expected.weights[name], atol=atol, rtol=rtol, msg=name)


def differ(left: Run, right: Run) -> bool:
    """Whether two runs of plain TRL have other completions, weights or metrics."""
    if left.completions != right.completions or left.weights.keys() != right.weights.keys():
        return True
    if any(not torch.equal(left.weights[name], right.weights[name]) for name in left.weights):
        return True
    return any(
        a.get(key) != b.get(key)
        for a, b in zip(left.log, right.log, strict=False)
        for key in {*a, *b} - NOT_COMPARED
    )
