"""What a program may use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

MEBIBYTE = 1 << 20
_LEAST = {"time_limit_s": 0.0, "memory_bytes": 64 * MEBIBYTE, "scratch_bytes": 4096}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one process of a program may use; beyond that it is ended, or refused.

    Args:
        time_limit_s: Seconds of wall clock for one case of input and output, or for all asserts of
            a row; the processor seconds are limited alike.
        memory_bytes: Address space of a process, threads and their stacks included; at least 64
            MiB, as Python itself needs some.
        max_processes: How many may run at once. With 1 a program can start none, and
            `memory_bytes` holds for all that it does; with more, each process has that much.
            Threads are not meant: there may be 32 of these.
        max_output_bytes: Of what a program prints, or answers to one call.
        scratch_bytes: Of the files that it writes, in memory.
    """

    time_limit_s: float = 5.0
    memory_bytes: int = 1024 * MEBIBYTE
    max_processes: int = 1
    max_output_bytes: int = MEBIBYTE
    scratch_bytes: int = 16 * MEBIBYTE

    def for_kernel(self) -> dict[str, float]:
        """Return the limits that the kernel holds for a process."""
        return {
            "cpu_s": self.time_limit_s + 1,  # the wall clock ends it first, unless it has threads
            "memory_bytes": self.memory_bytes,
            "file_bytes": self.scratch_bytes,
            "max_processes": self.max_processes,
        }


def limit_problems(limits: Limits, *, name: str) -> Iterator[str]:
    """Yield what cannot work in these limits.

    Example:
        >>> next(limit_problems(Limits(time_limit_s=0), name="code"))
        "reward 'code' has `time_limit_s`=0, with which no program could run. Set `time_limit_s` \
in the `arguments` of this reward to more than 0.0."
    """
    for field in fields(limits):
        value, least = getattr(limits, field.name), _LEAST.get(field.name, 1)
        is_enough = value > least if field.name == "time_limit_s" else value >= least
        if not is_enough:
            bound = "more than" if field.name == "time_limit_s" else "at least"
            yield (
                f"reward '{name}' has `{field.name}`={value}, with which no program could run. "
                f"Set `{field.name}` in the `arguments` of this reward to {bound} {least}."
            )
