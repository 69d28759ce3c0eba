"""Where brackets close, and what stands outside all of them."""

from __future__ import annotations

import re

OPENING, CLOSING = "([{⦃", ")]}⦄"
MAX_DEPTH = 20

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def closing_brace(text: str, start: int) -> int | None:
    r"""Return where the brace that opens at ``start`` closes, or ``None``; ``\{`` is no brace.

    Example:
        >>> closing_brace(r"\boxed{\frac{1}{2}} m", 6)
        18
    """
    depth = 0
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def is_balanced(text: str) -> bool:
    """Return whether each bracket closes, none too deep; round and square ones may be mixed."""
    depth = 0
    for character in text:
        depth += (character in OPENING) - (character in CLOSING)
        if not 0 <= depth <= MAX_DEPTH:
            return False
    return depth == 0


def encloses_all(text: str) -> bool:
    """Return whether the first character is a bracket that closes at the last one.

    Example:
        >>> encloses_all("(0, 1]"), encloses_all("(x+1)(x-1)")
        (True, False)
    """
    if len(text) < 2 or text[0] not in OPENING or text[-1] not in CLOSING:
        return False
    return is_balanced(text) and is_balanced(text[1:-1])


def split_outside(text: str, separator: re.Pattern[str]) -> list[str]:
    """Return the parts between the separators that stand outside all brackets, stripped.

    Example:
        >>> split_outside("1, (2, 3)", re.compile(","))
        ['1', '(2, 3)']
    """
    depths, depth = [], 0
    for character in text:
        depth -= character in CLOSING
        depths.append(depth)
        depth += character in OPENING
    parts, start = [], 0
    for match in separator.finditer(text):
        if depths[match.start()] == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]
