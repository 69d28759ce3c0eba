"""A filter of system calls: what a program may ask of the kernel."""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

from trl_grpo_ext.rewards.code.inside.kernel import forbid_new_privileges
from trl_grpo_ext.rewards.code.inside.syscalls import HARMLESS, NUMBERS, STARTING

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # of classic BPF
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_AF_UNIX = 1
_CLONE_THREAD = 0x00010000
_CLONE_NEW_ANY = 0x7E020080
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2


def is_known_machine() -> bool:
    """Return whether the filter can be written for this machine."""
    return platform.machine() in NUMBERS


def install(*, may_fork: bool) -> None:
    """Refuse every system call that is not known to be harmless, for good.

    A refused call fails with EPERM, as for a user without the right; one of another architecture's
    table kills. `clone3` says ENOSYS, so that the C library uses `clone`, whose flags can be read.

    Args:
        may_fork: Whether the process may start others, beside threads.

    Raises:
        OSError: The kernel takes no filter.
    """
    code = program(may_fork=may_fork, machine=platform.machine())
    buffer = ctypes.create_string_buffer(code)
    fprog = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    forbid_new_privileges()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.c_char_p(fprog), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def program(*, may_fork: bool, machine: str) -> bytes:
    """Return the filter in the kernel's classic BPF, eight bytes an instruction."""
    numbers = NUMBERS[machine]
    allowed = HARMLESS | STARTING if may_fork else HARMLESS
    code = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, _AUDIT[machine], if_true=1),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
    ]
    for name in sorted(allowed & numbers.keys()):
        code += [_step(_EQUAL, numbers[name], if_false=1), _step(_RETURN, _ALLOW)]
    code += [
        _step(_EQUAL, numbers["clone3"], if_false=1),
        _step(_RETURN, _REFUSE | errno.ENOSYS),
        *_by_argument(numbers["socketpair"], _step(_EQUAL, _AF_UNIX, if_false=1)),
        *_by_argument(numbers["clone"], _clone_condition(may_fork=may_fork)),
        _step(_RETURN, _REFUSE | errno.EPERM),
    ]
    return b"".join(code)


def _clone_condition(*, may_fork: bool) -> bytes:
    if may_fork:
        return _step(_ANY_BIT, _CLONE_NEW_ANY, if_true=1)
    return _step(_ANY_BIT, _CLONE_THREAD, if_false=1)


def _by_argument(number: int, condition: bytes) -> list[bytes]:
    """Return the steps that allow a call if its first argument passes; the condition skips one."""
    return [
        _step(_EQUAL, number, if_false=4),
        _step(_LOAD, _FIRST_ARGUMENT),
        condition,
        _step(_RETURN, _ALLOW),
        _step(_RETURN, _REFUSE | errno.EPERM),
    ]


def _step(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)
