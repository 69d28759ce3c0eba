"""The completions that a run logged, grouped by prompt, cut to what a page can hold."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trl_grpo_ext.errors import ConfigurationError

FILES = "completions/completions_*.parquet"
MAX_CHARS = 4000  # of a completion or of a message

Message = tuple[str, str]  # role and text


@dataclass(frozen=True)
class Group:
    """The completions of one prompt: text, scores by column, and texts of further columns."""

    prompt: Sequence[Message]
    texts: Sequence[str]
    scores: Sequence[Sequence[float | None]]
    extras: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Step:
    """What one step sampled; ``num_groups`` counts those that were left out, too."""

    step: int
    columns: Sequence[str]
    extra_columns: Sequence[str]
    groups: Sequence[Group]
    num_groups: int


@dataclass(frozen=True)
class Completions:
    """The steps that were read, of those that were logged."""

    steps: Sequence[Step] = ()
    num_logged_steps: int = 0

    @property
    def num_completions(self) -> int:
        """How many there are."""
        return sum(len(group.texts) for step in self.steps for group in step.groups)

    @property
    def num_prompts(self) -> int | None:
        """From how many prompts a typical step sampled; ``None`` if nothing was read."""
        counts = [step.num_groups for step in self.steps]
        return statistics.median_low(counts) if counts else None

    @property
    def num_cut_steps(self) -> int:
        """In how many of the steps groups were left out."""
        return sum(len(step.groups) < step.num_groups for step in self.steps)


def read_completions(folder: Path, *, most: int, notes: list[str]) -> Completions:
    """Return completions of evenly spaced steps: the last one, and from two on the first.

    Args:
        folder: Of the run.
        most: Completions to keep; whole groups, and at least one.
        notes: Gets a sentence on each file that cannot be read.
    """
    paths = sorted(folder.glob(FILES), key=lambda path: (len(path.name), path.name))
    if not paths or most < 1:
        return Completions(num_logged_steps=len(paths))
    size = max(map(_num_rows, paths)) or 1
    chosen = [paths[index] for index in evenly_spaced(len(paths), most=max(most // size, 1))]
    read = (_read_file(path, notes=notes) for path in chosen)
    steps = [as_step(rows, most=most) for rows in read if rows]
    return Completions(steps, len(paths))


def _num_rows(path: Path) -> int:
    """How many completions a file holds; 0 if it cannot be read."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException):
        return 0


def evenly_spaced(length: int, *, most: int) -> list[int]:
    """Return at most ``most`` of the indices below ``length``, the last and the first among them.

    Example:
        >>> evenly_spaced(9, most=3), evenly_spaced(2, most=5), evenly_spaced(4, most=1)
        ([0, 4, 8], [0, 1], [3])
    """
    if length <= most:
        return list(range(length))
    if most == 1:
        return [length - 1]
    return [round(place * (length - 1) / (most - 1)) for place in range(most)]


def as_step(rows: Sequence[Mapping[str, Any]], *, most: int) -> Step:
    """Return rows of TRL's log as groups: neighbours with the same prompt are one.

    Args:
        rows: With ``step``, ``prompt``, ``completion``; numbers in further columns are scores.
        most: Groups beyond so many completions are left out, but for the first.
    """
    further = [name for name in rows[0] if name not in ("step", "prompt", "completion")]
    columns = [name for name in further if _is_score(row[name] for row in rows)]
    extra = [name for name in further if name not in columns]
    groups: list[Group] = []
    num_groups = num_completions = 0
    for _, found in itertools.groupby(rows, key=lambda row: repr(row.get("prompt"))):
        group = list(found)
        num_groups, num_completions = num_groups + 1, num_completions + len(group)
        if groups and num_completions > most:
            continue
        groups.append(
            Group(
                prompt=as_messages(group[0].get("prompt")),
                texts=[as_text(row.get("completion")) for row in group],
                scores=[[_finite(row[name]) for name in columns] for row in group],
                extras=[[_cut(str(row[name])) for name in extra] for row in group],
            )
        )
    step = rows[0].get("step")
    number = step if isinstance(step, int) else 0
    return Step(number, columns, extra, groups, num_groups)


def as_messages(value: Any) -> list[Message]:
    """Return a prompt or a completion as roles and texts; plain text has an empty role.

    Example:
        >>> as_messages([{"role": "user", "content": "1 + 1 ="}]), as_messages("1 + 1 =")
        ([('user', '1 + 1 =')], [('', '1 + 1 =')])
    """
    if not isinstance(value, list):
        return [("", _cut(_content(value)))]
    return [
        (str(message.get("role", "")), _cut(_content(message.get("content"))))
        for message in value
        if isinstance(message, dict)
    ]


def as_text(completion: Any) -> str:
    """Return a completion as text, with the roles where there are several messages."""
    messages = as_messages(completion)
    if len(messages) == 1:
        return messages[0][1]
    return "\n\n".join(f"[{role}]\n{text}" for role, text in messages)


def _content(value: Any) -> str:
    if isinstance(value, list):  # parts of a multimodal message
        return "".join(map(_part, value))
    return "" if value is None else str(value)


def _part(part: Any) -> str:
    if isinstance(part, dict):
        return str(part.get("text") or f"[{part.get('type')}]")
    return str(part)


def _cut(text: str) -> str:
    cut = len(text) - MAX_CHARS
    return text if cut <= 0 else f"{text[:MAX_CHARS]}\n… ({cut} more characters)"


def _is_score(values: Iterable[Any]) -> bool:
    return all(value is None or isinstance(value, int | float) for value in values)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _read_file(path: Path, *, notes: list[str]) -> list[dict[str, Any]]:
    from trl_grpo_ext.rewards.score_rows import read_rows

    try:
        return read_rows(path)
    except ConfigurationError:
        notes.append(f"{path.name} cannot be read, so its step is left out of the completions.")
        return []
