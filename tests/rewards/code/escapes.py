"""What a program could try against its sandbox: each prints ``ESCAPED`` if it gets somewhere.

The programs are formatted with the addresses of things that must stay out of reach: ``canary`` (a
file with a secret), ``repository``, ``outside`` (a writable folder), ``victim`` (a process),
``port`` (a server on this machine), ``socket`` (a Unix socket), and ``trainer`` (the process of the
tests).
"""

from __future__ import annotations

from dataclasses import dataclass

ALL = ("namespaces", "bubblewrap", "rlimits")
FULL = ("namespaces", "bubblewrap")


@dataclass(frozen=True)
class Escape:
    """An attempt, and the levels that stop it.

    Args:
        name: As in the table of docs/code_reward.md.
        program: Prints ``ESCAPED``, or what it should not know.
        stopped_by: Levels.
        is_harmless: Whether it can be tried where nothing stops it.
        max_processes: That the program may have.
    """

    name: str
    program: str
    stopped_by: tuple[str, ...] = FULL
    is_harmless: bool = False
    max_processes: int = 1


ESCAPES = [
    Escape(
        "fork bomb, no process allowed",
        """
import os
os.fork()
print("ESCAPED")
""",
    ),
    Escape(
        "fork bomb, four processes allowed",
        """
import os, time
alive = 0
try:
    for _ in range(500):
        if os.fork() == 0:
            time.sleep(60)
        alive += 1
except OSError:
    pass
if alive > 40:
    print("ESCAPED", flush=True)
""",
        max_processes=4,
    ),
    Escape(
        "threads without end",
        """
import threading, time
try:
    for alive in range(500):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    print("ESCAPED", flush=True)
except RuntimeError:
    pass
""",
    ),
    Escape(
        "memory",
        """
try:
    data = bytearray(2 << 30)
    print("ESCAPED")
except MemoryError:
    pass
""",
        stopped_by=ALL,
    ),
    Escape(
        "memory outside the address space",
        """
import os
held = []
try:
    for _ in range(40):
        fd = os.memfd_create("x")
        for _ in range(4):
            os.write(fd, bytes(1 << 22))
        held.append(fd)
    print("ESCAPED")
except OSError:
    pass
""",
    ),
    Escape(
        "filling the disk",
        """
written = 0
try:
    for number in range(64):
        with open(f"file{{number}}", "wb") as file:
            written += file.write(bytes(1 << 20))
except OSError:
    pass
if written > 20 << 20:
    print("ESCAPED")
""",
        is_harmless=True,
    ),
    Escape(
        "endless output",
        """
while True:
    print("x" * 10_000)
""",
        stopped_by=ALL,
    ),
    Escape(
        "running on, deaf to signals",
        """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
""",
        stopped_by=ALL,
    ),
    Escape(
        "internet socket",
        """
import socket
socket.create_connection(("127.0.0.1", {port}), timeout=2)
print("ESCAPED")
""",
        is_harmless=True,
    ),
    Escape(
        "Unix socket, by path",
        """
import socket
socket.socket(socket.AF_UNIX).connect({socket!r})
print("ESCAPED")
""",
        is_harmless=True,
    ),
    Escape(
        "Unix socket, abstract",
        """
import socket
socket.socket(socket.AF_UNIX).connect(chr(0) + {socket!r})
print("ESCAPED")
""",
        is_harmless=True,
    ),
    Escape(
        "netlink, packet and raw sockets",
        """
import socket
for family, kind in [(16, 3), (17, 3), (2, 3), (40, 1)]:
    try:
        socket.socket(family, kind)
        print("ESCAPED")
    except OSError:
        pass
""",
        is_harmless=True,
    ),
    Escape(
        "the trainer's environment",
        """
import os
for process in ["self", str(os.getppid()), "{trainer}", "{victim}", "1"]:
    try:
        print(open(f"/proc/{{process}}/environ").read())
    except OSError:
        pass
print(os.environ)
""",
        is_harmless=True,
    ),
    Escape(
        "the trainer's memory",
        """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for pid in (os.getppid(), 1, {victim}):
    if libc.ptrace(16, pid, 0, 0) == 0:  # PTRACE_ATTACH
        print("ESCAPED")
    here, there = (ctypes.c_size_t * 2)(ctypes.addressof(libc), 8), (ctypes.c_size_t * 2)(4096, 8)
    libc.process_vm_readv(pid, here, 1, there, 1, 0)
    if ctypes.get_errno() != 1:  # anything but EPERM: it looked
        print("ESCAPED")
""",
    ),
    Escape(
        "a file of the user",
        """
print(open({canary!r}).read())
""",
        is_harmless=True,
    ),
    Escape(
        "a file through links",
        """
import os
os.symlink({canary!r}, "soft")
try:
    print(open("soft").read())
except OSError:
    pass
os.link({canary!r}, "hard")
print(open("hard").read())
""",
        is_harmless=True,
    ),
    Escape(
        "a file through a parent folder",
        """
import os
for way in ["/proc/self/root", "/proc/1/root", "/old", "/tmp/old", "..", "../../../.."]:
    try:
        print(open(way + {canary!r}).read())
    except OSError:
        pass
""",
        is_harmless=True,
    ),
    Escape(
        "the repository, home, installed packages",
        """
import os, sys
for path in [{repository!r} + "/pyproject.toml", "/root", "/home", "/etc/passwd", "/proc", "/sys",
             *(folder + "/site-packages/pip" for folder in sys.path)]:
    if os.path.exists(path) and (os.path.isfile(path) or os.listdir(path) not in ([], [".pyenv"])):
        print("ESCAPED", path)
""",
        is_harmless=True,
    ),
    Escape(
        "expected answers in the file system",
        """
import os
for folder, _, files in os.walk("/"):
    for name in files:
        if "canary" in name or "HumanEval" in name or "test_sandboxes" in name:
            print("ESCAPED", folder, name)
""",
    ),
    Escape(
        "writing outside the scratch folder",
        """
import os, sys
for folder in ["/", "/dev", "/usr", "/etc", "/lib", {outside!r}, *sys.path, sys.prefix]:
    try:
        with open(folder + "/escaped", "w") as file:
            file.write("x")
        print("ESCAPED")
    except OSError:
        pass
""",
    ),
    Escape(
        "writing into shared memory",
        """
open("/dev/shm/trl_grpo_ext-escaped", "w").write("x")
print("ESCAPED")
""",
    ),
    Escape(
        "killing the trainer and others",
        """
import os, signal
for number in (signal.SIGSTOP, signal.SIGKILL):
    for pid in ({victim}, os.getppid(), 1):
        try:
            os.kill(pid, number)
        except OSError:
            pass
os.kill(-1, signal.SIGKILL)
""",
    ),
    Escape(
        "leaving a process behind",
        """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
""",
        max_processes=8,
    ),
    Escape(
        "dangerous system calls",
        """
import ctypes, errno, platform
libc = ctypes.CDLL(None, use_errno=True)
common = {{"io_uring_setup": 425, "pidfd_open": 434, "clone3": 435, "open_tree": 428,
          "fsopen": 430, "mount_setattr": 442, "landlock": 444, "memfd_secret": 447,
          "unknown": 999}}
calls = {{
    "x86_64": {{"bpf": 321, "userfaultfd": 323, "keyctl": 250, "add_key": 248, "mount": 165,
               "chroot": 161, "pivot_root": 155, "unshare": 272, "setns": 308, "ptrace": 101,
               "perf_event_open": 298, "open_by_handle_at": 304, "shmget": 29, "reboot": 169,
               "init_module": 175, "kexec_load": 246, "setuid": 105, "sethostname": 170,
               "swapon": 167, "quotactl": 179, "personality": 135, "mknod": 133, "prctl": 157}},
    "aarch64": {{"bpf": 280, "userfaultfd": 282, "keyctl": 219, "add_key": 217, "mount": 40,
                "chroot": 51, "pivot_root": 41, "unshare": 97, "setns": 268, "ptrace": 117,
                "perf_event_open": 241, "open_by_handle_at": 265, "shmget": 194, "reboot": 142,
                "init_module": 105, "kexec_load": 104, "setuid": 146, "sethostname": 161,
                "swapon": 224, "quotactl": 60, "personality": 92, "mknod": 33, "prctl": 167}},
}}[platform.machine()]
for name, number in {{**common, **calls}}.items():
    ctypes.set_errno(0)
    result = libc.syscall(number, 0, 0, 0, 0, 0, 0)
    if result != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
        print("ESCAPED", name, result, ctypes.get_errno())
""",
    ),
    Escape(
        "other system call tables",
        """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(0x40000000 + 39) > 0:  # getpid of x32
    print("ESCAPED")
""",
    ),
    Escape(
        "new namespaces by clone",
        """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for flag in (0x10000000, 0x20000000, 0x00020000, 0x40000000):
    if libc.syscall({clone}, flag | 17, 0, 0, 0, 0) >= 0:
        print("ESCAPED", flush=True)
""",
        max_processes=8,
    ),
    Escape(
        "becoming root",
        """
import os
for change in (os.setuid, os.seteuid, os.setgid):
    try:
        change(0)
        print("ESCAPED")
    except OSError:
        pass
""",
    ),
    Escape(
        "another program on this machine",
        """
import os
for path in ("/bin/sh", "/usr/bin/env", "/usr/bin/python3", os.__file__):
    if not path.endswith("py"):
        try:
            os.execv(path, [path, "-c", "echo ESCAPED"])
        except OSError:
            pass
""",
        is_harmless=True,
    ),
    Escape(
        "changing the clock",
        """
import time
time.clock_settime(time.CLOCK_REALTIME, time.time())
print("ESCAPED")
""",
    ),
    Escape(
        "raising its priority",
        """
import os
os.setpriority(os.PRIO_PROCESS, 0, -5)
print("ESCAPED")
""",
    ),
    Escape(
        "raising its limits",
        """
import resource
for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
    _, hard = resource.getrlimit(limit)
    try:
        resource.setrlimit(limit, (hard * 2, hard * 2))
        print("ESCAPED")
    except (OSError, ValueError):
        pass
""",
    ),
    Escape(
        "devices, such as GPUs",
        """
import os
for name in os.listdir("/dev"):
    if name not in ("null", "zero", "urandom"):
        print("ESCAPED", name)
""",
        is_harmless=True,
    ),
    Escape(
        "open files of the trainer",
        """
import os
for fd in range(3, 2000):
    try:
        os.fstat(fd)
        print("ESCAPED", fd)
    except OSError:
        pass
""",
        stopped_by=ALL,
    ),
]
