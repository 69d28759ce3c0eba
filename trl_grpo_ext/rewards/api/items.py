"""What TRL hands to a reward, as items to be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.api.wire import Item
from trl_grpo_ext.rewards.completion import Completion, completion_text
from trl_grpo_ext.rewards.registry import TRL_ARGUMENTS

_NOT_COLUMNS = TRL_ARGUMENTS | {"prompt", "completion"}


def batch_items(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    columns: Mapping[str, Any],
    *,
    name: str,
) -> list[Item]:
    """Return the items of a call of a reward.

    Args:
        prompts: Texts, or conversations.
        completions: One a prompt.
        columns: What else the reward was called with. Lists and tuples are columns of the data
            set; what TRL adds is left out.
        name: Of the reward, for the error message.

    Raises:
        RewardError: a column has another length.

    Example:
        >>> batch_items(["2 + 2?"], ["4"], {"answer": ["4"], "log_metric": print}, name="judge")
        [Item(prompt='2 + 2?', completion='4', columns={'answer': '4'}, group=0)]
    """
    rows = _rows(columns, num_rows=len(completions), name=name)
    return [
        Item(prompt, completion_text(completion), row, group)
        for prompt, completion, row, group in zip(
            prompts, completions, rows, _groups(list(zip(prompts, rows, strict=True))), strict=True
        )
    ]


def row_item(row: Mapping[str, Any], completion: Completion) -> Item:
    """Return the item of one completion of a row of the data set."""
    columns = {name: value for name, value in row.items() if name not in _NOT_COLUMNS}
    return Item(row["prompt"], completion_text(completion), columns)


def _groups(rows: Sequence[Any]) -> list[int]:
    """Return a number for each run of equal rows: TRL puts the completions of one together.

    Example:
        >>> _groups(["a", "a", "b", "a"])
        [0, 0, 1, 2]
    """
    groups: list[int] = []
    for at, row in enumerate(rows):
        is_new = at > 0 and row != rows[at - 1]
        groups.append((groups[-1] if groups else 0) + is_new)
    return groups


def _rows(columns: Mapping[str, Any], *, num_rows: int, name: str) -> list[dict[str, Any]]:
    """Return the columns of the data set, row by row."""
    lists = {
        column: values
        for column, values in columns.items()
        if column not in _NOT_COLUMNS
        and isinstance(values, Sequence)
        and not isinstance(values, str | bytes)
    }
    for column, values in lists.items():
        if len(values) != num_rows:
            raise RewardError(
                f"reward '{name}' got {len(values)} values of the column '{column}' for "
                f"{num_rows} completions, so it is not clear which belongs to which. Pass one "
                "value a completion."
            )
    return [{column: lists[column][row] for column in lists} for row in range(num_rows)]
