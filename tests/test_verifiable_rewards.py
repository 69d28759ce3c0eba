"""The rewards `math` and `code` in the trainer, alone and in two processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from launching import launch
from rewards.code.levels_here import skip_unless_there
from runs import settings, train

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.rewards.code.reward import CodeReward
from trl_grpo_ext.rewards.math import MathReward

TESTS = ["assert f(2) == 4", "assert f(3) == 6"]
ROWS = [
    {"prompt": "number", "answer": "2 * 3 = 6\n#### 6", "tests": TESTS},
    {"prompt": "sum", "answer": "x + 1", "tests": TESTS},
    {"prompt": "square", "answer": "x^2 + 2x", "tests": TESTS},
    {"prompt": "unknown", "answer": "??", "tests": TESTS},
]
# A group's programs pass both tests, one, none (or end early), and are none. Its answers:
ANSWERS = {
    "number": ("6", "7", "6.0"),  # right, wrong, right
    "sum": ("1 + x", "x + 2", "x + 1"),  # the same
    "square": ("x^2", "2x + x^2", "x"),  # the second is right
    "unknown": ("6", "7", "6"),
}
BUSY = "sum"  # the group in which one runs out of time
MATH = [1, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0, None, None, None, None]
CODE = [1, 0.5, 0, 0] * 4
EXPECTED = {
    "rewards/math/mean": 5 / 12,
    "rewards/code/mean": 6 / 16,
    "reward": (5 + 6) / 16,
    "rewards/code/time_fraction": 1 / 16,
    "rewards/code/sandbox_fraction": 0.0,
    "rewards/math/timeouts_fraction": 0.0,
    "rewards/math/crashes_fraction": 0.0,
    "rewards/math/unparsable_gold_fraction": 4 / 16,
}


def group(prompt: str) -> list[str]:
    """The replies to a prompt."""
    third = "while True: pass" if prompt == BUSY else "exit(0)"
    programs = ["def f(n): return n + n", "def f(n): return 4", third]
    answered = [
        f"{program}  # <answer>{answer}</answer>"
        for program, answer in zip(programs, ANSWERS[prompt], strict=True)
    ]
    return [*answered, "I do not know."]


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Groups in their order; a process has whole groups."""
    tokenizer, rows = trainer.processing_class, []
    for place, prompt in enumerate(prompts):
        reply = group(prompt)[place % 4]
        rows.append(tokenizer(reply, add_special_tokens=False).input_ids)
    return {"prompt_ids": tokenizer(prompts).input_ids, "completion_ids": rows, "logprobs": None}


def run(model: str, output_dir: Path, *, processes: int) -> dict[str, Any]:
    """Train one step on all rows; return its log, completions, advantages and rewards."""
    config = ExtGRPOConfig(
        **settings(
            output_dir,
            per_device_train_batch_size=16 // processes,
            max_completion_length=64,
            max_steps=1,
            beta=0.0,
            shuffle_dataset=False,
            group_sampler="transformers",
        )
    )
    rewards = [MathReward(), CodeReward(sandbox="namespaces", time_limit_s=2.0)]
    trainer = ExtGRPOTrainer(model, rewards, config, Dataset.from_list(ROWS), rollout_func=rollout)
    history, _ = train(trainer)
    for reward in rewards:
        reward.close()
    logs = trainer._logs
    return {
        "log": history[0],
        "completions": list(logs["completion"]),
        "advantages": list(logs["advantages"]),
        "rewards": {name: list(found) for name, found in logs["rewards"].items()},
    }


SCRIPT = """
import sys, warnings
warnings.filterwarnings("ignore")
sys.path[:0] = [{tests!r}]
from pathlib import Path
import torch
from test_verifiable_rewards import run

found = run(sys.argv[1], Path(sys.argv[2]), processes=2)
if torch.distributed.get_rank() == 0:
    torch.save(found, sys.argv[2] + ".pt")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(autouse=True)
def _no_warning_of_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def test_two_processes_give_the_scores_and_metrics_of_one(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    skip_unless_there("namespaces")
    one = run(str(tiny_model_dir), tmp_path, processes=1)
    assert one["completions"] == [reply for row in ROWS for reply in group(row["prompt"])]
    scores = [[None if math.isnan(x) else x for x in one["rewards"][n]] for n in ("math", "code")]
    assert scores == [MATH, CODE]
    assert {key: one["log"][key] for key in EXPECTED} == pytest.approx(EXPECTED)

    script = SCRIPT.format(tests=str(Path(__file__).parent))
    two = launch(script, tmp_path, tiny_model_dir, tmp_path / "two", processes=2)
    assert two["completions"] == one["completions"]
    assert two["advantages"] == pytest.approx(one["advantages"], abs=1e-6)
    for name, found in one["rewards"].items():
        assert two["rewards"][name] == pytest.approx(found, nan_ok=True)
    keys = [key for key in one["log"] if key.startswith(("reward", "frac_reward"))]
    assert set(EXPECTED) <= set(keys)
    assert {key: two["log"][key] for key in keys} == pytest.approx(
        {key: one["log"][key] for key in keys}, abs=1e-6
    )


def test_rows_without_tests_are_left_to_the_other_rewards(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """In a data set of math and code, `code` does not leave out the rows of math."""
    skip_unless_there("namespaces")
    rows = [{**row, "tests": TESTS if row["prompt"] == "number" else None} for row in ROWS]
    config = ExtGRPOConfig(
        **settings(tmp_path, per_device_train_batch_size=16, max_steps=1, beta=0.0)
    )
    trainer = ExtGRPOTrainer(
        str(tiny_model_dir),
        [MathReward(), CodeReward(sandbox="namespaces", time_limit_s=2.0)],
        config,
        Dataset.from_list(rows),
        rollout_func=rollout,
    )
    [log, *_], _ = train(trainer)
    assert log["rewards/excluded_fraction"] == 0
    assert log["rewards/code/skipped_fraction"] == 12 / 16
    assert log["rewards/math/mean"] == pytest.approx(EXPECTED["rewards/math/mean"])
    assert log["rewards/code/mean"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
