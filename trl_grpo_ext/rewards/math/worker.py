r"""Are two expressions equal? Runs in the worker processes: see ``worker_script.py``.

They are in LaTeX, and parsed by a grammar: nothing in them is run as Python.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

DIGITS = 40
# Relative. Beyond any rounding of 40 digits, below what two different short answers can be apart.
TOLERANCE = 1e-25
NUM_POINTS = 3


def prepare() -> None:
    """Import what takes a second."""
    import math_verify  # noqa: F401


def verdict(gold: str, answer: str) -> bool | None:
    """Return :func:`same_expression`; what computer algebra cannot do is not equal."""
    try:
        return same_expression(gold, answer)
    except (Exception, RecursionError, MemoryError):  # noqa: BLE001 - sympy raises anything
        return False


def same_expression(gold: str, answer: str) -> bool | None:
    r"""Return whether two expressions in LaTeX are equal, for all values of their variables.

    Returns:
        ``None`` if one of them cannot be parsed.

    Example:
        >>> same_expression(r"2\sqrt{3}", r"\sqrt{12}")
        True
    """
    from math_verify import verify

    left, right = _parsed(gold), _parsed(answer)
    if left is None or right is None:
        return None
    if left.free_symbols != right.free_symbols:
        return False
    if not verify(left, right, numeric_precision=DIGITS, timeout_seconds=None):
        return False
    return _agree_in_numbers(left, right)  # last, as some answers keep it busy: x^{10^9}


@lru_cache(maxsize=256)
def _parsed(latex: str) -> Any:
    """Return the expression of sympy, ``None`` if the text is none, or is not finite."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import nan, oo, zoo

    as_it_is = NormalizationConfig(basic_latex=True, boxed="last")
    found = parse(
        rf"\boxed{{{latex}}}",
        [LatexExtractionConfig(boxed_match_priority=0, normalization_config=as_it_is)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    if len(found) != 1 or found[0].has(nan, oo, -oo, zoo):
        return None
    return found[0]


def _agree_in_numbers(left: Any, right: Any) -> bool:
    """Return whether two expressions have the same values; true of what has none, an equation.

    That keeps out what ``verify`` takes for equal after rounding.
    """
    from sympy import Expr, Rational

    if not isinstance(left, Expr) or not isinstance(right, Expr):
        return type(left) is type(right) or not isinstance(left, Expr | type(None))
    generator = random.Random(0)
    symbols = sorted(left.free_symbols, key=str)
    for _ in range(NUM_POINTS if symbols else 1):
        point = {symbol: Rational(generator.randint(2, 999), 997) for symbol in symbols}
        if not _close(left.subs(point), right.subs(point)):
            return False
    return True


def _close(left: Any, right: Any) -> bool:
    from sympy import N

    a, b = N(left.doit(), DIGITS), N(right.doit(), DIGITS)
    return bool(abs(a - b) <= TOLERANCE * max(abs(a), abs(b)))
