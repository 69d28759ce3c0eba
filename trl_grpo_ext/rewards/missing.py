"""Scores that are not there: what was not scored is asked for again, and never counts as 0.

A reward says by its attribute ``on_missing`` what ``None`` means: ``"skip"`` that it does not apply
to the completion (every plain function, as in TRL), ``"exclude"`` that the completion could not be
scored, so that nothing can be said of it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from trl_grpo_ext.rewards.scores import Score

OnMissing = Literal["exclude", "skip"]

Columns = Mapping[str, Any]


def excludes(reward: object) -> bool:
    """Return whether a completion that this reward could not score is left out altogether."""
    return getattr(reward, "on_missing", "skip") == "exclude"


def excludes_without(reward: object, row: Mapping[str, Any]) -> bool:
    """Return whether a completion of this row is left out if this reward has no score for it.

    That is where an excluding reward applies to the row: one that does not always has a method
    ``applies``.
    """
    applies = getattr(reward, "applies", None)
    return excludes(reward) and (applies is None or bool(applies(row)))


def missing_problems(on_missing: object) -> Iterator[str]:
    """Yield what is wrong with the option."""
    if on_missing not in get_args(OnMissing):
        yield (
            f"`on_missing`={on_missing!r} is not known, so it is not clear what a completion "
            "without a score means. Set `on_missing` to 'exclude' (it is left out) or 'skip' (the "
            "other rewards count alone)."
        )


def without_excluded(rewards_BR: Tensor, *, excluding_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rewards with NaN throughout each excluded completion, and which ones these are.

    Args:
        rewards_BR: Shape ``(B, R)``: completions by reward functions; NaN where there is no score.
        excluding_BR: Shape ``(B, R)``, or ``(R,)``: where a missing score excludes the completion.

    Returns:
        Shapes ``(B, R)`` and ``(B,)``.

    Example:
        >>> rewards = torch.tensor([[1.0, 0.5], [float("nan"), 0.5], [1.0, float("nan")]])
        >>> without_excluded(rewards, excluding_BR=torch.tensor([True, False]))
        (tensor([[1.0000, 0.5000],
                [   nan,    nan],
                [1.0000,    nan]]), tensor([False,  True, False]))
    """
    excluded_B = (rewards_BR.isnan() & excluding_BR).any(dim=1)
    return rewards_BR.masked_fill(excluded_B[:, None], torch.nan), excluded_B


def ask_for_missing(
    reward: Callable[..., Sequence[Score]],
    known: Sequence[Score] | None,
    columns: Columns,
    *,
    group_size: int = 1,
) -> Sequence[Score]:
    """Return the scores, calling the reward with only those completions that have none yet.

    A call with a part of the batch logs no columns of its table (``log_extra``).

    Args:
        reward: Called with the rows that have no score.
        known: The scores that are there; ``None`` if nothing was scored yet.
        columns: As in a call of a reward: lists hold a value a row, all else is passed on.
        group_size: Rows that are scored together: if one is missing, all of them are asked for.

    Example:
        >>> def lengths(completions, **columns):
        ...     return [float(len(text)) for text in completions]
        >>> ask_for_missing(lengths, [9.0, None], {"completions": ["a", "bb"]})
        [9.0, 2.0]
    """
    if known is None:
        return reward(**columns)  # checked by whoever called
    scores = list(known)
    rows = _rows_to_ask(scores, group_size)
    if rows:
        part = take(columns, rows, num_rows=len(scores))
        if len(rows) < len(scores) and "log_extra" in part:
            part["log_extra"] = _log_nothing
        for row, score in zip(rows, reward(**part), strict=True):
            scores[row] = score
    return scores


def take(columns: Columns, rows: Sequence[int], *, num_rows: int) -> dict[str, Any]:
    """Return the columns with these rows only; what is no list of ``num_rows`` stays as it is."""
    return {
        name: [values[row] for row in rows]
        if isinstance(values, list) and len(values) == num_rows
        else values
        for name, values in columns.items()
    }


def with_stop(reward: Callable[..., Any], should_stop: Callable[[], bool]) -> Callable[..., Any]:
    """Return the reward, told when to stop if it has a parameter ``should_stop``."""
    try:
        takes_it = "should_stop" in inspect.signature(reward).parameters
    except (TypeError, ValueError):  # of a builtin
        takes_it = False
    return functools.partial(reward, should_stop=should_stop) if takes_it else reward


def _rows_to_ask(scores: Sequence[Score], group_size: int) -> list[int]:
    groups = {row // group_size for row, score in enumerate(scores) if score is None}
    return [row for row in range(len(scores)) if row // group_size in groups]


def _log_nothing(column: str, values: Sequence[Any]) -> None:
    """Stand in for TRL's ``log_extra``, which takes a value for each completion of the batch."""
