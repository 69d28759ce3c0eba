"""What was sampled for a prompt: the replies, what the rewards said, and what shows in no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl_grpo_ext.rewards.scores import Score

_REWARD_DIGITS = 6  # rewards that differ by less are the same


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A reply, and what is known of it.

    Attributes:
        index: Its place among those of its prompt, from 0.
        text: Without special tokens.
        num_tokens: That were sampled, with the one that ended it.
        finished: Whether it ended by itself, and was not cut off.
        special_tokens: Names of special tokens within it.
        scores: By the name of the reward, in the order of the YAML; ``None`` where there is none.
        scored: Whether no reward that excludes what it could not score is missing.
    """

    index: int
    text: str
    num_tokens: int
    finished: bool = True
    special_tokens: Sequence[str] = ()
    scores: Mapping[str, Score] = field(default_factory=dict)
    scored: bool = True

    def is_right(self, threshold: float) -> bool | None:
        """Return whether the first reward is at least the threshold; ``None`` without a score.

        Example:
            >>> Candidate(index=0, text="7", num_tokens=2, scores={"math": 1.0}).is_right(0.5)
            True
        """
        first = next(iter(self.scores.values()), None)
        return first >= threshold if self.scored and first is not None else None

    def reward(self, weights: Mapping[str, float]) -> float:
        """Return the weighted sum of the scores, rounded to a millionth; a missing one adds 0.

        Args:
            weights: By the name of the reward.

        Example:
            >>> scores = {"math": 1.0, "format": 0.5, "judge": None}
            >>> one = Candidate(index=0, text="7", num_tokens=2, scores=scores)
            >>> one.reward({"math": 1.0, "format": 0.5, "judge": 2.0})
            1.25
        """
        known = {name: score for name, score in self.scores.items() if score is not None}
        return round(sum(weights[name] * score for name, score in known.items()), _REWARD_DIGITS)


@dataclass(frozen=True, kw_only=True)
class Group:
    """All candidates of a prompt.

    Attributes:
        prompt_index: Number of the prompt in the task, on which its random numbers depend.
        prompt_id: Stands for the row of the task, whatever its number.
        prompt: Messages.
        candidates: By their index.
        answer: The gold answer, where the task has one.
    """

    prompt_index: int
    prompt_id: str
    prompt: Sequence[Mapping[str, Any]]
    candidates: Sequence[Candidate]
    answer: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return one value a prompt, or a list with one a candidate: a row as ``score`` reads it.

        Example:
            >>> one = Candidate(index=0, text="7", num_tokens=2, scores={"math": 1.0})
            >>> group = Group(prompt_index=4, prompt_id="a", prompt=[], candidates=[one])
            >>> Group.from_json(group.to_json()) == group
            True
        """
        names = list(self.candidates[0].scores) if self.candidates else []
        return {
            "prompt_index": self.prompt_index,
            "prompt_id": self.prompt_id,
            "prompt": self.prompt,
            "answer": self.answer,
            "completions": [one.text for one in self.candidates],
            "num_tokens": [one.num_tokens for one in self.candidates],
            "finished": [one.finished for one in self.candidates],
            "special_tokens": [list(one.special_tokens) for one in self.candidates],
            "scored": [one.scored for one in self.candidates],
            "scores": {name: [one.scores[name] for one in self.candidates] for name in names},
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Group:
        """Return what :meth:`to_json` was made from."""
        return cls(
            prompt_index=row["prompt_index"],
            prompt_id=row["prompt_id"],
            prompt=row["prompt"],
            answer=row["answer"],
            candidates=[
                Candidate(
                    index=index,
                    text=text,
                    num_tokens=row["num_tokens"][index],
                    finished=row["finished"][index],
                    special_tokens=tuple(row["special_tokens"][index]),
                    scored=row["scored"][index],
                    scores={name: scores[index] for name, scores in row["scores"].items()},
                )
                for index, text in enumerate(row["completions"])
            ],
        )
