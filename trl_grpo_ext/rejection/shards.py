"""Candidates on disk: JSON lines, one prompt a line, one file a process, whole after any kill.

Each batch is one write, flushed to the disk. What a kill cuts off is the last line of a file; it
has no line break yet, is not read, and is removed before the file is written to again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from trl_grpo_ext.errors import CheckpointError, ConfigurationError
from trl_grpo_ext.rejection.candidates import Group

MADE_WITH = "made_with.json"
_SHOWN_CHARACTERS = 60


class ShardWriter:
    """Appends prompts with their candidates to one file, alone.

    Args:
        path: Of the file; made with its folder if missing. A half-written last line is removed.

    Raises:
        CheckpointError: Another run writes to it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_suffix(".lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise CheckpointError(
                f"{path} is being written by another run, so both would sample the same. Wait for "
                "it, or give this one another `output_dir`."
            ) from error
        remove_half_line(path)
        self._file = path.open("ab")

    def append(self, groups: Sequence[Group]) -> None:
        """Write prompts so that they survive whatever comes."""
        self._file.write(b"".join(_line(group) for group in groups))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._lock.release()


def remove_half_line(path: Path) -> None:
    """Cut a file off behind its last line break; a missing file stays missing."""
    if not path.exists():
        return
    whole = 0
    with path.open("rb") as file:
        for line in file:
            whole += len(line) if line.endswith(b"\n") else 0
    if whole < path.stat().st_size:
        os.truncate(path, whole)


def located_prompts(folder: Path) -> dict[int, tuple[Path, int, str]]:
    """Return where each prompt stands that is on disk: file, offset in bytes, and prompt id.

    A prompt that is there twice (two runs had the same work) counts where it comes first.

    Raises:
        CheckpointError: A whole line is not what was written.
    """
    found: dict[int, tuple[Path, int, str]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for offset, group in _groups(path):
            found.setdefault(group.prompt_index, (path, offset, group.prompt_id))
    return found


def read_group(path: Path, offset: int) -> Group:
    """Return the prompt and its candidates at a place that :func:`located_prompts` gave."""
    with path.open("rb") as file:
        file.seek(offset)
        return Group.from_json(json.loads(file.readline()))


def read_made_with(folder: Path) -> dict[str, Any]:
    """Return the settings that made the candidates of a folder; none if there are none."""
    path = folder / MADE_WITH
    if not path.exists():
        return {}
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


def check_made_with(
    folder: Path, settings: Mapping[str, Any], *, unknown: Collection[str] = ()
) -> None:
    """Refuse candidates that other settings made, which would be mixed with new ones.

    Args:
        folder: With the candidates; may be missing.
        settings: From :func:`~trl_grpo_ext.rejection.provenance.made_with`.
        unknown: Names of settings that cannot be told yet.

    Raises:
        ConfigurationError: They were sampled by another model, at another temperature, ...
    """
    before, wanted = read_made_with(folder), _as_stored(settings)
    known = [key for key in {**before, **wanted} if key not in unknown]
    changed = [key for key in known if before.get(key) != wanted.get(key)]
    if before and changed:
        told = "; ".join(f"{k}: {_shown(before, k)}, now {_shown(wanted, k)}" for k in changed)
        raise ConfigurationError(
            [
                f"the candidates in {folder} were made with other settings ({told}), so the "
                "dataset would be a mixture. Set them back, name another `output_dir`, or remove "
                "that folder to sample anew."
            ]
        )


def write_made_with(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write down with which settings the candidates of a folder are made, unless it is there."""
    path = folder / MADE_WITH
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_as_stored(settings), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _line(group: Group) -> bytes:
    return json.dumps(group.to_json(), allow_nan=False).encode() + b"\n"


def _groups(path: Path) -> Iterator[tuple[int, Group]]:
    """Yield the offset of each whole line, and what it holds."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield offset, _group(path, offset, line)
            offset += len(line)


def _group(path: Path, offset: int, line: bytes) -> Group:
    try:
        group = Group.from_json(json.loads(line))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} has a line at byte {offset} that is not what was written, so its prompts are "
            "lost. Remove the file; what it held is sampled again."
        ) from error
    return group


def _as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(json.dumps(settings, sort_keys=True, default=str))
    return stored


def _shown(settings: Mapping[str, Any], key: str) -> str:
    text = json.dumps(settings.get(key))
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
