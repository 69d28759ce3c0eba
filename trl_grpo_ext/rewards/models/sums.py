"""Sums of integers, and whether the lines of a solution are right: what labels steps."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

AfterError = Literal["wrong", "alone"]

_SUM = re.compile(r"\d+(?:\s*[+-]\s*\d+)+")
_TERM = re.compile(r"([+-])\s*(\d+)")
_LINE = re.compile(r"\s*(-?\d+)\s*([+-])\s*(\d+)\s*=\s*(-?\d+)\.?\s*")


@dataclass(frozen=True)
class Sum:
    """A sum of integers, such as 4 - 1 + 7.

    Attributes:
        first: Its first number.
        terms: The others, each with its operator.
    """

    first: int
    terms: tuple[tuple[str, int], ...]

    @classmethod
    def in_text(cls, text: str) -> Sum | None:
        """Return the last sum that is written in the text, if there is one.

        Example:
            >>> Sum.in_text("How much is 4 - 1 + 7 =")
            Sum(first=4, terms=(('-', 1), ('+', 7)))
        """
        found = _SUM.findall(text)
        if not found:
            return None
        first = re.match(r"\d+", found[-1])
        assert first, "a sum starts with a number"
        terms = tuple((operator, int(number)) for operator, number in _TERM.findall(found[-1]))
        return cls(int(first[0]), terms)


def judge_steps(
    question: Sum, steps: Sequence[str], *, after_error: AfterError = "wrong"
) -> list[bool]:
    """Return whether each line of a solution is right.

    A right line takes the result of the line before, applies the next term of the sum, and gets
    the result right: "3 + 4 = 7", then "7 + 5 = 12" for 3 + 4 + 5. Nothing else is right, so a line
    of prose is not, nor is one after the last term.

    Args:
        question: The sum.
        steps: The lines of its solution.
        after_error: Of the lines after the first wrong one: ``"wrong"``, all are wrong, as they
            build on it (Math-Shepherd [1], PRM800K); or ``"alone"``, each is judged as if what the
            lines before got were right.

    References:
        [1] Wang et al. 2024, Math-Shepherd, arXiv:2312.08935, section 3.

    Example:
        >>> question = Sum.in_text("3 + 4 + 5")
        >>> judge_steps(question, ["3 + 4 = 8", "8 + 5 = 13"])
        [False, False]
        >>> judge_steps(question, ["3 + 4 = 8", "8 + 5 = 13"], after_error="alone")
        [False, True]
    """
    labels: list[bool] = []
    total, left = question.first, list(question.terms)
    for step in steps:
        line = _LINE.fullmatch(step)
        right = line is not None and bool(left) and _is_right(line, total, *left[0])
        labels.append(right and (after_error == "alone" or all(labels)))
        if line is not None:
            total, left = int(line[4]), left[1:]
    return labels


def solve(question: Sum) -> list[str]:
    """Return the right lines, from left to right.

    Example:
        >>> solve(Sum.in_text("3 + 4 - 9"))
        ['3 + 4 = 7', '7 - 9 = -2']
    """
    return _lines(question.first, question.terms)


def solve_wrongly(question: Sum, rng: random.Random) -> list[str]:
    """Return lines with one error at a random place; the lines after it build on it.

    The error is a wrong result, a number that was not the result of the line before, another term,
    the other operator, or a line too many at the end.
    """
    terms = list(question.terms)
    place = rng.randrange(len(terms) + 1)
    if place == len(terms):
        return _lines(question.first, [*terms, rng.choice(terms)])
    before = _lines(question.first, terms[:place])
    total = _value(question.first, terms[:place])
    line, total = _wrong_line(total, *terms[place], rng)
    return [*before, line, *_lines(total, terms[place + 1 :])]


def _is_right(line: re.Match[str], total: int, operator: str, number: int) -> bool:
    left, sign, right, result = line.groups()
    as_asked = (int(left), sign, int(right)) == (total, operator, number)
    return as_asked and int(result) == _value(total, [(operator, number)])


def _lines(total: int, terms: Sequence[tuple[str, int]]) -> list[str]:
    lines = []
    for operator, number in terms:
        result = _value(total, [(operator, number)])
        lines.append(f"{total} {operator} {number} = {result}")
        total = result
    return lines


def _value(first: int, terms: Sequence[tuple[str, int]]) -> int:
    return first + sum(number if operator == "+" else -number for operator, number in terms)


def _wrong_line(total: int, operator: str, number: int, rng: random.Random) -> tuple[str, int]:
    """Return a line that is wrong in one of four ways, and its result."""
    by, error = rng.choice([-3, -2, -1, 1, 2, 3]), rng.randrange(4)
    if error == 0:
        total += by
    elif error == 1:
        number = abs(number + by) if number + by != -number else number + abs(by)
    elif error == 2 and number:
        operator = "-" if operator == "+" else "+"
    result = _value(total, [(operator, number)])
    if error == 3 or (error == 2 and not number):
        result += by
    return f"{total} {operator} {number} = {result}", result
