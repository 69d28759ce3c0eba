"""Which sandbox to use: the best that works on this machine, found by trying."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, get_args

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.code.bubblewrap import Bubblewrap
from trl_grpo_ext.rewards.code.inside.rlimits import MAX_THREADS
from trl_grpo_ext.rewards.code.inside.wire import frame
from trl_grpo_ext.rewards.code.jail import Sandbox, SandboxError, Talk
from trl_grpo_ext.rewards.code.limits import Limits
from trl_grpo_ext.rewards.code.namespaces import Namespaces
from trl_grpo_ext.rewards.code.rlimits import Rlimits
from trl_grpo_ext.rewards.code.verdicts import job
from trl_grpo_ext.rewards.code.visible import visible_files

Level = Literal["namespaces", "bubblewrap", "rlimits"]  # "auto" tries them in this order
LEVELS: tuple[Level, ...] = get_args(Level)


def make_sandbox(
    level: Level | Literal["auto"],
    *,
    require_isolation: bool,
    limits: Limits,
    packages: Sequence[str] = (),
    name: str = "code",
) -> Sandbox:
    """Return the sandbox of a level.

    Args:
        level: Or ``"auto"`` for the first that works.
        require_isolation: Whether limits alone are not enough.
        limits: What a program may use.
        packages: Folders that it may import from.
        name: Of the reward, for messages.

    Raises:
        ConfigurationError: The level is not known, does not work here, or isolates nothing
            although that is required.
    """
    if level not in ("auto", *LEVELS):
        raise ConfigurationError([_unknown(name, level)])
    if level == "rlimits" and require_isolation:
        raise ConfigurationError([_isolates_nothing(name)])
    wanted: tuple[Level, ...] = LEVELS if level == "auto" else (level,)
    allowed = [one for one in wanted if one != "rlimits" or not require_isolation]
    reasons: dict[Level, str] = {}
    for one in allowed:
        reasons[one] = unavailable(
            one, packages=tuple(packages), max_processes=limits.max_processes
        )
        if not reasons[one]:
            return _build(one, limits, tuple(packages))
    raise ConfigurationError([_none_works(name, reasons)])


@functools.cache
def unavailable(level: Level, *, packages: tuple[str, ...] = (), max_processes: int = 1) -> str:
    """Return why a level does not work on this machine; empty if it does.

    Found by running a program there, once in the life of this process.

    Args:
        level: One that is known.
        packages: Folders that programs may import from.
        max_processes: If above 1, the program also tries to start more than that.
    """
    limits = Limits(time_limit_s=30, max_processes=max_processes)
    must_hold = max_processes > 1 and level != "rlimits"
    source = _FORKING.format(most=max_processes + 2 * MAX_THREADS) if must_hold else _PLAIN
    try:
        sandbox = _build(level, limits, packages)
        try:
            output = _output(sandbox, source, limits)
        finally:
            sandbox.close()
    except SandboxError as error:
        return str(error)
    return _REASONS.get(output, "a first program did not run there")


_PLAIN = "print('fine')"
_FORKING = """
import os, time
try:
    for _ in range({most}):
        if os.fork() == 0:
            time.sleep(60)
    print("unlimited", flush=True)
except OSError:
    print("fine", flush=True)
"""
_REASONS = {
    b"fine\n": "",
    b"unlimited\n": "the kernel does not hold `max_processes` there, leave it at 1",
}


def _output(sandbox: Sandbox, source: str, limits: Limits) -> bytes:
    with sandbox.start() as jail:
        message = frame(job("run", sandbox, jail, limits, source=source))
        return Talk(jail, message, max_output_bytes=100).start().finish(30).output


def _build(level: Level, limits: Limits, packages: tuple[str, ...]) -> Sandbox:
    visible = visible_files(packages)
    if level == "namespaces":
        return Namespaces(visible, scratch_bytes=limits.scratch_bytes)
    if level == "bubblewrap":
        return Bubblewrap(visible, scratch_bytes=limits.scratch_bytes)
    return Rlimits(visible)


def _unknown(name: str, level: str) -> str:
    return (
        f"reward '{name}' has `sandbox`={level!r}, which is not known, so no program could run. "
        f"Set `sandbox` in the `arguments` of this reward to one of auto, {', '.join(LEVELS)}, "
        "sandbox_fusion."
    )


def _isolates_nothing(name: str) -> str:
    return (
        f"reward '{name}' has `sandbox`='rlimits', which limits programs but lets them read your "
        "files and reach the network, and `require_isolation` is true. Set `sandbox` to 'auto', or "
        "`require_isolation: false` if you trust every program that the model may write."
    )


def _none_works(name: str, reasons: dict[Level, str]) -> str:
    tried = "; ".join(f"{level}: {reason}" for level, reason in reasons.items())
    return (
        f"reward '{name}' found no sandbox that works here ({tried}), so programs that the model "
        "writes could read your files and reach the network. Install bubblewrap (`apt-get install "
        "bubblewrap`, `dnf install bubblewrap`), let users make user namespaces (`sysctl "
        "kernel.unprivileged_userns_clone=1`, in a container a seccomp profile that permits "
        "unshare and mount), use `sandbox: sandbox_fusion`, or set `require_isolation: false` in "
        "the `arguments` of this reward if you trust every program."
    )
