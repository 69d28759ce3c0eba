"""The options of what a run says about itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

StepLog = Literal["line", "hf"]


@dataclass
class LogOptions:
    """What is written about each step, and for whom."""

    step_log: StepLog = field(
        default="line",
        metadata={
            "help": "What is printed of each log: 'line' (one line: reward, KL, throughput, time "
            "left), or 'hf' (every metric, as transformers prints them)."
        },
    )
    log_jsonl: bool = field(
        default=True,
        metadata={
            "help": "Whether each log is also written to output_dir/metrics.jsonl, one JSON object "
            "a line."
        },
    )


def log_problems(options: LogOptions) -> Iterator[str]:
    """Yield what cannot work in the options of the log.

    Example:
        >>> next(log_problems(LogOptions(step_log="table")))
        "`step_log` is 'table', which is not known. Use one of: line, hf."
    """
    if options.step_log not in get_args(StepLog):
        yield (
            f"`step_log` is {options.step_log!r}, which is not known. "
            f"Use one of: {', '.join(get_args(StepLog))}."
        )
