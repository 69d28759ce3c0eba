"""A process that is started once, isolates itself, and forks one isolated process a program.

Each program so gets a fresh process and fresh namespaces (users, mounts, processes) within a tenth
of the time that Python takes to start. The template sees neither programs nor tests: the forked
process reads them itself.

    template -- holder ---- first process of the namespace -- the program
                (waits, tells the exit code; kills when the other end of its leash is closed)
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping

from trl_grpo_ext.rewards.code.inside import candidate, judge, kernel, seccomp
from trl_grpo_ext.rewards.code.inside.job import SCRATCH, work

# Imported once, for all that are forked: what jobs need, and what programs often do.
PRELOADED = (candidate, judge, seccomp)
OFTEN = ("bisect", "copy", "heapq", "itertools", "math", "random", "re", "string", "typing")

STARTED = b"started"

_UNPRIVILEGED = 65534  # the user "nobody"
_NUM_FDS = 3  # requests, output, leash; then perhaps a channel
_MAX_FD = 256


def main(control_fd: int, *, visible: list[str], hidden: list[str], scratch_bytes: int) -> None:
    """Isolate this process, then fork until the other end of the control socket is closed.

    Args:
        control_fd: Takes the file descriptors of each program to start.
        visible: Paths that programs may read.
        hidden: Folders below these that they may not.
        scratch_bytes: Size of the folder, in memory, in which a program may write.
    """
    control = socket.socket(fileno=control_fd)
    for name in OFTEN:
        importlib.import_module(name)
    try:
        proc_fd = _isolate(visible, hidden)
    except OSError as error:
        control.send(str(error).encode())
        return
    control.send(STARTED)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the holders are reaped by the kernel
    while True:
        message, fds, _, _ = socket.recv_fds(control, 1, _NUM_FDS + 1)
        if not message:
            return
        if os.fork() == 0:
            _hold(fds, proc_fd, scratch_bytes)
        for fd in fds:
            os.close(fd)


def _isolate(visible: list[str], hidden: list[str]) -> int:
    """Leave network, files and rights behind; return a descriptor of the old `/proc`."""
    flags = kernel.NEW_MOUNTS | kernel.NEW_NETWORK | kernel.NEW_IPC | kernel.NEW_HOSTNAME
    is_root = _unshare(flags)
    proc_fd = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    _change_files(visible, hidden)
    if is_root:
        os.setgroups([])
        os.setresgid(*[_UNPRIVILEGED] * 3)
        os.setresuid(*[_UNPRIVILEGED] * 3)
        kernel.own_proc_files()
    return proc_fd


def _unshare(flags: int) -> bool:
    """Enter new namespaces, as root where that is allowed; return whether it was."""
    try:
        kernel.unshare(flags)
    except PermissionError:
        _unshare_users(flags, os.open("/proc", os.O_PATH | os.O_DIRECTORY))
        return False
    return True


def _unshare_users(flags: int, proc_fd: int) -> None:
    """Enter new namespaces, of users too, in which this user is the only one."""
    uid, gid = os.geteuid(), os.getegid()
    kernel.unshare(flags | kernel.NEW_USERS)
    for name, content in [
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ]:
        fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc_fd)
        os.write(fd, content.encode())
        os.close(fd)


def _change_files(visible: list[str], hidden: list[str]) -> None:
    """Make a new root that holds what is visible, read-only, and nothing else."""
    sources = {path: os.path.realpath(path) for path in visible}
    kernel.mount("", "/", flags=kernel.MS_RECURSIVE | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", "/tmp", kind="tmpfs", flags=kernel.MS_NOSUID, options="mode=755")
    for folder in ("/tmp/new", "/tmp/old"):
        os.mkdir(folder)
    kernel.change_root("/tmp", "/tmp/old")
    os.chdir("/")
    kernel.mount("/new", "/new", flags=kernel.MS_BIND)
    _show(sources)
    for folder in hidden:
        kernel.mount("tmpfs", f"/new{folder}", kind="tmpfs", options="size=4k,mode=755")
    os.makedirs(f"/new{SCRATCH}", exist_ok=True)
    os.mkdir("/new/old")
    kernel.change_root("/new", "/new/old")
    os.chdir("/")
    kernel.detach("/old")
    os.rmdir("/old")
    kernel.make_read_only("/")


def _show(sources: Mapping[str, str]) -> None:
    for path, source in sources.items():
        target = f"/new{path}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(f"/old{source}"):
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        kernel.mount(f"/old{source}", target, flags=kernel.MS_BIND | kernel.MS_RECURSIVE)


def _hold(fds: list[int], proc_fd: int, scratch_bytes: int) -> None:
    """Start a program in namespaces of its own and wait for it; does not return."""
    requests, output, leash, *channels = fds
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _unshare_users(kernel.NEW_MOUNTS | kernel.NEW_PROCESSES, proc_fd)
    options = f"size={scratch_bytes},nr_inodes=1024,mode=700"
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("tmpfs", SCRATCH, kind="tmpfs", flags=flags, options=options)
    first = os.fork()
    if first == 0:
        kernel.die_with_parent()
        _be_first(requests, output, channels)
    for fd in (requests, output, *channels):
        os.close(fd)
    os.write(leash, bytes([_exit_code(first, leash)]))
    os._exit(0)


def _exit_code(first: int, leash: int) -> int:
    """Wait for the end of the namespace's first process; kill it when the leash is let go."""
    ended = os.pidfd_open(first)
    readable, _, _ = select.select([ended, leash], [], [])
    if ended not in readable:
        os.kill(first, signal.SIGKILL)
    _, status = os.waitpid(first, 0)
    return os.waitstatus_to_exitcode(status) % 256


def _be_first(requests: int, output: int, channels: list[int]) -> None:
    """Fork the program and wait for it; when this process ends, the kernel ends all others."""
    program = os.fork()
    if program == 0:
        _be_program(requests, output, channels)
        sys.exit()
    os.closerange(0, _MAX_FD)
    while True:
        pid, status = os.wait()
        if pid == program:
            os._exit(os.waitstatus_to_exitcode(status) % 256)


def _be_program(requests: int, output: int, channels: list[int]) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    places = [requests, output, null, *channels]
    copies = [os.dup(fd) for fd in places]  # above all places
    for place, fd in enumerate(copies):
        os.dup2(fd, place, inheritable=place <= 2)
    os.closerange(len(places), _MAX_FD)
    work(len(places) - 1 if channels else -1, scratch=SCRATCH)
