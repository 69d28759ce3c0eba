"""Reading decoded JSON strictly: a value of the right kind, or an unreadable reply."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from trl_grpo_ext.rewards.api.wire import UnreadableReplyError

# As in JSON, but ASCII only and as a whole: no "7/10", "7.5 or 8", "NaN", "+7", "1_000" or "７".
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")

_MOST_TOKENS = 10**9  # of one request; more is no count


def number(value: Any) -> float:
    """Return a finite JSON number as a float; a boolean or a text is none.

    Raises:
        UnreadableReplyError: it is something else, NaN, infinite, or too large for a float.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        unreadable(f"{_kind(value)} stands where a number should")
    try:
        converted = float(value)
    except OverflowError:
        unreadable("a number is too large")
    if not math.isfinite(converted):
        unreadable("a number is not finite")
    return converted


def written_number(text: str) -> float:
    """Return the number that a text is as a whole, but for white space around it.

    Raises:
        UnreadableReplyError: the text is not one finite decimal number in ASCII.

    Example:
        >>> written_number(" 7.5 ")
        7.5
        >>> written_number("7/10")
        Traceback (most recent call last):
        trl_grpo_ext.rewards.api.wire.UnreadableReplyError: '7/10' is not a number
    """
    stripped = text.strip(" \t\r\n")
    if not _NUMBER.fullmatch(stripped):
        unreadable(f"{stripped[:40]!r} is not a number")
    return number(float(stripped))


def entry(value: Any, key: str) -> Any:
    """Return the value under a key of a JSON object."""
    if not isinstance(value, Mapping):
        unreadable(f"{_kind(value)} stands where an object with `{key}` should")
    if key not in value:
        unreadable(f"there is no `{key}`")
    return value[key]


def array(value: Any, *, length: int | None = None) -> Sequence[Any]:
    """Return a JSON array, of this length if one is given."""
    if not isinstance(value, list):
        unreadable(f"{_kind(value)} stands where a list should")
    if length is not None and len(value) != length:
        unreadable(f"a list has {len(value)} entries instead of {length}")
    return value


def text(value: Any) -> str:
    """Return a JSON string."""
    if not isinstance(value, str):
        unreadable(f"{_kind(value)} stands where a text should")
    return value


def whole(value: Any) -> int:
    """Return a JSON number that is an integer; neither a boolean nor 1.0 is one."""
    if isinstance(value, bool) or not isinstance(value, int):
        unreadable(f"{_kind(value)} stands where a whole number should")
    return value


def in_order(values: Sequence[Any], places: Sequence[Any]) -> list[Any]:
    """Return the values in the order of their places, which must be 0, 1, 2, ... once each.

    Example:
        >>> in_order(["second", "first"], [1, 0])
        ['first', 'second']
    """
    by_place = dict(zip(map(whole, places), values, strict=True))
    if sorted(by_place) != list(range(len(values))):
        unreadable("the indices are not those of the request, once each")
    return [by_place[place] for place in range(len(values))]


def indexed(value: Any, *, length: int) -> list[Any]:
    """Return the entries of an array of objects in the order of their ``index``."""
    entries = array(value, length=length)
    return in_order(entries, [entry(one, "index") for one in entries])


def component(value: Any, *, index: int | None) -> float:
    """Return one number of a vector: the one at ``index``, or the only one."""
    vector = array(value)
    if index is None:
        return number(array(vector, length=1)[0])
    if index >= len(vector):
        unreadable(f"a list has {len(vector)} entries, none at {index}")
    return number(vector[index])


def total_tokens(body: Any) -> int:
    """Return what an OpenAI-like reply counted in ``usage``; 0 if it does not say."""
    usage = body.get("usage") if isinstance(body, Mapping) else None
    tokens = usage.get("total_tokens") if isinstance(usage, Mapping) else None
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        return 0
    return tokens if 0 < tokens < _MOST_TOKENS else 0


def decoded(value: str) -> Any:
    """Return the JSON value that a text is; no NaN, and no key twice in an object.

    Raises:
        UnreadableReplyError: it is no JSON, or nested beyond reason.
    """
    try:
        return json.loads(value, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        unreadable("the text is not JSON, or says something twice")


def unreadable(why: str) -> NoReturn:
    """Raise the error of a reply that is no score."""
    raise UnreadableReplyError(why) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    decoded_object = dict(pairs)
    if len(decoded_object) != len(pairs):
        raise ValueError
    return decoded_object


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
