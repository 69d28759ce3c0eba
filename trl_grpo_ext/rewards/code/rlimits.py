"""Processes with limits alone: no isolation, for programs that are trusted."""

from __future__ import annotations

import shutil
import socket
import tempfile

from trl_grpo_ext.rewards.code.jail import Jail, ProcessJail
from trl_grpo_ext.rewards.code.visible import INSIDE, Visible, boot_command


class Rlimits:
    """Starts each program in a process of its own, with limits and a temporary folder.

    The program can read files, reach the network and write wherever this user may.

    Args:
        visible: The Python to run it with.
    """

    name = "rlimits"
    isolates = False

    def __init__(self, visible: Visible) -> None:
        self._visible = visible

    def start(self, *, channel: socket.socket | None = None) -> Jail:
        """Return a fresh process, which has the socket beside its input and output."""
        return ScratchJail(self._visible, channel)

    def close(self) -> None:
        """Do nothing: each process ends with its program."""


class ScratchJail(ProcessJail):
    """A process whose working folder is removed after it."""

    def __init__(self, visible: Visible, channel: socket.socket | None) -> None:
        self._folder = tempfile.mkdtemp(prefix="trl_grpo_ext-code-")
        fd = channel.fileno() if channel else -1
        command = boot_command(
            visible.python,
            folder=str(INSIDE),
            packages=visible.packages,
            call=f"job.work({fd}, scratch={self._folder!r})",
        )
        env = {"HOME": self._folder, "TMPDIR": self._folder, "LANG": "C.UTF-8"}
        super().__init__(command, channel=channel, env=env)

    def kill(self) -> None:
        """End the process and its session, and remove its folder."""
        super().kill()
        shutil.rmtree(self._folder, ignore_errors=True)
