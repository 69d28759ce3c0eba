"""Running one program against its tests; what is expected never enters its process."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from trl_grpo_ext.rewards.code.cases import Asserts, Case
from trl_grpo_ext.rewards.code.inside.wire import frame
from trl_grpo_ext.rewards.code.jail import Heard, Jail, Sandbox, Talk
from trl_grpo_ext.rewards.code.limits import Limits

_GRACE_S = 2.0  # for the judge to note that the time is over, and to say so
_MAX_VERDICT_BYTES = 1000


@dataclass(frozen=True)
class Verdict:
    """How a program did.

    Args:
        passed: Tests that it passed.
        counted: Tests that count.
        end: ``"done"``; ``"time"`` if it ran out of time; ``"program"`` if it ended early;
            ``"unjudgeable"`` if the tests, whatever the program, cannot be run apart from it.
    """

    passed: int
    counted: int
    end: str = "done"

    @property
    def fraction(self) -> float:
        """The share of tests that it passed; 0 if none was reached."""
        return self.passed / self.counted if self.counted else 0.0


def run_cases(sandbox: Sandbox, program: str, cases: Sequence[Case], limits: Limits) -> Verdict:
    """Return in how many cases the program prints what is expected.

    Each case is a fresh process. After the first that runs out of time, the others are not run and
    count as failed.

    Raises:
        SandboxError: The sandbox failed.
    """
    passed = 0
    for case in cases:
        heard = _printed(sandbox, program, case, limits)
        if heard.end == "time":
            return Verdict(passed, len(cases), "time")
        passed += heard.exit_code == 0 and heard.end == "exit" and case.accepts(heard.output)
    return Verdict(passed, len(cases))


def run_asserts(sandbox: Sandbox, program: str, asserts: Asserts, limits: Limits) -> Verdict:
    """Return how many asserts hold.

    Two isolated processes, which share a socket: one has the program, the other has the tests.

    Raises:
        SandboxError: The sandbox failed.
    """
    with ExitStack() as stack:
        theirs, ours = socket.socketpair()
        with theirs, ours:
            servant = stack.enter_context(sandbox.start(channel=theirs))
            judge = stack.enter_context(sandbox.start(channel=ours))
        bound = {"max_message_bytes": limits.max_output_bytes}
        serving = job("serve", sandbox, servant, limits, source=program, **bound)
        Talk(servant, frame(serving), max_output_bytes=0).start()
        judging = job("judge", sandbox, judge, limits, **asserts.for_judge(), **bound)
        judging["time_limit_s"] = limits.time_limit_s
        talk = Talk(judge, frame(judging), max_output_bytes=_MAX_VERDICT_BYTES)
        return _verdict(talk.start().finish(limits.time_limit_s + _GRACE_S))


def job(kind: str, sandbox: Sandbox, jail: Jail, limits: Limits, **content: Any) -> dict[str, Any]:
    """Return what a process is told to do, with the limits that it sets itself before.

    Args:
        kind: ``"run"``, ``"serve"`` or ``"judge"``.
        sandbox: Where the process was started.
        jail: The process.
        limits: What it may use.
        content: What this kind of job needs.
    """
    common = {"limits": limits.for_kernel(), "uid": jail.uid, "filter": sandbox.isolates}
    return {"kind": kind, **common, **content}


def _printed(sandbox: Sandbox, program: str, case: Case, limits: Limits) -> Heard:
    with sandbox.start() as jail:
        message = frame(job("run", sandbox, jail, limits, source=program)) + case.stdin.encode()
        talk = Talk(jail, message, max_output_bytes=limits.max_output_bytes)
        return talk.start().finish(limits.time_limit_s)


def _verdict(heard: Heard) -> Verdict:
    """Return what the judge said; a program that brought it down has failed."""
    try:
        said = json.loads(heard.output)
    except ValueError:
        return Verdict(0, 1, "time" if heard.end == "time" else "program")
    return Verdict(said["passed"], said["counted"], said["end"])
