"""Completions in rows of a file, and what rewards say of them, called as in training."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.completion import Completion
from trl_grpo_ext.rewards.registry import (
    TRL_ARGUMENTS,
    RewardFunction,
    log_name,
    required_columns,
)
from trl_grpo_ext.rewards.score_rows import Row
from trl_grpo_ext.rewards.scores import Score, checked_scores, is_asynchronous

DEFAULT_COLUMNS = ("completion", "completions")


@dataclass(frozen=True)
class Completions:
    """The completions of a file, as TRL would pass them to a reward.

    Attributes:
        rows: Of the file.
        row_of: For each completion the number of its row.
        columns: ``prompts``, ``completions`` and the other columns, one value a completion each.
    """

    rows: Sequence[Row]
    row_of: Sequence[int]
    columns: Mapping[str, list[Any]]

    @property
    def texts(self) -> list[Completion]:
        """The completions."""
        return self.columns["completions"]


@dataclass(frozen=True)
class Scored:
    """What a reward says.

    Attributes:
        name: Of the reward.
        scores: One a completion, ``None`` where there is none.
        num_non_finite: How many of these were NaN or infinite.
        seconds: That the call took.
        metrics: What the reward gave to ``log_metric``.
    """

    name: str
    scores: Sequence[Score]
    num_non_finite: int = 0
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return counts, shares and times, for a table or as JSON.

        The shares of 0 and 1 are of the scored completions; ``None`` if there are none.

        Example:
            >>> Scored("mine", [1.0, 0.0, 0.5, None], seconds=2.0).summary()["mean"]
            0.5
        """
        known = [score for score in self.scores if score is not None]
        num = len(known)
        return {
            "reward": self.name,
            "completions": len(self.scores),
            "unscored": len(self.scores) - num,
            "non_finite": self.num_non_finite,
            "mean": sum(known) / num if num else None,
            "share_0": known.count(0.0) / num if num else None,
            "share_1": known.count(1.0) / num if num else None,
            "seconds": self.seconds,
            "completions_per_second": len(self.scores) / self.seconds if self.seconds else None,
            "metrics": dict(self.metrics),
        }


def read_completions(
    rows: Sequence[Row],
    *,
    prompt_column: str = "prompt",
    completion_column: str | None = None,
    answer_column: str | None = None,
) -> Completions:
    """Return the completions in rows, those with several completions taken apart.

    Args:
        rows: Of a file.
        prompt_column: With a text or messages.
        completion_column: With a completion (a text, or a list of messages) or a list of them;
            ``completion`` or ``completions`` if not given.
        answer_column: Passed to the rewards as ``answer``, as in a recipe.

    Raises:
        ConfigurationError: A column is not there, or holds no completion.

    Example:
        >>> found = read_completions([{"prompt": "3 + 4?", "completions": ["7", "8"], "gold": 7}])
        >>> found.columns
        {'gold': [7, 7], 'prompts': ['3 + 4?', '3 + 4?'], 'completions': ['7', '8']}
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    column = completion_column or next((c for c in DEFAULT_COLUMNS if c in names), "completion")
    wanted = {"prompt": prompt_column, "completion": column, "answer": answer_column}
    missing = {option: name for option, name in wanted.items() if name and name not in names}
    if missing:
        raise ConfigurationError([_no_column(o, name, names) for o, name in missing.items()])
    groups = [_completions_in(row.get(column)) for row in rows]
    if bad := [number for number, group in enumerate(groups) if group is None]:
        raise ConfigurationError([_no_completions(column, bad, len(rows))])
    row_of = [number for number, group in enumerate(groups) for _ in group or ()]
    if not row_of:
        raise ConfigurationError([_no_completions(column, range(len(rows)), len(rows))])
    others = {name: name for name in names if name not in {prompt_column, column, *TRL_ARGUMENTS}}
    others |= {"answer": answer_column} if answer_column else {}
    columns = {name: [rows[at].get(source) for at in row_of] for name, source in others.items()}
    columns["prompts"] = [rows[at].get(prompt_column) for at in row_of]
    columns["completions"] = [one for group in groups for one in group or ()]
    return Completions(rows=rows, row_of=row_of, columns=columns)


def score_completions(
    reward: RewardFunction,
    found: Completions,
    *,
    token_ids: Callable[[Sequence[Completion]], list[list[int]]] | None = None,
) -> Scored:
    """Return what a reward says of all completions, in one call, as a trainer makes it.

    Args:
        reward: A TRL reward function, asynchronous or not.
        found: What to score.
        token_ids: Makes the ``completion_ids``, if there are to be any.

    Raises:
        ConfigurationError: The reward needs a column that the file does not have.
        RewardError: It returned something else than scores.
    """
    name = log_name(reward)
    if missing := sorted(required_columns(reward) - set(found.columns)):
        raise ConfigurationError([_reward_needs(name, missing, list(found.columns))])
    metrics: dict[str, float] = {}
    arguments = {**found.columns, **_trainer_arguments(metrics)}
    if token_ids is not None:
        arguments["completion_ids"] = token_ids(found.texts)
    start = time.perf_counter()
    values: Any = reward(**arguments)
    if is_asynchronous(reward):
        values = asyncio.run(values)
    seconds = time.perf_counter() - start
    scores, num_bad = checked_scores(values, name=name, num_completions=len(found.texts))
    return Scored(name, scores, num_bad, seconds, metrics)


def with_scores(found: Completions, scored: Sequence[Scored]) -> list[Row]:
    """Return the rows with a column ``score_NAME`` for each reward.

    Where a row may have several completions, it has a list of scores.

    Raises:
        ConfigurationError: The rows have such a column already.

    Example:
        >>> found = read_completions([{"prompt": "3 + 4?", "completion": "7"}])
        >>> with_scores(found, [Scored("last_number", [1.0])])
        [{'prompt': '3 + 4?', 'completion': '7', 'score_last_number': 1.0}]
    """
    names = {f"score_{one.name}" for one in scored}
    if taken := sorted(names & {name for row in found.rows for name in row}):
        raise ConfigurationError([_taken(taken)])
    rows = [dict(row) for row in found.rows]
    for one in scored:
        for row, values in zip(rows, _by_row(found, one.scores), strict=True):
            row[f"score_{one.name}"] = values
    return rows


def _completions_in(cell: object) -> list[Completion] | None:
    """Return the completions in a cell; ``None`` if it holds something else."""
    if isinstance(cell, str) or _is_conversation(cell):
        return [cell]  # type: ignore[list-item]  # just checked
    if not isinstance(cell, list):
        return None
    return cell if all(isinstance(one, str) or _is_conversation(one) for one in cell) else None


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and "role" in message for message in value)
    )


def _by_row(found: Completions, scores: Sequence[Score]) -> list[Any]:
    """Return for each row its score, or the list of its scores if it has several completions."""
    groups: list[list[Score]] = [[] for _ in found.rows]
    for at, score in zip(found.row_of, scores, strict=True):
        groups[at].append(score)
    if all(len(group) == 1 for group in groups):
        return [group[0] for group in groups]
    return groups


def _trainer_arguments(metrics: dict[str, float]) -> dict[str, Any]:
    from transformers import TrainerState

    return {
        "trainer_state": TrainerState(),
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: metrics.__setitem__(str(name), float(value)),
    }


def _no_column(option: str, name: str, columns: Sequence[str]) -> str:
    return (
        f"the file has no column {name!r} (it has {', '.join(columns)}), so there is nothing to "
        f"score. Name the column with `--{option}-column`."
    )


def _no_completions(column: str, bad: Sequence[int], total: int) -> str:
    return (
        f"the column '{column}' holds neither a text, nor messages with a role, nor a list of "
        f"these in {len(bad)} of {total} rows (the first is row {bad[0]}), so there is nothing to "
        "score. Correct these rows, or name another column with `--completion-column`."
    )


def _reward_needs(name: str, missing: Sequence[str], columns: Sequence[str]) -> str:
    return (
        f"reward '{name}' needs the columns {', '.join(missing)}, which the file does not have (it "
        f"has {', '.join(columns)}), so it cannot be called. Add the columns, name the gold "
        "answers with `--answer-column`, or correct the reward's arguments."
    )


def _taken(names: Sequence[str]) -> str:
    return (
        f"the rows already have {', '.join(names)}, which the scores would replace. Score a file "
        "without these columns, or give the reward another name with `log_as` in its arguments."
    )
