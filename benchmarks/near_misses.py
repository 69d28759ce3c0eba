"""Wrong answers that look much like the right one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction


def near_misses(gold: str, *, seed: int) -> list[tuple[str, str]]:
    """Return wrong answers to a gold answer that is a decimal number: a kind, and its text."""
    value = Decimal(gold.replace(",", ""))
    misses = [(kind, text) for kind, text in _changed(gold, value, random.Random(seed))]
    return [(kind, text) for kind, text in misses if not _is_equal(text, value)]


def _changed(gold: str, value: Decimal, generator: random.Random) -> Iterator[tuple[str, str]]:
    yield "one more", f"{value + 1:f}"
    yield "one less", f"{value - 1:f}"
    yield "other sign", f"{-value:f}"
    yield "ten times", f"{value * 10:f}"
    yield "a tenth", f"{value / 10:f}"
    yield "two digits swapped", _swapped(gold.replace(",", ""), generator)
    yield "a digit more", f"{value:f}{generator.randint(1, 9)}"
    yield "a digit less", f"{value:f}"[:-1] or "0"
    yield "a nearby fraction", f"{Fraction(value) + Fraction(1, generator.randint(2, 9))}"
    yield "a hedge", f"{value:f} or {value + 1:f}"
    yield "a hedge before", f"{value - 1:f} or {value:f}"
    yield "a list", f"{value - 1:f}, {value:f}, {value + 1:f}"
    yield "a sum", f"{value - 1:f} + 1"
    yield "a larger unit", f"{value:f} thousand"
    yield "a bound", f"more than {value:f}"


def _swapped(digits: str, generator: random.Random) -> str:
    """The digits with two neighbours swapped that differ, if there are such."""
    places = [i for i in range(len(digits) - 1) if digits[i : i + 2].isdigit()]
    places = [i for i in places if digits[i] != digits[i + 1]]
    if not places:
        return digits
    i = generator.choice(places)
    return digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :]


def _is_equal(text: str, value: Decimal) -> bool:
    """Whether a change gave the same number: swapping equal digits, the negative of 0."""
    try:
        return Fraction(text) == Fraction(value)
    except ValueError:
        return False
