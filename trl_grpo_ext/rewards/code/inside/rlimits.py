"""The limits that the kernel holds for one process, and the user that it is."""

from __future__ import annotations

import math
import os
import platform
import resource

MAX_THREADS = 32
MAX_OPEN_FILES = 64


def set_limits(
    *,
    cpu_s: float,
    memory_bytes: int,
    file_bytes: int,
    max_processes: int,
    is_isolated: bool,
) -> None:
    """Limit this process and those that it starts, for good.

    Args:
        cpu_s: Processor seconds, after which the kernel kills.
        memory_bytes: Address space of each process.
        file_bytes: Of each file.
        max_processes: Beside the :data:`MAX_THREADS` threads.
        is_isolated: Whether this user is the program's alone, so that the kernel, which counts the
            processes of a user, counts no others.
    """
    seconds = math.ceil(cpu_s)
    _lower(resource.RLIMIT_CPU, seconds)
    _lower(resource.RLIMIT_AS, memory_bytes)
    _lower(resource.RLIMIT_FSIZE, file_bytes)
    _lower(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    _lower(resource.RLIMIT_CORE, 0)
    if hasattr(resource, "RLIMIT_MEMLOCK"):
        _lower(resource.RLIMIT_MEMLOCK, 0)
    if is_isolated and counts_in_namespace():
        _lower(resource.RLIMIT_NPROC, max_processes + MAX_THREADS)


def counts_in_namespace() -> bool:
    """Return whether the kernel counts the processes of a user namespace apart.

    Example:
        >>> isinstance(counts_in_namespace(), bool)
        True
    """
    if platform.system() != "Linux":
        return False
    major, minor = platform.release().split(".")[:2]
    return (int(major), int("".join(filter(str.isdigit, minor)))) >= (5, 14)


def leave_root(uid: int) -> None:
    """Become an unprivileged user, if this is root."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    capped = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (capped, capped))
