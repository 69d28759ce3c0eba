"""One line that says how a run stands: what was logged, throughput and time left.

Pure: a :class:`~trl_grpo_ext.pace.Pace` and a log in, a line out, which
:mod:`~trl_grpo_ext.step_log` prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich.text import Text

from trl_grpo_ext.metrics import EVALUATION, find_metric
from trl_grpo_ext.pace import Pace

Logs = Mapping[str, Any]

GAP = "  "
UNHEALTHY = "yellow"
UNHEALTHY_RANK = 3.5  # at most: behind the reward, the throughput and the time left
LAST = "train_loss"  # only the log at the end of training has it

# What an evaluation reports beside the metrics of a batch; the rest is of the user.
_OF_EVALUATION = re.compile(
    r"(greedy|tasks)/.*|.*/(low|high|scored|accuracy)|(.*/)?(pass|maj)@\d+|accuracy|num_prompts"
    r"|(model_preparation_|run)time|(samples|steps)_per_second"
)


@dataclass(frozen=True)
class Field:
    """A part of a line.

    Attributes:
        text: As printed.
        rank: Where the line is too long, fields of low rank come first.
        healthy: Whether the value is in its healthy range.
    """

    text: str
    rank: int
    healthy: bool = True


def training_fields(logs: Logs, *, step: int, max_steps: int, pace: Pace) -> Iterator[Field]:
    """Yield what is said of a step, of what was logged.

    Example:
        >>> fields = training_fields({"reward": 0.5, "kl": 4e-4}, step=3, max_steps=10, pace=Pace())
        >>> [field.text for field in fields]
        ['step  3/10', 'reward 0.500', 'kl  4e-4']
    """
    yield Field(f"step {_step(step, max_steps)}", 0)
    yield from _reward_field(logs)
    yield from _number_field(logs, "loss", "loss", width=6, rank=8)
    yield from _number_field(logs, "kl", "kl", width=5, rank=4)
    yield from _number_field(logs, "entropy", "entropy", width=5, rank=9)
    yield from _length_fields(logs)
    yield from _share_field(logs, "frac_reward_zero_std", "silent", rank=5)
    yield from _pace_fields(pace, steps_left=max_steps - step)


def evaluation_fields(
    logs: Logs, *, step: int, max_steps: int, best: str | None = None, is_new_best: bool = False
) -> Iterator[Field]:
    """Yield what is said of an evaluation; one of several sets starts with its name.

    Args:
        logs: Of one eval set.
        step: Optimizer steps so far.
        max_steps: Of the run; 0 if there is none.
        best: The key in ``logs`` that decides about the best model; it comes first.
        is_new_best: Whether its value is the best so far.

    Example:
        >>> logs = {"eval_math_runtime": 63.0, "eval_reward": 0.5, "eval_accuracy": 0.4}
        >>> [field.text for field in evaluation_fields(logs, step=3, max_steps=10)]
        ['eval_math  3/10', 'reward 0.500', 'accuracy 0.400', 'in 1:03']
    """
    names = (key.removesuffix("_runtime") for key in logs if key.endswith("_runtime"))
    name = next(names, EVALUATION.rstrip("_"))
    short = {_short(key, name): logs[key] for key in logs}
    yield Field(f"{name} {_step(step, max_steps)}" if max_steps else name, 0)
    chosen = None if best is None or best not in logs else _short(best, name)
    if chosen is not None:
        yield Field(_measured(short, chosen) + (" new best" if is_new_best else ""), 0)
    rest = {key: value for key, value in short.items() if key != chosen}
    yield from _reward_field(rest)
    yield from _right_fields(rest)
    yield from _own_fields(rest)
    yield from _number_field(rest, "kl", "kl", width=5, rank=6)
    yield from _length_fields(rest)
    if "runtime" in short:
        yield Field(f"in {duration(short['runtime'])}", 5)


def last_fields(
    logs: Logs, *, step: int, num_tokens: float, first_step: int = 0, best: str | None = None
) -> Iterator[Field]:
    """Yield what is said when training has ended.

    Args:
        logs: The last ones of the run.
        step: Optimizer steps of the run.
        num_tokens: Sampled in this session.
        first_step: Where this session began: above 0 if it was resumed.
        best: Which checkpoint is the best.

    Example:
        >>> fields = last_fields({"train_runtime": 380.0}, step=100, num_tokens=250000)
        >>> [field.text for field in fields]
        ['done: 100 steps', 'in 6:20', '250,000 tokens']
        >>> fields = last_fields({"train_runtime": 95.0}, step=100, num_tokens=6e4, first_step=75)
        >>> [field.text for field in fields]
        ['done: 100 steps', 'since the resume: 25 steps', 'in 1:35', '60,000 tokens']
    """
    yield Field(f"done: {step} steps", 0)
    if first_step:
        yield Field(f"since the resume: {step - first_step} steps", 0)
    if "train_runtime" in logs:
        yield Field(f"in {duration(logs['train_runtime'])}", 1)
    if num_tokens:
        yield Field(f"{num_tokens:,.0f} tokens", 2)
    if best is not None:
        yield Field(f"best: {best}", 0)


def other_fields(logs: Logs, *, step: int, max_steps: int) -> Iterator[Field]:
    """Yield what somebody else logged, as it is.

    Example:
        >>> fields = other_fields({"mine": 2, "epoch": 1.0}, step=3, max_steps=10)
        >>> [field.text for field in fields]
        ['step  3/10', 'mine 2.000']
    """
    yield Field(f"step {_step(step, max_steps)}", 0)
    for key, value in logs.items():
        if key != "epoch" and isinstance(value, int | float):
            yield Field(f"{key} {number(value).strip()}", 1)


def line(fields: Iterable[Field], *, width: int) -> Text:
    """Return the fields side by side, as many of the lowest ranks as fit into ``width`` columns.

    What is not healthy is yellow, and only the reward and the pace come before it.

    Example:
        >>> fields = [Field("step 1", 0), Field("loss 0.1", 8), Field("truncated 90%", 7, False)]
        >>> line(fields, width=22).plain
        'step 1  truncated 90%'
    """
    first, *others = fields
    kept, room = {0: first}, width - len(first.text)
    for place, field in sorted(enumerate(others, start=1), key=lambda found: _priority(found[1])):
        if len(GAP + field.text) <= room:
            kept[place] = field
            room -= len(GAP + field.text)
    text = Text(GAP).join(
        Text(field.text, style="" if field.healthy else UNHEALTHY)
        for _, field in sorted(kept.items())
    )
    text.truncate(width)
    return text


def wrapped(fields: Iterable[Field], *, width: int) -> Text:
    """Return all fields, in as many lines of ``width`` columns as they take.

    Example:
        >>> fields = [Field("eval 5/10", 0), Field("reward 0.500", 1), Field("in 0:07", 5)]
        >>> print(wrapped(fields, width=24).plain)
        eval 5/10  reward 0.500
          in 0:07
    """
    rows: list[list[Field]] = [[]]
    for field in fields:
        if rows[-1] and len(GAP.join(found.text for found in [*rows[-1], field])) > width:
            rows.append([replace(field, text=GAP + field.text)])
        else:
            rows[-1].append(field)
    return Text("\n").join(line(row, width=width) for row in rows)


def number(value: float | None, width: int = 5) -> str:
    """Return a number in ``width`` columns, with as many decimals as fit.

    Example:
        >>> [number(value) for value in (0.56321, 12.346, -0.25, 118, 0.00041, 2.5e6, None)]
        ['0.563', '12.35', '-0.25', '118.0', ' 4e-4', '  2e6', '  n/a']
    """
    if value is None:
        return "n/a".rjust(width)
    for decimals in range(width - 2, -1, -1):
        text = f"{value:.{decimals}f}"
        if len(text) <= width and not 0 < abs(value) < 10**-decimals:
            return text.rjust(width)
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.0e}").rjust(width)


def duration(seconds: float) -> str:
    """Return a length of time in at most six columns.

    Example:
        >>> [duration(seconds) for seconds in (5.2, 380, 4320, 270000)]
        ['0:05', '6:20', '1h12m', '3d03h']
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02}"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours < 24 else f"{hours // 24}d{hours % 24:02}h"


def _reward_field(logs: Logs) -> Iterator[Field]:
    if "reward" not in logs:
        return
    spread = logs.get("reward_std")
    text = "" if spread is None else f"±{number(spread, 4).strip():<4}"
    yield Field(f"reward {number(logs['reward'])}{text}", 1, logs["reward"] is not None)


def _number_field(logs: Logs, key: str, label: str, *, width: int, rank: int) -> Iterator[Field]:
    if key in logs:
        yield Field(f"{label} {number(logs[key], width)}", rank, _is_healthy(logs, key))


def _share_field(logs: Logs, key: str, label: str, *, width: int = 3, rank: int) -> Iterator[Field]:
    if logs.get(key) is not None:
        share = f"{logs[key]:.0%}"
        yield Field(f"{label} {share:>{width}}", rank, _is_healthy(logs, key))


def _length_fields(logs: Logs) -> Iterator[Field]:
    length = logs.get("completions/mean_length")
    if length is not None:
        yield Field(f"len {length:>4.0f}", 6)
    if not _is_healthy(logs, "completions/clipped_ratio"):
        yield from _share_field(logs, "completions/clipped_ratio", "truncated", width=0, rank=6)


def _right_fields(logs: Logs) -> Iterator[Field]:
    """Accuracy with its interval; pass@1 is the same and left out."""
    if "accuracy" in logs:
        yield Field(_measured(logs, "accuracy"), 2)
    for key in logs:
        if re.fullmatch(r"(pass|maj)@\d+", key) and not key.endswith("@1"):
            yield from _number_field(logs, key, key, width=5, rank=4)


def _own_fields(logs: Logs) -> Iterator[Field]:
    """What ``compute_metrics`` and the reward functions added."""
    for key, value in logs.items():
        known = find_metric(key) is not None or _OF_EVALUATION.fullmatch(key)
        if not known and isinstance(value, int | float):
            yield Field(f"{key} {number(value).strip()}", 4)


def _measured(logs: Logs, key: str) -> str:
    """A value with its interval, if it has one."""
    ends = [logs.get(f"{key}/{end}") for end in ("low", "high")]
    interval = "" if None in ends else f" ({'-'.join(number(end, 4) for end in ends)})"
    return f"{key} {number(logs[key])}{interval}"


def _pace_fields(pace: Pace, *, steps_left: int) -> Iterator[Field]:
    if (rate := pace.tokens_per_second) is not None:
        yield Field(f"{rate:>5,.0f} tok/s", 3)
    if (seconds := pace.seconds_per_step) is not None:
        yield Field(f"{number(seconds, 4)} s/step", 7)
        yield Field(f"{duration(seconds * steps_left)} left", 2)


def _is_healthy(logs: Logs, key: str) -> bool:
    value, metric = logs.get(key), find_metric(key)
    return value is None or metric is None or metric.is_healthy(value)


def _priority(field: Field) -> tuple[float, int]:
    return field.rank if field.healthy else min(field.rank, UNHEALTHY_RANK), field.rank


def _short(key: str, name: str) -> str:
    """The name of a metric of an eval set, without that of the set."""
    return key.removeprefix(f"{name}_").removeprefix(EVALUATION)


def _step(step: int, max_steps: int) -> str:
    return f"{step:>{len(str(max_steps))}}/{max_steps}"
