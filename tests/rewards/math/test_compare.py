"""What is refused before any algebra, and what the algebra itself refuses."""

from __future__ import annotations

import pytest

from trl_grpo_ext.rewards.math.compare import same_answer
from trl_grpo_ext.rewards.math.parse import read_answer
from trl_grpo_ext.rewards.math.worker import same_expression


def is_same(gold: str, answer: str) -> bool:
    """Compare with an algebra that finds everything equal."""
    left, right = read_answer(gold), read_answer(answer)
    assert left is not None
    assert right is not None
    return same_answer(left, right, same_expression=lambda _, __: True)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\frac{\sqrt{3}}{2}", r"\sin(\frac{\pi}{3})"),
        (r"24\sqrt{2}", r"4!\sqrt{2}"),
        ("x+1", "X+1"),
        (r"\alpha+1", r"\beta+1"),
        ("x+1", "y+1"),
        (r"\sqrt{2} cm", r"\sqrt{2} kg"),
        ("72", r"\sqrt{5184}"),
        (r"\sqrt{2}, 1", r"\sqrt{2}"),
        (r"(\sqrt{2}, 1)", r"[\sqrt{2}, 1)"),
    ],
)
def test_same_answer_refuses_before_any_algebra(gold: str, answer: str) -> None:
    assert not is_same(gold, answer)
    assert is_same(gold, gold)


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        (r"\sqrt{12}", r"2\sqrt{3}", True),
        (r"\sqrt{2}\cdot 10^{-60}", r"2\sqrt{2}\cdot 10^{-60}", False),
        ("x", "x + 10^{-60}", False),
        ("x+1", "y+1", False),
        ("x", r"\frac{x}{", None),
        (r"\frac{1}{0}", "1", None),
    ],
)
def test_same_expression_compares_exactly(gold: str, answer: str, verdict: bool | None) -> None:
    assert same_expression(gold, answer) is verdict
