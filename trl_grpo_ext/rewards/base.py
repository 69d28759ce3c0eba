"""What several rewards share: scoring each text by itself, and giving back what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from trl_grpo_ext.rewards.completion import Completion, completion_text


class TextReward:
    """A TRL reward function that scores each reply by its text alone; it says how in ``score``."""

    def __call__(
        self, *, completions: Sequence[Completion], **columns: object
    ) -> list[float | None]:
        """Return one reward a completion; called by TRL with lists of equal length."""
        return [self.score(completion_text(completion)) for completion in completions]

    def score(self, reply: str) -> float:
        """Return the reward of one reply."""
        raise NotImplementedError


class Closing:
    """Something that holds processes, connections or memory until :meth:`close`, or ``with``."""

    def close(self) -> None:
        """Give back what it holds."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
