"""An isolated Python process that waits for its job, and the conversation with it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self

from trl_grpo_ext.rewards.code.inside.job import READY

_START_LIMIT_S = 60.0  # on a machine that is busy; it takes some hundredths
_POLL_S = 0.1
_CHUNK_BYTES = 1 << 16

End = Literal["exit", "time", "output"]


class SandboxError(RuntimeError):
    """The sandbox failed, so that nothing can be said of the program."""


class Jail:
    """One isolated process; used once, in a `with` block, at whose end nothing of it is left.

    Attributes:
        requests: Where the job goes to, and then what the program reads.
        output: What it prints, to be read without blocking.
        uid: The user that it has to become inside; ``None`` if it is an ordinary one.
    """

    uid: int | None = None

    def __init__(self, requests: socket.socket, output: int) -> None:
        self.requests, self.output = requests, output
        requests.setblocking(False)
        os.set_blocking(output, False)

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit code, not 0 if it was killed; ``None`` if it still runs."""
        raise NotImplementedError

    def kill(self) -> None:
        """End the process and all that it started, and wait until they are gone."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.kill()
        self.requests.close()
        os.close(self.output)


class Sandbox(Protocol):
    """A way to start isolated processes; any thread may use it.

    Attributes:
        name: The level, as in the option `sandbox`.
        isolates: Whether programs are kept from network and files.
    """

    name: str
    isolates: bool

    def start(self, *, channel: socket.socket | None = None) -> Jail:
        """Return a fresh process, which has the socket beside its input and output.

        Raises:
            SandboxError: It could not be started.
        """
        ...

    def close(self) -> None:
        """Let go of what was kept for quick starts; a later start takes it again."""
        ...


class ProcessJail(Jail):
    """A process that is a child of this one.

    Args:
        command: What to start; it leads its own session.
        channel: Passed on to it.
        env: All of its environment variables.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        channel: socket.socket | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        ours, theirs = socket.socketpair()
        read_fd, write_fd = os.pipe()
        super().__init__(ours, read_fd)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=write_fd,
                stderr=subprocess.DEVNULL,
                pass_fds=[channel.fileno()] if channel else [],
                env=env or {},
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            os.close(read_fd)
            raise SandboxError(f"{command[0]} could not be started: {error}") from error
        finally:
            theirs.close()
            os.close(write_fd)

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit code, not 0 if it was killed; ``None`` if it still runs."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End the process and its session, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Heard:
    """What came back from a process.

    Args:
        output: What it wrote.
        end: Whether it ended by itself, ran out of time, or wrote too much.
        exit_code: 0 only if it ended by itself, without an error.
    """

    output: bytes
    end: End
    exit_code: int


class Talk:
    """The conversation with one process.

    Args:
        jail: A fresh process.
        message: The frame of the job, then all that the program may read.
        max_output_bytes: Of what it may write; more ends the conversation.
    """

    def __init__(self, jail: Jail, message: bytes, *, max_output_bytes: int) -> None:
        self._jail = jail
        self._unsent = memoryview(message)
        self._heard = bytearray()
        self._most = max_output_bytes + len(READY)
        self._is_open = True

    def start(self) -> Self:
        """Return when the limits hold in the process.

        Raises:
            SandboxError: It did not come so far.
        """
        deadline = time.monotonic() + _START_LIMIT_S
        while self._is_open and not self._heard and time.monotonic() < deadline:
            self._step(deadline)
        if not self._heard.startswith(READY):
            raise SandboxError("an isolated process did not start")
        return self

    def finish(self, time_limit_s: float) -> Heard:
        """Return what the process writes until it ends, or is to be ended."""
        deadline = time.monotonic() + time_limit_s
        while self._is_open and len(self._heard) <= self._most and time.monotonic() < deadline:
            self._step(deadline)
        if len(self._heard) > self._most:
            return self._result("output", -1)
        code = self._jail.wait(max(0.0, deadline - time.monotonic()))
        return self._result("time", -1) if code is None else self._result("exit", code)

    def _result(self, end: End, exit_code: int) -> Heard:
        return Heard(bytes(self._heard[len(READY) :]), end, exit_code)

    def _step(self, deadline: float) -> None:
        """Send or read some of it; without news, see whether the process ended."""
        timeout = min(_POLL_S, max(0.0, deadline - time.monotonic()))
        writing = [self._jail.requests] if self._unsent else []
        readable, writable, _ = select.select([self._jail.output], writing, [], timeout)
        if writable:
            self._send()
        if readable:
            self._read()
        if not readable and not writable and self._jail.wait(0) is not None:
            self._is_open = False  # although some process may still hold its output

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[self._jail.requests.send(self._unsent) :]
        except OSError:  # it reads no more
            self._unsent = self._unsent[:0]
        if not self._unsent:
            with contextlib.suppress(OSError):
                self._jail.requests.shutdown(socket.SHUT_WR)

    def _read(self) -> None:
        part = os.read(self._jail.output, _CHUNK_BYTES)
        self._heard += part
        self._is_open = bool(part)
