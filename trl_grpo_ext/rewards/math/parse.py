r"""From the text of an answer to what it says; nothing is evaluated here."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from trl_grpo_ext.rewards.math.answers import (
    Answer,
    Assigned,
    Choice,
    Group,
    Number,
    Words,
)
from trl_grpo_ext.rewards.math.brackets import encloses_all, split_outside
from trl_grpo_ext.rewards.math.clean import SET_CLOSE, SET_OPEN, clean
from trl_grpo_ext.rewards.math.expression import read_expression
from trl_grpo_ext.rewards.math.number import read_number
from trl_grpo_ext.rewards.math.relation import read_relation
from trl_grpo_ext.rewards.math.units import changes_meaning

MAX_CHARACTERS = 500
MAX_NESTING = 8

_EQUALS = re.compile(r"=|\\(?:in|approx)(?![A-Za-z])")
_LIST = re.compile(r"[,;]|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_SEVERAL = re.compile(r",(?!\d{3}(?!\d))|;|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_COMMA = re.compile(r"[,;]")
_UNION = re.compile(r"\\cup(?![A-Za-z])|(?<=[\])]) ?U ?(?=[\[(])")
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])|\+/-")
_RATIO = re.compile(r"-?\d+(?:\.\d+)?(?:\s*:\s*-?\d+(?:\.\d+)?)+")
_CLOCK = re.compile(r"(\d{1,2}:\d{2})\s*([ap])\.?\s?m\.?", re.IGNORECASE)
_MATRIX = re.compile(r"\\begin\{([bp]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_CHOICE = re.compile(r"\(([A-Ja-j])\)|([A-J])\)?|(?:[Oo]ption|[Cc]hoice)\s+\(?([A-Ja-j])\)?")
_CHOICE_WITH_TEXT = re.compile(r"\(?([A-J])[).:]\s+(.+)")
_LETTER = re.compile(r"\b(?:[A-Za-z]|[A-J]{2,4})\b")
_LEADING_ZERO = re.compile(r"-?0\d+")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-][^\W\d_]+){0,4}")
_ARTICLE = re.compile(r"(?:the|an?)\s+", re.IGNORECASE)
_INFINITY = re.compile(r"([-+]?)\s*\\infty")
_VARIABLE = re.compile(r"[A-Za-z](?:_(?:\w|\{\w+\}))?'?|\\[A-Za-z]+|[A-Za-z]\([A-Za-z]\)")
_LABEL = re.compile(r"[^-\d+*/^=<>|{}]*")
_ARITHMETIC = re.compile(r"[\d.,+*/^(){} -]|\\times|\\cdot|\\div|\\frac")
_EMPTY_SET = {r"\emptyset", SET_OPEN + SET_CLOSE, SET_OPEN + " " + SET_CLOSE}


@lru_cache(maxsize=16_384)
def read_answer(text: str) -> Answer | None:
    r"""Return what the text of an answer says; ``None`` if it cannot be read as one answer.

    Args:
        text: The answer alone, such as what stands in a box. Text of more than 500 characters is
            no answer.

    Example:
        >>> read_answer(r"$\frac{3}{4}$") == read_answer("0.75")
        True
        >>> read_answer("some 70 to 75") is None
        True
    """
    if len(text) > MAX_CHARACTERS:
        return None
    cleaned = clean(text)
    return _read(cleaned) if 0 < len(cleaned) <= MAX_CHARACTERS else None


def _read(text: str, depth: int = 0) -> Answer | None:
    """Return the first reading that fits."""
    if depth > MAX_NESTING or not text:
        return None
    for read in (_read_fixed, _read_choice, read_number, _read_ratio, read_relation):
        if (answer := read(text)) is not None:
            return answer
    for read_parts in (_read_either, _read_equation, _read_list, _read_union, _read_brackets):
        if (answer := read_parts(text, depth + 1)) is not None:
            return answer
    return _read_matrix(text, depth + 1) or _read_words(text) or read_expression(text)


def _read_fixed(text: str) -> Answer | None:
    """Read what has a writing of its own: the empty set, infinity, the time of a clock."""
    if text in _EMPTY_SET:
        return Words("empty set")
    if match := _INFINITY.fullmatch(text):
        return Words("-infinity" if match[1] == "-" else "infinity")
    if match := _CLOCK.fullmatch(text):
        return Words(f"{match[1]} {match[2].lower()}m")
    return None


def _read_choice(text: str) -> Answer | None:
    if match := _CHOICE.fullmatch(text):
        return Choice((match[1] or match[2] or match[3]).upper())
    match = _CHOICE_WITH_TEXT.fullmatch(text)
    if match is None or _LETTER.search(match[2]) or changes_meaning(match[2]):
        return None
    return Choice(match[1])


def _read_ratio(text: str) -> Answer | None:
    if not _RATIO.fullmatch(text):
        return None
    return Group("ratio", tuple(Number(Fraction(part.strip())) for part in text.split(":")))


def _read_either(text: str, depth: int) -> Answer | None:
    r"""Read ``a \pm b`` as the two answers that it is."""
    if len(_PLUS_MINUS.findall(text)) != 1:
        return None
    return _group("list", [_PLUS_MINUS.sub(sign, text).lstrip("+ ") for sign in "+-"], depth)


def _read_equation(text: str, depth: int) -> Answer | None:
    """Read the right-hand side of ``name = ... = answer`` and of ``sum = answer``."""
    name, *sides = split_outside(text, _EQUALS)
    earlier = [name, *sides[:-1]]
    if not sides or changes_meaning(name) or any(map(_SEVERAL.search, earlier)):
        return None
    answer = _read(sides[-1], depth)
    numbers = [number for side in earlier if (number := read_number(side))]
    if answer is None or any(not _equal_values(number, answer) for number in numbers):
        return None
    if _LABEL.fullmatch(name) or _VARIABLE.fullmatch(name):
        is_variable = _VARIABLE.fullmatch(name) and len(sides) == 1
        return Assigned(name, answer) if is_variable else answer
    is_sum = isinstance(answer, Number) and not _ARITHMETIC.sub("", "".join(earlier))
    return answer if is_sum else None


def _equal_values(number: Number, answer: Answer) -> bool:
    return isinstance(answer, Number) and answer.value == number.value


def _read_list(text: str, depth: int) -> Answer | None:
    parts = [part for part in split_outside(text, _LIST) if part]
    return _group("list", parts, depth)


def _read_union(text: str, depth: int) -> Answer | None:
    return _group("union", split_outside(text, _UNION), depth)


def _read_brackets(text: str, depth: int) -> Answer | None:
    if not encloses_all(text):
        return None
    inner = text[1:-1].strip()
    parts = split_outside(inner, _COMMA)
    if len(parts) == 1:
        return _read(inner, depth)
    if any(_LEADING_ZERO.fullmatch(part) for part in parts):
        return None  # (1,000): a pair, or a thousand?
    kind = text[0] + text[-1]
    if kind in ("{}", SET_OPEN + SET_CLOSE):
        kind = "{}"
    elif len(parts) > 2:
        kind = "()"  # no interval, so that the shape of the brackets says nothing
    return _group(kind, parts, depth)


def _read_matrix(text: str, depth: int) -> Answer | None:
    match = _MATRIX.fullmatch(text)
    if match is None:
        return None
    rows = [_row(row, depth) for row in re.split(r"\\\\", match[2]) if row.strip()]
    return None if not rows or None in rows else Group("matrix", tuple(row for row in rows if row))


def _row(text: str, depth: int) -> Answer | None:
    items = _read_all(text.split("&"), depth)
    return Group("row", items) if items else None


def _group(kind: str, parts: list[str], depth: int) -> Answer | None:
    """Return the group of two or more parts, if each of them can be read."""
    items = _read_all(parts, depth) if len(parts) > 1 else ()
    return Group(kind, items) if items else None


def _read_all(parts: list[str], depth: int) -> tuple[Answer, ...]:
    """Return the answers in all parts; none at all if one of them cannot be read."""
    items: list[Answer] = []
    for part in parts:
        if (item := _read(part.strip(), depth)) is None:
            return ()
        items.append(item)
    return tuple(items)


def _read_words(text: str) -> Answer | None:
    text = _ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text
    if text.casefold() in ("nan", "null") or not _WORDS.fullmatch(text):
        return None
    is_product = len(text) < 3 and not text.isupper() and text != "no"
    return None if is_product else Words(text.casefold())
