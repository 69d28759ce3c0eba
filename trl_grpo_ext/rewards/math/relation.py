r"""Inequalities in one variable, as the intervals that they describe."""

from __future__ import annotations

import re

from trl_grpo_ext.rewards.math.answers import Answer, Assigned, Group, Words
from trl_grpo_ext.rewards.math.number import read_number

_SIGN = r"(<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z]))"
_SPLIT = re.compile(_SIGN)
_VARIABLE = re.compile(r"[A-Za-z]")
_MIRRORED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_BELOW, _ABOVE = Words("-infinity"), Words("infinity")


def read_relation(text: str) -> Answer | None:
    r"""Return the interval of ``x > 3`` or ``1 < x \le 2`` under the name of its variable.

    Returns:
        ``None`` for what is no inequality between one letter and numbers.

    Example:
        >>> read_relation("x > 3").value.kind
        '()'
    """
    parts = [part.strip() for part in _SPLIT.split(text)]
    if len(parts) == 3:
        left, sign, right = parts
        if _VARIABLE.fullmatch(left):
            return _half_line(left, sign, right)
        return _half_line(right, _MIRRORED[sign], left) if _VARIABLE.fullmatch(right) else None
    return _between(parts) if len(parts) == 5 else None


def _half_line(name: str, sign: str, bound: str) -> Answer | None:
    number = read_number(bound)
    if number is None:
        return None
    if sign in (">", r"\ge"):
        return Assigned(name, Group("()" if sign == ">" else "[)", (number, _ABOVE)))
    return Assigned(name, Group("()" if sign == "<" else "(]", (_BELOW, number)))


def _between(parts: list[str]) -> Answer | None:
    first, sign1, name, sign2, last = parts
    if sign1 in (">", r"\ge"):
        first, sign1, sign2, last = last, _MIRRORED[sign2], _MIRRORED[sign1], first
    low, high = read_number(first), read_number(last)
    upward = {sign1, sign2} <= {"<", r"\le"}
    if not _VARIABLE.fullmatch(name) or low is None or high is None or not upward:
        return None
    kind = ("(" if sign1 == "<" else "[") + (")" if sign2 == "<" else "]")
    return Assigned(name, Group(kind, (low, high)))
