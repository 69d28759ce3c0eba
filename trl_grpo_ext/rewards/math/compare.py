"""Whether an answer equals the gold answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from trl_grpo_ext.rewards.math.answers import (
    Answer,
    Assigned,
    Choice,
    Expression,
    Group,
    Number,
    Words,
)
from trl_grpo_ext.rewards.math.expression import letters, operations
from trl_grpo_ext.rewards.math.units import PERCENT, Unit

SameExpression: TypeAlias = Callable[[str, str], bool]


def same_text(gold: str, answer: str) -> bool:
    """Compare expressions as text, without any algebra."""
    return gold == answer


def same_answer(
    gold: Answer, answer: Answer, *, same_expression: SameExpression = same_text
) -> bool:
    """Return whether the answer says what the gold answer says.

    Numbers are compared exactly; what is written with roots, letters or operations goes to
    ``same_expression``.

    Args:
        gold: The right answer.
        answer: That of a reply.
        same_expression: Compares two expressions in LaTeX, the gold one first.

    Example:
        >>> from trl_grpo_ext.rewards.math.parse import read_answer
        >>> same_answer(read_answer("{1, 2}"), read_answer("2, 1"))
        True
        >>> same_answer(read_answer("5 km"), read_answer("5 m"))
        False
    """
    if isinstance(gold, Assigned) or isinstance(answer, Assigned):
        return _same_assigned(gold, answer, same_expression)
    if isinstance(gold, Number):
        return isinstance(answer, Number) and _same_number(gold, answer)
    if isinstance(gold, Group):
        return isinstance(answer, Group) and _same_group(gold, answer, same_expression)
    if isinstance(gold, Expression):
        return _same_expression(gold, answer, same_expression)
    return _same_words(gold, answer)


def _same_assigned(gold: Answer, answer: Answer, same_expression: SameExpression) -> bool:
    if isinstance(gold, Assigned) and isinstance(answer, Assigned) and gold.name != answer.name:
        return False
    if isinstance(gold, Expression) and "=" in gold.latex:
        return _same_expression(gold, _as_equation(answer), same_expression)
    gold = gold.value if isinstance(gold, Assigned) else gold
    answer = answer.value if isinstance(answer, Assigned) else answer
    return same_answer(gold, answer, same_expression=same_expression)


def _as_equation(answer: Answer) -> Answer:
    if isinstance(answer, Assigned) and isinstance(answer.value, Expression | Number):
        return Expression(f"{answer.name}={answer.value.latex}")
    return answer


def _same_number(gold: Number, answer: Number) -> bool:
    if not _same_unit(gold.unit, answer.unit):
        return _is_percent_of(gold, answer)
    if gold.unit and answer.unit:
        return gold.value * gold.unit.factor == answer.value * answer.unit.factor
    return gold.value == answer.value or _is_percent_of(gold, answer)


def _is_percent_of(gold: Number, answer: Number) -> bool:
    """Return whether one is a percentage and the other one the same number without."""
    if gold.unit == PERCENT and answer.unit is None:
        return gold.value / 100 == answer.value
    return answer.unit == PERCENT and gold.unit is None and answer.value / 100 == gold.value


def _same_unit(gold: Unit | None, answer: Unit | None) -> bool:
    """Return whether the units are of one kind, or one of them was left out."""
    if gold and answer:
        return gold.dimension == answer.dimension
    return not (gold and gold.is_letter)  # a gold answer "5 m" may be five times m


def _same_words(gold: Answer, answer: Answer) -> bool:
    if isinstance(gold, Choice) and isinstance(answer, Expression):
        return gold.letter == answer.latex.upper()
    return isinstance(gold, Words | Choice) and gold == answer


def _same_group(gold: Group, answer: Group, same_expression: SameExpression) -> bool:
    kinds = {gold.kind, answer.kind}
    if (len(kinds) > 1 and kinds != {"list", "{}"}) or len(gold.items) != len(answer.items):
        return False
    left = list(answer.items)
    for wanted in gold.items:
        candidates = left[:1] if gold.is_ordered else left
        for index, found in enumerate(candidates):
            if same_answer(wanted, found, same_expression=same_expression):
                del left[index]
                break
        else:
            return False
    return True


def _same_expression(gold: Expression, answer: Answer, same_expression: SameExpression) -> bool:
    if not isinstance(answer, Expression | Number):
        return False
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if operations(answer.latex) - operations(gold.latex):
        return False
    if letters(answer.latex) != letters(gold.latex):
        return False
    return same_expression(gold.latex, answer.latex)
