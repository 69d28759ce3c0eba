"""Greedy accuracy and pass@k of a model by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
from accelerate import Accelerator
from datasets import Dataset

from trl_grpo_ext.data import TaskArguments
from trl_grpo_ext.evaluation.policy import (
    PolicyEvaluationArguments,
    evaluate_policy,
    metric_lines,
    policy_evaluation_problems,
    replies_rows,
)

ROWS = Dataset.from_list([{"prompt": f"{a} =", "answer": str(a)} for a in range(5)])


def vowels(*, completions: list[str], **_: Any) -> list[float | None]:
    """Right is a reply with a vowel; one with a b has no score."""
    return [None if "b" in text else float(any(c in "aeiou" for c in text)) for text in completions]


def evaluate(tiny_model: Any, tiny_tokenizer: Any, **changes: Any) -> Any:
    options = PolicyEvaluationArguments(
        output_dir="unused",
        **{"num_samples": 4, "max_completion_length": 6, "max_unscored_fraction": 1.0, **changes},
    )
    return evaluate_policy(
        tiny_model, tiny_tokenizer, ROWS, vowels, options=options, accelerator=Accelerator(cpu=True)
    )


def test_metrics_equal_a_count_over_the_replies(tiny_model: Any, tiny_tokenizer: Any) -> None:
    found = evaluate(tiny_model, tiny_tokenizer, pass_k=[2])
    rows = list(replies_rows(ROWS, found))
    assert len(rows) == 5 + 5 * 4
    by_prompt: dict[str, list[float]] = {}
    for row in rows:
        if row["decoding"] == "sampled" and row["score"] is not None:
            by_prompt.setdefault(row["prompt"], []).append(row["score"])
    shares = [sum(scores) / len(scores) for scores in by_prompt.values()]
    assert 0 < sum(shares) < len(shares)  # so that the next lines can fail
    assert found.metrics["accuracy"] == pytest.approx(sum(shares) / len(shares))
    chances = [
        1 - math.comb(int(len(s) - sum(s)), 2) / math.comb(len(s), 2)
        for s in by_prompt.values()
        if len(s) >= 2
    ]
    assert found.metrics["pass@2"] == pytest.approx(sum(chances) / len(chances))
    greedy = [row["score"] for row in rows if row["decoding"] == "greedy"]
    scored = [score for score in greedy if score is not None]
    assert found.metrics["greedy/accuracy"] == pytest.approx(sum(scored) / len(scored))
    assert any(line.startswith("pass@2: ") for line in metric_lines(found.metrics))
    assert found.metrics["pass@2/low"] <= found.metrics["pass@2"] <= found.metrics["pass@2/high"]


def test_greedy_alone(tiny_model: Any, tiny_tokenizer: Any) -> None:
    found = evaluate(tiny_model, tiny_tokenizer, num_samples=0)
    assert found.sampled is None
    assert sorted(found.metrics) == [f"greedy/accuracy{end}" for end in ("", "/high", "/low")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": -1}, "`num_samples` is -1"),
        ({"pass_k": [16]}, "`pass_k` has 16"),
        ({"pass_k": [0]}, "`pass_k` has 0"),
        ({"temperature": 0.0}, "`temperature` is 0.0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
    ],
)
def test_problems_of_numbers(changes: dict[str, Any], message: str) -> None:
    options = PolicyEvaluationArguments(output_dir="out", **changes)
    found = list(policy_evaluation_problems(TaskArguments(), options))
    assert any(message in problem for problem in found)


def test_problems_of_the_task() -> None:
    found = list(policy_evaluation_problems(TaskArguments(dataset="x.jsonl")))
    assert any("`rewards` is empty" in problem for problem in found)
    assert any("`num_eval_prompts` is 0" in problem for problem in found)
