"""Markdown that untrusted text cannot break.

Text that a model wrote stands inside fences that it cannot close, its control characters spelt out.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence

MAX_EXAMPLE_CHARS = 1500
_BIDI_CONTROLS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def section(title: str, body: str) -> str:
    """Return a section with its title."""
    return f"## {title}\n\n{body}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a markdown table; the first column holds names, the others values."""
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join([code_span(str(name)), *map(_cell, values)]) for name, *values in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: object) -> str:
    text = cell_text(value)
    return text if value is None or isinstance(value, bool | int | float) else code_span(text)


def cell_text(value: object) -> str:
    """Return a value as a table shows it, without markup.

    Example:
        >>> [cell_text(value) for value in (None, 1.0, True, ["a"], "b")]
        ['–', '1', 'True', '["a"]', 'b']
    """
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool | int | str):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def code_span(text: str) -> str:
    """Return text as inline code on one line, also inside a table."""
    if not text:
        return ""
    line = visible(text).replace("\t", "\\t").replace("\n", "\\n").replace("|", "\\|")
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if "`" in line or not line.strip() else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def fenced(text: str, *, language: str = "text") -> str:
    """Return text as a code block that it cannot close, cut where it is very long."""
    shown = visible(text[:MAX_EXAMPLE_CHARS])
    cut = len(text) - MAX_EXAMPLE_CHARS
    fence = "`" * max(3, _longest_run(shown) + 1)
    block = f"{fence}{language}\n{shown}\n{fence}"
    return block if cut <= 0 else f"{block}\n\n({cut} more characters)"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def visible(text: str) -> str:
    """Return text with control characters, and those that turn the writing direction, spelt out."""
    return "".join(
        character if character in "\n\t" or not _is_hidden(character) else _escape(character)
        for character in text
    )


def _is_hidden(character: str) -> bool:
    turns_direction = unicodedata.bidirectional(character) in _BIDI_CONTROLS
    return turns_direction or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
