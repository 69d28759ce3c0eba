"""Every log of a run as a line of JSON, in a file that holds the run as it stands.

Each line of ``metrics.jsonl`` is strict JSON: ``step``, ``time`` (seconds since 1970, UTC) and the
metrics by name; a NaN or an infinity is null.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from trl_grpo_ext.files import write_atomically

logger = logging.get_logger(__name__)

FILE = "metrics.jsonl"

Entry = Mapping[str, Any]


class MetricsFile:
    """A file that takes one JSON object a log.

    What is logged before a run begins (an evaluation, perhaps with no training to come) goes to the
    end of the file that is there, and into that of the run when it begins.

    What cannot be written (a full disk) waits for the next log, after one warning. A kill leaves
    whole lines, or an unfinished last one, which a resumed run drops.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._history: list[Entry] | None = None
        self._waiting: list[str] = []
        self._num_early = 0  # lines of these that stand in the file of whatever was before the run
        self._begun = self._warned = False

    def begin(self, history: Iterable[Entry]) -> None:
        """Start the file of a run with what it has logged so far: nothing, unless it is resumed.

        The lines of a resumed run keep their times, and those after its checkpoint go. A file of
        another run is kept as ``metrics.1.jsonl``, ``metrics.2.jsonl``, and so on.

        Args:
            history: ``state.log_history`` of the checkpoint; empty for a run from step 0.
        """
        self._begun, self._history = True, list(history)
        waiting = {_identity(json.loads(line)) for line in self._waiting}
        self._history = [e for e in self._history if _identity(_cleaned(e)) not in waiting]
        self._write()

    def append(self, entry: Entry) -> None:
        """Write one log at once, or as soon as there is room."""
        self._waiting.append(_line(_cleaned(entry), round(self._clock(), 3)))
        self._write()

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._begun:
                self._write_early()
                return
            if self._history is not None:
                self._start([_cleaned(entry) for entry in self._history])
                self._history = None
            _append(self.path, "".join(self._waiting))
            self._waiting.clear()
        except OSError as error:
            self._warn(error)

    def _write_early(self) -> None:
        if not self._num_early:
            _drop_half_line(self.path)
        _append(self.path, "".join(self._waiting[self._num_early :]))
        self._num_early = len(self._waiting)

    def _take_back_early(self) -> None:
        """Leave to an earlier run what is of it: the lines of this one move into its own file."""
        early, self._num_early = self._waiting[: self._num_early], 0
        if early and self.path.is_file():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            kept = [line for line in text.splitlines(keepends=True) if line not in early]
            write_atomically(self.path, "".join(kept))

    def _start(self, entries: list[dict[str, Any]]) -> None:
        self._take_back_early()
        found = _read(self.path)
        times = {_identity(entry): entry.get("time") for entry in found}
        if found and not any(_identity(entry) in times for entry in entries):
            self._put_aside()
        rows = (_line(entry, times.get(_identity(entry))) for entry in entries)
        write_atomically(self.path, "".join(rows))

    def _put_aside(self) -> None:
        number = 1
        while (aside := self.path.with_suffix(f".{number}.jsonl")).exists():
            number += 1
        self.path.rename(aside)
        logger.info(f"{self.path.name} of an earlier run is kept as {aside.name}")

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            logger.warning(
                f"{self.path} cannot be written ({error.strerror or error}), so the metrics of "
                "this run are in the printed log and in the checkpoints only. Training goes on. "
                "Make room or correct the rights, and the next log writes what is missing; or set "
                "`log_jsonl: false`."
            )
        self._warned = True


class MetricsFileCallback(TrainerCallback):
    """Writes every log of a trainer to ``output_dir/metrics.jsonl``, on the main process."""

    def __init__(self, output_dir: str | Path) -> None:
        self.file = MetricsFile(Path(output_dir) / FILE)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file, or go on with that of the resumed run."""
        if state.is_world_process_zero:
            self.file.begin(state.log_history)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the log."""
        if state.is_world_process_zero and state.log_history:
            self.file.append(state.log_history[-1])


def _line(entry: Entry, when: object) -> str:
    """``step`` and ``time`` first."""
    rest = {key: value for key, value in entry.items() if key not in ("step", "time")}
    row = {"step": entry.get("step"), "time": when, **rest}
    return json.dumps(row, allow_nan=False, default=str) + "\n"


def _cleaned(entry: Entry) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in entry.items()
    }


def _identity(entry: Entry) -> str:
    """What two copies of a log have in common: all but the time of writing."""
    rest = {key: value for key, value in entry.items() if key != "time"}
    return json.dumps(rest, sort_keys=True, default=str)


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none if there is no file, and without what is not a line of ours."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def _drop_half_line(path: Path) -> None:
    """Cut off what a kill left of a line."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _append(path: Path, text: str) -> None:
    """Add lines to the end of a file: all of them, or none."""
    data = text.encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise
