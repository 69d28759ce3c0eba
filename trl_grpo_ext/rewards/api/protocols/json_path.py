"""Paths into a JSON value, such as ``data[0].score`` or ``results[*].score``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from trl_grpo_ext.rewards.api.protocols.reading import array, entry, unreadable

# A key, a place in a list, or None for each entry of a list.
Step: TypeAlias = str | int | None

_STEP = re.compile(r"\.?(?P<key>[^.\[\]]+)|\[(?P<place>0|[1-9][0-9]{0,8})\]|\[(?P<each>\*)\]")


def path_steps(path: str) -> list[Step]:
    """Return the steps of a path.

    Raises:
        ValueError: the path is not made of keys with dots between them, ``[0]`` and ``[*]``.

    Example:
        >>> path_steps("data[*].score"), path_steps("[0]")
        (['data', None, 'score'], [0])
    """
    steps: list[Step] = []
    position = 0
    while position < len(path):
        match = _STEP.match(path, position)
        if match is None or (match["key"] and bool(steps) != (path[position] == ".")):
            raise ValueError(f"{path!r} is not a path at character {position}")
        steps.append(match["key"] or (int(match["place"]) if match["place"] else None))
        position = match.end()
    if not steps or steps.count(None) > 1:
        raise ValueError(f"{path!r} is empty, or holds [*] twice")
    return steps


def follow(steps: Sequence[Step], value: Any) -> Any:
    """Return what stands at the end of a path: a list of that for each entry where it has a ``*``.

    Raises:
        UnreadableReplyError: the path does not lead anywhere in this value.

    Example:
        >>> follow(path_steps("data[*].score"), {"data": [{"score": 1}, {"score": 2}]})
        [1, 2]
    """
    for position, step in enumerate(steps):
        if step is None:
            return [follow(steps[position + 1 :], one) for one in array(value)]
        value = entry(value, step) if isinstance(step, str) else _place(value, step)
    return value


def _place(value: Any, place: int) -> Any:
    if place >= len(array(value)):
        unreadable(f"a list has {len(value)} entries, none at {place}")
    return value[place]
