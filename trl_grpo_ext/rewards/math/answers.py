"""What an answer can be: a number, a word, a group of answers, or an expression."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from trl_grpo_ext.rewards.math.units import Unit


@dataclass(frozen=True)
class Number:
    """An exact number, as written: ``0.333`` is not a third.

    Attributes:
        value: The number in front of the unit; 50 for "50%".
        unit: What follows it, if anything does.
    """

    value: Fraction
    unit: Unit | None = None

    @property
    def latex(self) -> str:
        """The number without its unit, as a computer algebra system reads it."""
        sign = "-" if self.value < 0 else ""
        top, bottom = abs(self.value.numerator), self.value.denominator
        return f"{sign}{top}" if bottom == 1 else rf"{sign}\frac{{{top}}}{{{bottom}}}"


@dataclass(frozen=True)
class Words:
    """A word or a few, such as "yes", "monday" or "infinity"."""

    text: str


@dataclass(frozen=True)
class Choice:
    """The letter of one of several choices, in upper case."""

    letter: str


@dataclass(frozen=True)
class Group:
    """Several answers that are one.

    Attributes:
        kind: The brackets ("()", "[)", "{}" and so on), or "list", "union", "ratio", "matrix",
            "row".
        items: In the order written.
    """

    kind: str
    items: tuple[Answer, ...]

    @property
    def is_ordered(self) -> bool:
        """Whether another order of the items would be another answer."""
        return self.kind not in {"list", "{}", "union"}


@dataclass(frozen=True)
class Expression:
    """Something that only computer algebra can compare.

    Attributes:
        latex: The expression, equation or inequality.
        unit: What follows it, if anything does.
    """

    latex: str
    unit: Unit | None = None


@dataclass(frozen=True)
class Assigned:
    """An answer with the name of what it is the value of: ``x = 5``.

    Attributes:
        name: A variable; a label in words, such as "Total", is left out.
        value: The right-hand side.
    """

    name: str
    value: Answer


Answer: TypeAlias = Number | Words | Choice | Group | Expression | Assigned
