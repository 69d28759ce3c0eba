"""Isolated processes by bubblewrap, the sandbox of Flatpak."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from trl_grpo_ext.rewards.code.inside.job import SCRATCH
from trl_grpo_ext.rewards.code.jail import Jail, ProcessJail, SandboxError
from trl_grpo_ext.rewards.code.visible import ENVIRONMENT, INSIDE, Visible, boot_command

_INSIDE = "/inside"

# Of no user, by systemd's table of user numbers (UIDS-GIDS.md): one for each program at a time,
# since the kernel counts processes by user.
_free_users = itertools.cycle(range(1_879_048_192 + os.getpid(), 2_100_000_000))


class Bubblewrap:
    """Starts each program in a bubblewrap of its own, with Python in it.

    Bubblewrap makes the namespaces; limits and the filter of system calls come from inside.

    Args:
        visible: What the program may read.
        scratch_bytes: Size of the folder, in memory, in which it may write.

    Raises:
        SandboxError: Bubblewrap is not installed.
    """

    name = "bubblewrap"
    isolates = True

    def __init__(self, visible: Visible, *, scratch_bytes: int) -> None:
        program = shutil.which("bwrap")
        if program is None:
            raise SandboxError("bwrap is not installed")
        self._visible = visible
        self._command = [program, *_namespaces(), *_files(visible, scratch_bytes), "--"]

    def start(self, *, channel: socket.socket | None = None) -> Jail:
        """Return a fresh process, which has the socket beside its input and output."""
        fd = channel.fileno() if channel else -1
        boot = boot_command(
            self._visible.python,
            folder=_INSIDE,
            packages=self._visible.packages,
            call=f"job.work({fd}, scratch={SCRATCH!r})",
        )
        jail = ProcessJail(self._command + boot, channel=channel, env=ENVIRONMENT)
        if os.geteuid() == 0:
            jail.uid = next(_free_users)
        return jail

    def close(self) -> None:
        """Do nothing: each bubblewrap ends with its program."""


def _namespaces() -> Iterator[str]:
    yield from ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts")
    yield from ("--unshare-cgroup-try", "--die-with-parent")
    if os.geteuid() == 0:  # it becomes another user inside
        for capability in ("CAP_SETUID", "CAP_SETGID"):
            yield from ("--cap-add", capability)
    else:
        yield "--unshare-user"


def _files(visible: Visible, scratch_bytes: int) -> Iterator[str]:
    for folder in _parents(visible.paths) if os.geteuid() == 0 else ():
        yield from ("--perms", "0755", "--dir", folder)  # else only root may pass
    for path in visible.paths:
        bind = "--dev-bind" if path.startswith("/dev/") else "--ro-bind"
        yield from (bind, path, path)
    yield from ("--ro-bind", str(INSIDE), _INSIDE)
    for folder in visible.hidden:
        yield from ("--tmpfs", folder, "--remount-ro", folder)
    yield from ("--size", str(scratch_bytes), "--tmpfs", SCRATCH, "--remount-ro", "/")
    yield from ("--chdir", SCRATCH)


def _parents(paths: Iterable[str]) -> list[str]:
    """Return the folders above the paths, outer ones first."""
    return sorted({str(parent) for path in paths for parent in Path(path).parents} - {"/"})
