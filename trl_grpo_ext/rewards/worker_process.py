"""A process that does jobs which may hang, crash or eat the memory, and is then ended.

It is a script over pipes, not of ``multiprocessing``, whose ways to start a process either copy
this one, with its threads and CUDA, or run the user's script once more.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Generic, TypeVar, cast

from trl_grpo_ext.errors import RewardError

START_LIMIT_S = 120.0
# All that a Python process needs to start.
FEW_VARIABLES = ("PATH", "LANG", "LC_ALL", "PYTHONHASHSEED", "SYSTEMROOT", "TMPDIR")
_SCRIPT = Path(__file__).with_name("worker_script.py")

Reply = TypeVar("Reply")


class OutOfTimeError(Exception):
    """A job took longer than it may; its process was ended."""


class WorkerDiedError(Exception):
    """A job ended its process, by a crash or for want of memory."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a process is there for.

    Args:
        module: The file with ``prepare`` and ``verdict``: see ``worker_script.py``.
        memory_bytes: Of address space.
        does: For the message if it does not start, such as "compares expressions".
        scores: What it gives scores to, such as "expression".
        package: What it imports, and has to be installed.
        extra: That of this package which installs it.
        variables: The environment variables that it is given, as there may be keys in the others;
            ``None`` for all.
    """

    module: Path
    memory_bytes: int
    does: str
    scores: str
    package: str
    extra: str
    variables: Collection[str] | None = None

    def command(self) -> list[str]:
        """Return what starts the process."""
        return [sys.executable, "-P", str(_SCRIPT), str(self.module), str(self.memory_bytes)]

    def environment(self) -> dict[str, str]:
        """Return the environment of the process, in which it imports what this one can import."""
        names = os.environ.keys() if self.variables is None else self.variables
        kept = {name: os.environ[name] for name in names if name in os.environ}
        return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class WorkerProcess(Generic[Reply]):
    """One process, started when it is first asked, and again after it has ended.

    A process that was forked from the one that asked first starts one of its own. Only one thread
    at a time may ask.

    Args:
        work: What it does.
        command: What to start instead, for tests: it prints ``ready``, and then a line of JSON for
            each that it reads.
    """

    _process: subprocess.Popen[str] | None
    _end: Callable[[], object]

    def __init__(self, work: Work, *, command: Sequence[str] | None = None) -> None:
        self.work, self.command = work, list(command or work.command())
        self._forget()

    def ask(self, *job: str | None, limit_s: float) -> Reply:
        """Return what ``verdict`` of the work's module says about a job.

        Args:
            job: Its arguments; untrusted.
            limit_s: After that time the process is ended; starting it does not count.

        Raises:
            OutOfTimeError: it took longer.
            WorkerDiedError: the process ended, or talked nonsense.
            RewardError: the process does not start.
        """
        if limit_s <= 0:
            raise OutOfTimeError
        process, is_late = self.start(), False
        try:
            line, is_late = _exchange(process, json.dumps([*job, limit_s]), limit_s=limit_s)
            return cast(Reply, json.loads(line))
        except ValueError:
            self.close()
            raise (OutOfTimeError if is_late else WorkerDiedError) from None
        except BaseException:  # such as Ctrl-C: the next one to ask would get this reply
            self.close()
            raise

    def close(self) -> None:
        """End the process, at once; it starts again when it is asked."""
        self._end()
        self._forget()

    def start(self) -> subprocess.Popen[str]:
        """Return the process when it can be asked; that takes a second if it does not yet run."""
        is_ours = self._owner == os.getpid()
        if not is_ours or self._process is None or self._process.poll() is not None:
            self.close()
            process = _started(self.command, self.work.environment())
            self._end = weakref.finalize(self, _end, process, owner=os.getpid())
            if _exchange(process, None, limit_s=START_LIMIT_S)[0] != "ready\n":
                self.close()
                raise RewardError(_does_not_start(self.work, self.command))
            self._process = process
        return self._process

    def __getstate__(self) -> dict[str, Any]:
        return {"work": self.work, "command": self.command}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.work, self.command = state["work"], state["command"]
        self._forget()

    def _forget(self) -> None:
        self._owner, self._process, self._end = os.getpid(), None, _nothing


def _started(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env=environment,
        start_new_session=True,  # Ctrl-C is for the trainer, whose end closes the pipe
    )


def _exchange(
    process: subprocess.Popen[str], request: str | None, *, limit_s: float
) -> tuple[str, bool]:
    """Return the line that the process answers, empty if it ended, and whether it was too late."""
    deadline = time.monotonic() + limit_s
    timer = threading.Timer(limit_s, process.kill)
    timer.daemon = True
    timer.start()
    try:
        if request is not None:
            cast("IO[str]", process.stdin).write(request + "\n")
            cast("IO[str]", process.stdin).flush()
        line = cast("IO[str]", process.stdout).readline()
    except OSError:  # the process is gone
        line = ""
    finally:
        timer.cancel()
    return line if line.endswith("\n") else "", time.monotonic() >= deadline


def _nothing() -> None:
    """Do nothing: there is no process to end."""


def _end(process: subprocess.Popen[str], *, owner: int) -> None:
    """Kill the process; also when its object is collected, and at exit. A fork only lets it go."""
    is_ours = owner == os.getpid()
    if is_ours:
        process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not yet written has no reader
            cast("IO[str]", pipe).close()
    if is_ours:
        process.wait()


def _does_not_start(work: Work, command: Sequence[str]) -> str:
    return (
        f"the process that {work.does} ended or hung at its start within {START_LIMIT_S:.0f} s, "
        f"so no {work.scores} can be scored. Run `{' '.join(command)} < /dev/null` to see why; "
        f"{work.package} comes with pip install 'trl-grpo-ext[{work.extra}]'."
    )
