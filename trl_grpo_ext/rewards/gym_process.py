"""The process that scores answers of reasoning-gym's tasks, and is ended when it takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

from trl_grpo_ext.errors import RewardError

MEMORY_BYTES = 4 * 2**30
START_LIMIT_S = 120.0
# What a Python process needs to start; nothing else of the environment, as there are keys in it.
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "PYTHONHASHSEED", "SYSTEMROOT", "TMPDIR")
_SCRIPT = Path(__file__).with_name("gym_scorer.py")

Verdict = float | Literal["refused", "broken", "late", "died"]


class GymProcess:
    """One process, started when it is first asked, and again after it has ended.

    A process that was forked from the one that asked first starts one of its own.

    Args:
        command: What to start instead of the script, for tests.
    """

    def __init__(self, command: Sequence[str] | None = None) -> None:
        self.command = list(command or [sys.executable, "-P", str(_SCRIPT), str(MEMORY_BYTES)])
        self._forget()

    def ask(self, row: str, answer: str | None, *, limit_s: float) -> Verdict:
        """Return the score of an answer, or why there is none.

        Args:
            row: What the data set holds for the scorer.
            answer: Untrusted; ``None`` for the row's own.
            limit_s: After that time the process is ended; starting it does not count.

        Returns:
            The score; ``"refused"`` if the scorer fails on this answer, but not on the row's own;
            ``"broken"`` if it fails on both; ``"late"`` or ``"died"`` if the process was ended.

        Raises:
            RewardError: the process does not start.
        """
        process = self._started()
        reply, is_late = _exchange(process, json.dumps([row, answer, limit_s]), limit_s=limit_s)
        if reply.endswith("\n"):
            return cast(Verdict, json.loads(reply))
        self.close()
        return "late" if is_late else "died"

    def close(self) -> None:
        """End the process, at once; it starts again when it is asked."""
        if self._owner == os.getpid():
            self._end()
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"command": self.command}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.command = state["command"]
        self._forget()

    def _forget(self) -> None:
        self._owner = os.getpid()
        self._process: subprocess.Popen[str] | None = None
        self._end: Callable[[], object] = _nothing

    def _started(self) -> subprocess.Popen[str]:
        if self._owner != os.getpid():
            self._forget()
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = _start(self.command)
            self._end = weakref.finalize(self, _end, self._process)
            reply, _ = _exchange(self._process, None, limit_s=START_LIMIT_S)
            if reply != "ready\n":
                self.close()
                raise RewardError(_does_not_start(self.command))
        return self._process


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env={**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
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
        return cast("IO[str]", process.stdout).readline(), time.monotonic() >= deadline
    except OSError:  # the process is gone
        return "", time.monotonic() >= deadline
    finally:
        timer.cancel()


def _nothing() -> None:
    """Do nothing: there is no process to end."""


def _end(process: subprocess.Popen[str]) -> None:
    """Kill the process; also when its object is collected, and at exit.

    In a fork that does nothing, as ``Popen`` ends children of its own process only.
    """
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not yet written has no reader
            cast("IO[str]", pipe).close()
    process.wait()


def _does_not_start(command: Sequence[str]) -> str:
    return (
        f"the process that scores answers of reasoning-gym ended or hung at its start within "
        f"{START_LIMIT_S:.0f} s, so no answer can be scored. Run "
        f"`{' '.join(command)} < /dev/null` to see why; reasoning-gym comes with "
        "pip install 'trl-grpo-ext[quickstart]'."
    )
