"""The start of a sandboxed process: limits first, then what it is there for.

What only one kind of job needs is imported by that job: where each process starts Python anew, that
is most of the time it takes.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from trl_grpo_ext.rewards.code.inside.rlimits import leave_root, set_limits
from trl_grpo_ext.rewards.code.inside.wire import Channel, write_all

READY = b"R"

SCRATCH = "/tmp"  # the folder in which an isolated program may write


def work(channel_fd: int, *, scratch: str) -> None:
    """Do the job that stands at the beginning of standard input.

    Once the limits hold, a byte on standard output says so; what comes before it is a failure of
    the sandbox, what comes after is the program's.

    Args:
        channel_fd: A socket to the other process of the same completion; -1 if there is none.
        scratch: The folder in which the program may write.
    """
    job = Channel(0, 1, max_bytes=1 << 40).receive()
    os.chdir(scratch)
    _restrict(job)
    write_all(1, READY)
    {"run": _run, "serve": _serve, "judge": _judge}[job["kind"]](job, channel_fd)


def _restrict(job: dict[str, Any]) -> None:
    if job["uid"] is not None:
        os.chmod(".", 0o777)
        leave_root(job["uid"])
    set_limits(**job["limits"], is_isolated=job["filter"])
    if job["filter"]:
        from trl_grpo_ext.rewards.code.inside import kernel, seccomp

        kernel.drop_capabilities()
        seccomp.install(may_fork=job["limits"]["max_processes"] > 1)


def _run(job: dict[str, Any], channel_fd: int) -> None:
    from trl_grpo_ext.rewards.code.inside.candidate import run

    _reopen(0, 1)
    run(job["source"])


def _serve(job: dict[str, Any], channel_fd: int) -> None:
    from trl_grpo_ext.rewards.code.inside.candidate import Servant

    _silence()
    channel = Channel(channel_fd, channel_fd, max_bytes=job["max_message_bytes"])
    Servant().serve(job["source"], channel)
    os._exit(0)  # whatever threads the program has left


def _judge(job: dict[str, Any], channel_fd: int) -> None:
    from trl_grpo_ext.rewards.code.inside.judge import judge

    verdict_fd = os.dup(1)
    _silence()
    verdict = judge(
        job["tests"],
        given=job["given"],
        entry_point=job["entry_point"],
        channel=Channel(channel_fd, channel_fd, max_bytes=job["max_message_bytes"]),
        time_limit_s=job["time_limit_s"],
    )
    write_all(verdict_fd, json.dumps(verdict).encode())
    os._exit(0)


def _silence() -> None:
    """Give the program no input, and throw away what it prints."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    _reopen(0, 1)


def _reopen(input_fd: int, output_fd: int) -> None:
    """Take these descriptors as standard input and output, without closing them ever."""
    sys.stdin = open(input_fd, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(output_fd, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__ = sys.stdin, sys.stdout  # type: ignore[misc]
