"""Rewards that compare the completions of a prompt, where a group is split over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trl_grpo_ext.rewards.missing import Columns, ask_for_missing
from trl_grpo_ext.rewards.scores import Score


def ask_for_whole_groups(
    reward: Callable[..., Sequence[Score]],
    known: Sequence[Score] | None,
    columns: Columns,
    *,
    group_size: int,
    process_index: int,
    gather: Callable[[list[Any]], list[Any]],
) -> Sequence[Score]:
    """Return the scores of this process's completions, each compared with its whole group.

    A group that is split over processes is asked about by the one with its first completion, which
    shares the scores. Every process must call this.

    Args:
        reward: Called once, with whole groups; with empty lists where this process has none.
        known: As in :func:`~trl_grpo_ext.rewards.missing.ask_for_missing`.
        columns: As in a call of a reward; as many rows on each process.
        group_size: Completions a prompt; they stand together in the order of the processes.
        process_index: Of this process.
        gather: Returns the lists of all processes, joined in their order.
    """
    num_local = len(columns["prompts"])
    if num_local % group_size == 0:
        return ask_for_missing(reward, known, columns, group_size=group_size)
    lists = {
        name: values
        for name, values in columns.items()
        if isinstance(values, list) and len(values) == num_local
    }
    local = zip(known or [None] * num_local, *lists.values(), strict=True)
    rows = gather(list(local))
    owned = [
        row
        for row in range(len(rows))
        if row // group_size * group_size // num_local == process_index
    ]
    scores_known, *values = [[rows[row][at] for row in owned] for at in range(1 + len(lists))]
    found = ask_for_missing(
        reward,
        None if known is None else scores_known,
        {**columns, **dict(zip(lists, values, strict=True))},
        group_size=group_size,
    )
    shared = dict(gather(list(zip(owned, found, strict=True))))
    return [shared[process_index * num_local + row] for row in range(num_local)]
