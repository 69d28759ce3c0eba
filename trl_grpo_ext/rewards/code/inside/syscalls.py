"""Numbers of the system calls that a sandboxed program may need, by machine."""

# From Linux 6.1: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
# What is missing on aarch64 is a call that newer architectures never had.
# fmt: off
NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {
        "access": 21, "alarm": 37, "arch_prctl": 158, "brk": 12, "chdir": 80, "chmod": 90,
        "clock_getres": 229, "clock_gettime": 228, "clock_nanosleep": 230, "clone": 56,
        "clone3": 435, "close": 3, "close_range": 436, "copy_file_range": 326, "creat": 85,
        "dup": 32, "dup2": 33, "dup3": 292, "epoll_create": 213, "epoll_create1": 291,
        "epoll_ctl": 233, "epoll_pwait": 281, "epoll_wait": 232, "eventfd2": 290, "execve": 59,
        "exit": 60, "exit_group": 231, "faccessat": 269, "faccessat2": 439, "fadvise64": 221,
        "fallocate": 285, "fchdir": 81, "fchmod": 91, "fchmodat": 268, "fcntl": 72,
        "fdatasync": 75, "flock": 73, "fork": 57, "fstat": 5, "fstatfs": 138, "fsync": 74,
        "ftruncate": 77, "futex": 202, "getcwd": 79, "getdents64": 217, "getegid": 108,
        "geteuid": 107, "getgid": 104, "getgroups": 115, "getitimer": 36, "getpeername": 52,
        "getpgid": 121, "getpgrp": 111, "getpid": 39, "getppid": 110, "getpriority": 140,
        "getrandom": 318, "getrlimit": 97, "getrusage": 98, "getsid": 124, "getsockname": 51,
        "getsockopt": 55, "gettid": 186, "gettimeofday": 96, "getuid": 102, "ioctl": 16,
        "kill": 62, "link": 86, "linkat": 265, "lseek": 8, "lstat": 6, "madvise": 28,
        "membarrier": 324, "mincore": 27, "mkdir": 83, "mkdirat": 258, "mmap": 9,
        "mount_setattr": 442, "mprotect": 10, "mremap": 25, "msync": 26, "munmap": 11,
        "nanosleep": 35, "newfstatat": 262, "open": 2, "openat": 257, "pause": 34, "pipe": 22,
        "pipe2": 293, "pivot_root": 155, "poll": 7, "ppoll": 271, "pread64": 17, "preadv": 295,
        "prlimit64": 302, "pselect6": 270, "pwrite64": 18, "pwritev": 296, "read": 0,
        "readlink": 89, "readlinkat": 267, "readv": 19, "recvfrom": 45, "recvmsg": 47,
        "rename": 82, "renameat": 264, "renameat2": 316, "restart_syscall": 219, "rmdir": 84,
        "rseq": 334, "rt_sigaction": 13, "rt_sigpending": 127, "rt_sigprocmask": 14,
        "rt_sigreturn": 15, "rt_sigsuspend": 130, "rt_sigtimedwait": 128,
        "sched_get_priority_max": 146, "sched_get_priority_min": 147, "sched_getaffinity": 204,
        "sched_getparam": 143, "sched_getscheduler": 145, "sched_yield": 24, "select": 23,
        "sendfile": 40, "sendmsg": 46, "sendto": 44, "set_robust_list": 273,
        "set_tid_address": 218, "setitimer": 38, "setpgid": 109, "setrlimit": 160, "setsid": 112,
        "setsockopt": 54, "shutdown": 48, "sigaltstack": 131, "socketpair": 53, "stat": 4,
        "statfs": 137, "statx": 332, "symlink": 88, "symlinkat": 266, "sysinfo": 99,
        "tgkill": 234, "time": 201, "times": 100, "truncate": 76, "umask": 95, "uname": 63,
        "unlink": 87, "unlinkat": 263, "unshare": 272, "utimensat": 280, "vfork": 58,
        "wait4": 61, "waitid": 247, "write": 1, "writev": 20,
    },
    "aarch64": {
        "brk": 214, "chdir": 49, "clock_getres": 114, "clock_gettime": 113,
        "clock_nanosleep": 115, "clone": 220, "clone3": 435, "close": 57, "close_range": 436,
        "copy_file_range": 285, "dup": 23, "dup3": 24, "epoll_create1": 20, "epoll_ctl": 21,
        "epoll_pwait": 22, "eventfd2": 19, "execve": 221, "exit": 93, "exit_group": 94,
        "faccessat": 48, "faccessat2": 439, "fadvise64": 223, "fallocate": 47, "fchdir": 50,
        "fchmod": 52, "fchmodat": 53, "fcntl": 25, "fdatasync": 83, "flock": 32, "fstat": 80,
        "fstatfs": 44, "fsync": 82, "ftruncate": 46, "futex": 98, "getcwd": 17, "getdents64": 61,
        "getegid": 177, "geteuid": 175, "getgid": 176, "getgroups": 158, "getitimer": 102,
        "getpeername": 205, "getpgid": 155, "getpid": 172, "getppid": 173, "getpriority": 141,
        "getrandom": 278, "getrlimit": 163, "getrusage": 165, "getsid": 156, "getsockname": 204,
        "getsockopt": 209, "gettid": 178, "gettimeofday": 169, "getuid": 174, "ioctl": 29,
        "kill": 129, "linkat": 37, "lseek": 62, "madvise": 233, "membarrier": 283,
        "mincore": 232, "mkdirat": 34, "mmap": 222, "mount_setattr": 442, "mprotect": 226,
        "mremap": 216, "msync": 227, "munmap": 215, "nanosleep": 101, "newfstatat": 79,
        "openat": 56, "pipe2": 59, "pivot_root": 41, "ppoll": 73, "pread64": 67, "preadv": 69,
        "prlimit64": 261, "pselect6": 72, "pwrite64": 68, "pwritev": 70, "read": 63,
        "readlinkat": 78, "readv": 65, "recvfrom": 207, "recvmsg": 212, "renameat": 38,
        "renameat2": 276, "restart_syscall": 128, "rseq": 293, "rt_sigaction": 134,
        "rt_sigpending": 136, "rt_sigprocmask": 135, "rt_sigreturn": 139, "rt_sigsuspend": 133,
        "rt_sigtimedwait": 137, "sched_get_priority_max": 125, "sched_get_priority_min": 126,
        "sched_getaffinity": 123, "sched_getparam": 121, "sched_getscheduler": 120,
        "sched_yield": 124, "sendfile": 71, "sendmsg": 211, "sendto": 206, "set_robust_list": 99,
        "set_tid_address": 96, "setitimer": 103, "setpgid": 154, "setrlimit": 164, "setsid": 157,
        "setsockopt": 208, "shutdown": 210, "sigaltstack": 132, "socketpair": 199, "statfs": 43,
        "statx": 291, "symlinkat": 36, "sysinfo": 179, "tgkill": 131, "times": 153,
        "truncate": 45, "umask": 166, "uname": 160, "unlinkat": 35, "unshare": 97,
        "utimensat": 88, "wait4": 260, "waitid": 95, "write": 64, "writev": 66,
    },
}
# fmt: on

# What every program may call: its own memory, threads, clocks and signals, and the files it sees.
_HARMLESS = """
    access alarm brk chdir chmod clock_getres clock_gettime clock_nanosleep close close_range
    copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_pwait
    epoll_wait eventfd2 exit exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchmod
    fchmodat fcntl fdatasync flock fstat fstatfs fsync ftruncate futex getcwd getdents64
    getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid
    getpriority getrandom getrlimit getrusage getsid getsockname getsockopt gettid
    gettimeofday getuid ioctl kill link linkat lseek lstat madvise membarrier mincore mkdir
    mkdirat mmap mprotect mremap msync munmap nanosleep newfstatat open openat pause pipe
    pipe2 poll ppoll pread64 preadv prlimit64 pselect6 pwrite64 pwritev read readlink
    readlinkat readv recvfrom recvmsg rename renameat renameat2 restart_syscall rmdir rseq
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getparam
    sched_getscheduler sched_yield select sendfile sendmsg sendto set_robust_list
    set_tid_address setitimer setrlimit setsockopt shutdown sigaltstack stat statfs statx
    symlink symlinkat sysinfo tgkill time times truncate umask uname unlink unlinkat utimensat
    wait4 waitid write writev
"""
HARMLESS = frozenset(_HARMLESS.split())

# What starting a further process needs beside `clone`.
STARTING = frozenset({"arch_prctl", "execve", "fork", "setpgid", "setsid", "vfork"})
