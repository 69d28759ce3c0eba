"""What one process collects on its way through an eval set."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from trl_grpo_ext.evaluation.groups import EvalRow
from trl_grpo_ext.rewards.completion import Completion


class EvalPass:
    """One pass over an eval set: the completions of this process, and sums over its batches.

    Batches are drawn in the order of the dataset, and those of all processes stand one after the
    other, so that a completion's place follows from how many came before. Where the set does not
    divide, the last batch is filled up with prompts that were there before: their places lie
    beyond the last prompt, and they count nowhere.

    Args:
        num_prompts: Of the eval set.
        group_size: Completions a prompt.
        process_index: Of this process.
        num_processes: Of the run.

    Attributes:
        rows: Completions of this process.
        num_tokens: Tokens that count in each batch, over all processes.
        loss_sum: Of the losses of this process, each times its weight.
    """

    def __init__(
        self, *, num_prompts: int, group_size: int, process_index: int, num_processes: int
    ) -> None:
        self.num_prompts, self.group_size = num_prompts, group_size
        self._process_index, self._num_processes = process_index, num_processes
        self._num_started = 0
        self._places = range(0)
        self._lengths: list[int] = []
        self._truncated: list[bool] = []
        self.rows: list[EvalRow] = []
        self.num_tokens: list[float] = []
        self.loss_sum = 0.0

    @property
    def num_completions(self) -> int:
        """Of all processes so far, each prompt counted once."""
        return min(self._num_started, self.num_prompts * self.group_size)

    def begin_batch(self, num_local: int) -> None:
        """Give the next completions of this process their places."""
        start = self._num_started + self._process_index * num_local
        self._places = range(start, start + num_local)
        self._num_started += self._num_processes * num_local

    @property
    def counts(self) -> list[bool]:
        """Whether each completion of this process's batch is of a prompt that was not there."""
        return [place < self.num_prompts * self.group_size for place in self._places]

    def set_lengths(self, lengths: list[int], truncated: list[bool]) -> None:
        """Take the tokens of each completion of the batch, and whether it lacked room."""
        self._lengths, self._truncated = lengths, truncated

    def add_scored(
        self,
        examples: Sequence[Mapping[str, Any]],
        completions: Sequence[Completion],
        scores: Sequence[Sequence[float]],
        answers: Sequence[Sequence[Hashable]],
    ) -> None:
        """Take the completions of the batch with their scores, one row each."""
        for i, place in enumerate(self._places):
            self.rows.append(
                EvalRow(
                    place=place,
                    example=dict(examples[i]) if place % self.group_size == 0 else None,
                    completion=completions[i],
                    scores=scores[i],
                    answers=answers[i],
                    num_tokens=self._lengths[i],
                    is_truncated=self._truncated[i],
                )
            )
