"""What an evaluation sampled: groups of completions with their scores, each prompt once.

Shapes: ``P`` prompts, ``G`` completions a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.completion import Completion, completion_text


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """One completion of an evaluation.

    Attributes:
        place: Its number in the evaluation: completion ``place % G`` of prompt ``place // G``.
        example: The row of the dataset, prompt included; kept with the first of a group only.
        completion: Text, or messages.
        scores: One a reward function; NaN where there is none.
        answers: One a reward function; what it takes for the answer in the completion.
        num_tokens: Of the completion, without what tools wrote.
        is_truncated: Whether it ended for want of room.
    """

    place: int
    example: Mapping[str, Any] | None
    completion: Completion
    scores: Sequence[float]
    answers: Sequence[Hashable]
    num_tokens: int
    is_truncated: bool


@dataclass(frozen=True, kw_only=True)
class EvalGroups:
    """The groups of one eval set: what ``compute_metrics`` gets.

    Every prompt of the set is there once, in the order of the dataset, on every process.

    Attributes:
        prompts: ``P`` texts or conversations, as in the dataset.
        completions: ``P`` lists of ``G`` texts or lists of messages.
        rewards: Scores of each reward function by its name, shape ``(P, G)``, float32; NaN where
            a completion was not scored.
        reward_PG: Their weighted sum, as in training; NaN where no function gave a score.
        answers: For each reward function with an attribute ``answer``, what it found in each
            completion: ``P`` lists of ``G``; ``None`` where it found nothing.
        lengths_PG: Tokens of each completion.
        truncated_PG: Whether a completion ended for want of room.
        columns: The other columns of the dataset, ``P`` values each, by name.
    """

    prompts: list[Any]
    completions: list[list[Completion]]
    rewards: dict[str, Tensor]
    reward_PG: Tensor
    answers: dict[str, list[list[Hashable]]]
    lengths_PG: Tensor
    truncated_PG: Tensor
    columns: dict[str, list[Any]]

    @property
    def num_prompts(self) -> int:
        """``P``."""
        return len(self.prompts)

    @property
    def group_size(self) -> int:
        """``G``."""
        return self.reward_PG.shape[1]

    @property
    def rewards_BR(self) -> Tensor:
        """Scores with one row a completion and one column a reward function."""
        return torch.stack([scores_PG.flatten() for scores_PG in self.rewards.values()], dim=1)

    @property
    def examples(self) -> list[dict[str, Any]]:
        """The rows of the dataset."""
        names = [name for name in self.columns if name != "prompt"]
        return [
            {"prompt": prompt} | {name: self.columns[name][index] for name in names}
            for index, prompt in enumerate(self.prompts)
        ]

    def select(self, indices: Sequence[int]) -> EvalGroups:
        """Return the groups of some prompts, in the order of ``indices``."""
        rows = torch.tensor(indices, dtype=torch.long)

        def chosen(values: list[Any]) -> list[Any]:
            return [values[index] for index in indices]

        return EvalGroups(
            prompts=chosen(self.prompts),
            completions=chosen(self.completions),
            rewards={name: scores_PG[rows] for name, scores_PG in self.rewards.items()},
            reward_PG=self.reward_PG[rows],
            answers={name: chosen(answers) for name, answers in self.answers.items()},
            lengths_PG=self.lengths_PG[rows],
            truncated_PG=self.truncated_PG[rows],
            columns={name: chosen(values) for name, values in self.columns.items()},
        )


def find_answers(reward_func: object, name: str, completions: Sequence[Completion]) -> list[Any]:
    """Return what a reward function takes for the answer in each completion.

    A function says so by an attribute ``answer``: from the text of a completion to something
    hashable, equal for equal answers, or ``None``.

    Returns:
        One a completion; ``None`` for each if the function has no such attribute.

    Raises:
        RewardError: an answer is not hashable, so that votes cannot be counted.
    """
    read = getattr(reward_func, "answer", None)
    if not callable(read):
        return [None] * len(completions)
    found = [read(completion_text(completion)) for completion in completions]
    for answer in found:
        if not isinstance(answer, Hashable):
            raise RewardError(
                f"`answer` of the reward function '{name}' returned a {type(answer).__name__}, "
                "which is not hashable, so that equal answers cannot be counted for a majority "
                "vote. Return a text, a number or a tuple."
            )
    return found


def build_groups(
    rows: Sequence[EvalRow],
    *,
    group_size: int,
    num_prompts: int,
    reward_names: Sequence[str],
    weights: Sequence[float],
    have_answers: Sequence[bool],
    counting: Callable[[Tensor], Tensor] = lambda rewards_BR: rewards_BR,
) -> EvalGroups:
    """Return the groups of an evaluation from the completions of all processes.

    Args:
        rows: In any order. Rows with a ``place`` beyond the last prompt filled up the last batch:
            they are left out. So is a prompt that lacks completions (``dataloader_drop_last``).
        group_size: ``G``.
        num_prompts: Of the eval set.
        reward_names: Of the reward functions.
        weights: Of the reward functions.
        have_answers: Whether each reward function reads answers.
        counting: From scores to what counts of them in ``reward_PG``; shapes ``(B, R)``.
    """
    ordered = sorted(
        (row for row in rows if row.place < num_prompts * group_size), key=lambda row: row.place
    )
    num_whole = len(ordered) // group_size
    groups = [ordered[p * group_size : (p + 1) * group_size] for p in range(num_whole)]
    examples = [group[0].example or {} for group in groups]
    names = list(dict.fromkeys(name for example in examples for name in example))
    scores_PGR = torch.tensor(
        [[list(row.scores) for row in group] for group in groups], dtype=torch.float32
    ).view(num_whole, group_size, len(reward_names))
    return EvalGroups(
        prompts=[example.get("prompt") for example in examples],
        completions=[[row.completion for row in group] for group in groups],
        rewards={name: scores_PGR[:, :, r] for r, name in enumerate(reward_names)},
        reward_PG=_weighted_sum(counting(scores_PGR.flatten(0, 1)).view(scores_PGR.shape), weights),
        answers={
            name: [[row.answers[r] for row in group] for group in groups]
            for r, name in enumerate(reward_names)
            if have_answers[r]
        },
        lengths_PG=_table(groups, "num_tokens", group_size).long(),
        truncated_PG=_table(groups, "is_truncated", group_size).bool(),
        columns={
            name: [example.get(name) for example in examples] for name in names if name != "prompt"
        },
    )


def _weighted_sum(scores_PGR: Tensor, weights: Sequence[float]) -> Tensor:
    total_PG = (scores_PGR * torch.tensor(weights, dtype=torch.float32)).nansum(dim=2)
    return total_PG.masked_fill(scores_PGR.isnan().all(dim=2), torch.nan)


def _table(groups: list[list[EvalRow]], name: str, group_size: int) -> Tensor:
    values = [[getattr(row, name) for row in group] for group in groups]
    return torch.tensor(values).view(len(groups), group_size)
