"""The few calls of the Linux kernel that Python does not offer."""

from __future__ import annotations

import ctypes
import os
import platform

from trl_grpo_ext.rewards.code.inside.syscalls import NUMBERS

NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
NEW_HOSTNAME = 0x04000000  # CLONE_NEWUTS
NEW_IPC = 0x08000000
NEW_USERS = 0x10000000
NEW_PROCESSES = 0x20000000  # CLONE_NEWPID
NEW_NETWORK = 0x40000000

MS_NOSUID, MS_NODEV = 2, 4
MS_BIND, MS_RECURSIVE, MS_PRIVATE = 4096, 16384, 1 << 18

_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Put this process into new namespaces; with `NEW_PROCESSES`, its next child."""
    _checked(_libc.unshare(flags))


def mount(source: str, target: str, *, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mount a file system, or bind a path to another one."""
    arguments = source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags)
    _checked(_libc.mount(*arguments, options.encode()), target)


def make_read_only(target: str) -> None:
    """Refuse writes through a mount and all below it."""
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    arguments = _AT_FDCWD, target.encode(), _AT_RECURSIVE, ctypes.byref(attributes), size
    _checked(_libc.syscall(_number("mount_setattr"), *arguments), target)


def change_root(new_root: str, old_root: str) -> None:
    """Make a mounted folder the root; what was the root is seen below `old_root`."""
    _checked(_libc.syscall(_number("pivot_root"), new_root.encode(), old_root.encode()), new_root)


def detach(target: str) -> None:
    """Take a mount out of sight."""
    _checked(_libc.umount2(target.encode(), _MNT_DETACH), target)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that forked it ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0))


def own_proc_files() -> None:
    """Give this process its files in `/proc` back, which a change of user takes away."""
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0))


def forbid_new_privileges() -> None:
    """No program that this process starts gains rights; a system call filter needs that."""
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def drop_capabilities() -> None:
    """Give up every right that goes beyond those of an ordinary user."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())))


def _number(call: str) -> int:
    return NUMBERS[platform.machine()][call]


def _checked(result: int, subject: str = "") -> None:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), *([subject] if subject else []))
