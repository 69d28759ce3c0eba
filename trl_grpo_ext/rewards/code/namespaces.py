"""Isolated processes by the kernel's namespaces alone, forked from a warm template."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from trl_grpo_ext.rewards.code.inside import seccomp
from trl_grpo_ext.rewards.code.inside.template import STARTED
from trl_grpo_ext.rewards.code.jail import Jail, SandboxError
from trl_grpo_ext.rewards.code.visible import ENVIRONMENT, INSIDE, Visible, boot_command

_START_LIMIT_S = 60.0


class LeashedJail(Jail):
    """A process that another one holds for us, as long as we do not let go of the leash.

    Args:
        requests: Where the job goes to.
        output: What it prints.
        leash: Says the exit code; when it is shut, the process and all that it started are killed.
    """

    def __init__(self, requests: socket.socket, output: int, leash: socket.socket) -> None:
        super().__init__(requests, output)
        self._leash = leash
        self._exit_code: int | None = None

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit code, not 0 if it was killed; ``None`` if it still runs."""
        if self._exit_code is None and select.select([self._leash], [], [], timeout_s)[0]:
            told = self._leash.recv(1)
            self._exit_code = told[0] if told else -signal.SIGKILL
        return self._exit_code

    def kill(self) -> None:
        """End the process and all that it started, and wait until they are gone."""
        with contextlib.suppress(OSError):
            self._leash.shutdown(socket.SHUT_WR)
        while self._leash.recv(1):
            pass
        self._leash.close()


class Namespaces:
    """Forks each program from one template, into fresh namespaces.

    Args:
        visible: What programs may read.
        scratch_bytes: Size of the folder, in memory, in which one may write.

    Raises:
        SandboxError: There is no filter of system calls for this machine.
    """

    name = "namespaces"
    isolates = True

    def __init__(self, visible: Visible, *, scratch_bytes: int) -> None:
        if not seccomp.is_known_machine():
            raise SandboxError("there is no filter of system calls for this machine")
        self._command = partial(_command, visible, scratch_bytes)
        self._lock = threading.Lock()
        self._template: Template | None = None

    def start(self, *, channel: socket.socket | None = None) -> Jail:
        """Return a fresh process, which has the socket beside its input and output.

        Raises:
            SandboxError: The template could not isolate itself, or ended.
        """
        with self._lock:
            if self._template is None or not self._template.is_ours():
                self._template = Template(self._command)
            return self._template.fork(channel)

    def close(self) -> None:
        """End the template; a later start makes another one."""
        with self._lock:
            if self._template is not None and self._template.is_ours():
                self._template.close()
            self._template = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy in another process needs: not the template."""
        return {**vars(self), "_lock": None, "_template": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())


class Template:
    """The process that is forked; it ends with this object, or with this process.

    Raises:
        SandboxError: It could not isolate itself.
    """

    def __init__(self, command: Callable[[int], list[str]]) -> None:
        self._control, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            command(theirs.fileno()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=ENVIRONMENT,
            start_new_session=True,
        )
        theirs.close()
        self._pid = os.getpid()
        self.close = weakref.finalize(self, _end, self._control, self._process, self._pid)
        self._control.settimeout(_START_LIMIT_S)
        answer = self._received()
        if answer != STARTED:
            self.close()
            reason = answer.decode(errors="replace") or "it ended at once"
            raise SandboxError(f"the template could not isolate itself ({reason})")

    def is_ours(self) -> bool:
        """Return whether this process started it and it still runs."""
        return self._pid == os.getpid() and self._process.poll() is None

    def fork(self, channel: socket.socket | None) -> LeashedJail:
        """Return a fresh process."""
        requests, their_requests = socket.socketpair()
        leash, their_leash = socket.socketpair()
        read_fd, write_fd = os.pipe()
        theirs = [their_requests.fileno(), write_fd, their_leash.fileno()]
        theirs += [channel.fileno()] if channel else []
        jail = LeashedJail(requests, read_fd, leash)
        try:
            socket.send_fds(self._control, [b"f"], theirs)
        except OSError as error:
            their_leash.close()
            with jail:  # closes it
                pass
            raise SandboxError(f"the template ended ({error})") from error
        finally:
            their_requests.close()
            their_leash.close()
            os.close(write_fd)
        return jail

    def _received(self) -> bytes:
        try:
            return self._control.recv(1000)
        except TimeoutError:
            return b"no answer"


def _end(control: socket.socket, process: subprocess.Popen[bytes], pid: int) -> None:
    control.close()
    if pid == os.getpid():
        process.kill()
        process.wait()


def _command(visible: Visible, scratch_bytes: int, control_fd: int) -> list[str]:
    options = (
        f"visible={list(visible.paths)!r}, hidden={list(visible.hidden)!r}, "
        f"scratch_bytes={scratch_bytes}"
    )
    return boot_command(
        visible.python,
        folder=str(INSIDE),
        packages=visible.packages,
        call=f"template.main({control_fd}, {options})",
    )
