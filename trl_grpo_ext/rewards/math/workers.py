"""Processes that compare expressions and are ended when they take too long.

They are started as scripts over pipes, not through ``multiprocessing``, whose ways to start a
process either copy this one, with its threads and CUDA, or run the user's script once more.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from trl_grpo_ext.errors import RewardError

MEMORY_BYTES = 2 * 2**30
START_LIMIT_S = 120.0
_SCRIPT = Path(__file__).with_name("worker.py")

Job = TypeVar("Job")
Result = TypeVar("Result")


class OutOfTimeError(Exception):
    """A comparison took longer than it may; its process was ended."""


class WorkerDiedError(Exception):
    """A comparison ended its process, by a crash or for want of memory."""


class Worker:
    """One process, started when it is first asked, and again after it has ended.

    Args:
        command: What to start instead of the worker script, for tests.
    """

    def __init__(self, command: Sequence[str] | None = None) -> None:
        self.command = list(command or [sys.executable, "-P", str(_SCRIPT), str(MEMORY_BYTES)])
        self._process: subprocess.Popen[str] | None = None
        self._end: Callable[[], object] = _nothing

    def ask(self, gold: str, answer: str, *, limit_s: float) -> bool | None:
        """Return whether two expressions are equal, ``None`` if one cannot be parsed.

        Raises:
            OutOfTimeError: it took longer than ``limit_s``.
            WorkerDiedError: the process ended.
            RewardError: the process does not start.
        """
        if limit_s <= 0:
            raise OutOfTimeError
        process = self.start()
        reply, is_late = _exchange(process, json.dumps([gold, answer, limit_s]), limit_s=limit_s)
        if reply in ("true\n", "false\n", "null\n"):
            return {"true\n": True, "false\n": False}.get(reply)
        self.close()
        raise OutOfTimeError if is_late else WorkerDiedError

    def close(self) -> None:
        """End the process, at once."""
        self._end()
        self._process, self._end = None, _nothing

    def start(self) -> subprocess.Popen[str]:
        """Return the process when it can be asked; that takes a second if it does not yet run."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = _start(self.command)
            self._end = weakref.finalize(self, _end, self._process)
            reply, _ = _exchange(self._process, None, limit_s=START_LIMIT_S)
            if reply != "ready\n":
                self.close()
                raise RewardError(_does_not_start(self.command))
        return self._process


class WorkerPool:
    """Workers that share the comparisons of a batch.

    A process that was forked from the one in which the pool was made gets workers of its own.

    Args:
        num_workers: How many processes there are at most.
        command: As for :class:`Worker`.
    """

    def __init__(self, num_workers: int, *, command: Sequence[str] | None = None) -> None:
        self.num_workers = num_workers
        self._command = command
        self._owner = 0
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def map(self, run: Callable[[Worker, Job], Result], jobs: Sequence[Job]) -> list[Result]:
        """Return ``run(worker, job)`` for each job, in their order."""
        if not jobs:
            return []
        self._own()

        def with_worker(job: Job) -> Result:
            worker = self._idle.get()
            try:
                return run(worker, job)
            finally:
                self._idle.put(worker)

        with ThreadPoolExecutor(min(self.num_workers, len(jobs))) as threads:
            return list(threads.map(with_worker, jobs))

    def close(self) -> None:
        """End all processes; they start again when there is something to do."""
        for worker in self._workers() if self._owner == os.getpid() else []:
            worker.close()
            self._idle.put(worker)

    def __getstate__(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "command": self._command}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["num_workers"], command=state["command"])  # type: ignore[misc]

    def _own(self) -> None:
        if self._owner != os.getpid():
            self._owner, self._idle = os.getpid(), queue.SimpleQueue()
            for _ in range(self.num_workers):
                self._idle.put(Worker(self._command))

    def _workers(self) -> list[Worker]:
        return [self._idle.get() for _ in range(self.num_workers)]


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,  # Ctrl-C is for the trainer, whose end closes the pipe
    )


def _exchange(
    process: subprocess.Popen[str], request: str | None, *, limit_s: float
) -> tuple[str, bool]:
    """Return the line that the process answers, empty if it ended, and whether it was too late."""
    assert process.stdin is not None
    assert process.stdout is not None
    deadline = time.monotonic() + limit_s
    timer = threading.Timer(limit_s, process.kill)
    timer.daemon = True
    timer.start()
    try:
        if request is not None:
            process.stdin.write(request + "\n")
            process.stdin.flush()
        return process.stdout.readline(), time.monotonic() >= deadline
    except OSError:  # the process is gone
        return "", time.monotonic() >= deadline
    finally:
        timer.cancel()


def _nothing() -> None:
    """Do nothing: there is no process to end."""


def _end(process: subprocess.Popen[str]) -> None:
    """Kill the process; also when its worker is collected, and at exit.

    In a fork that does nothing, as ``Popen`` ends children of its own process only.
    """
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not yet written has no reader
            cast("IO[str]", pipe).close()
    process.wait()


def _does_not_start(command: Sequence[str]) -> str:
    return (
        f"the process that compares expressions ended or hung at its start within "
        f"{START_LIMIT_S:.0f} s, so no expression can be scored. Run "
        f"`{' '.join(command)} < /dev/null` to see why; math-verify comes with "
        "pip install 'trl-grpo-ext[math]'."
    )
