"""The reward for replies whose final answer is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from importlib.util import find_spec

from trl_grpo_ext.errors import ConfigurationError, RewardError
from trl_grpo_ext.rewards.completion import Completion, completion_text
from trl_grpo_ext.rewards.math.answers import Answer, Number
from trl_grpo_ext.rewards.math.final_answer import read_gold, read_reply
from trl_grpo_ext.rewards.math.judge import Judge, Verdict
from trl_grpo_ext.rewards.math.vote import vote
from trl_grpo_ext.rewards.math.workers import WorkerPool

SCORES: Mapping[Verdict, float | None] = {"right": 1.0, "unparsable_gold": None}
COUNTED: tuple[Verdict, ...] = ("unparsable_gold", "timeouts", "crashes")


class MathReward:
    r"""Return 1.0 for each reply whose final answer equals the gold answer, else 0.0.

    A reply without exactly one answer is wrong: 0.0. So is one whose answer takes too long to
    compare. A gold answer that cannot be read cannot be compared with: ``None``, and TRL leaves the
    reward out. What is read as the final answer stands in ``docs/math_reward.md``.

    Numbers, words and groups of them are compared here. Expressions are compared by math-verify in
    worker processes, which start when they are first needed, and are ended when they take too long.

    Args:
        answer_column: The dataset column that holds the gold answers: numbers, answers in plain
            text or LaTeX, or solutions that end in ``#### answer`` or ``\boxed{answer}``.
        log_as: The name under which the trainer logs this reward.
        time_limit_s: Seconds that the comparison of one reply may take, above 0.
        num_workers: Worker processes of each process of the trainer, at least 1.
        starts_in_thought: Whether the chat template opens the thinking, so that a reply without
            ``</think>`` was cut off in it and has no answer.

    Raises:
        ConfigurationError: a limit is out of range, or math-verify is not installed.

    Example:
        >>> reward = MathReward()
        >>> reward(completions=[r"So \boxed{\frac{1}{2}}.", "0.5 or 2"], answer=["1/2", "1/2"])
        [1.0, 0.0]
    """

    def __init__(
        self,
        *,
        answer_column: str = "answer",
        log_as: str = "math",
        time_limit_s: float = 5.0,
        num_workers: int = 2,
        starts_in_thought: bool = False,
    ) -> None:
        problems = list(_problems(log_as, time_limit_s, num_workers))
        if problems:
            raise ConfigurationError(problems)
        self.answer_column = answer_column
        self.required_columns = frozenset({answer_column})
        self.starts_in_thought = starts_in_thought
        self.__name__ = log_as
        self._judge = Judge(WorkerPool(num_workers), time_limit_s=time_limit_s)

    def __call__(
        self,
        *,
        completions: Sequence[Completion],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: object,
    ) -> list[float | None]:
        """Return one reward a completion; called by TRL with lists of equal length.

        Args:
            completions: Texts, or lists of messages of which the last one is scored.
            log_metric: Given the shares of completions whose gold answer could not be read, whose
                comparison took too long, and whose comparison ended its process.
            columns: The gold answers are the one called ``answer_column``.

        Raises:
            RewardError: there is no such column, or the worker processes do not start.
        """
        golds = [_gold_answer(gold) for gold in self._answers(columns)]
        replies = [self._read(completion) for completion in completions]
        verdicts = self._judge.verdicts(list(zip(golds, replies, strict=True)))
        if log_metric:
            for name in COUNTED:
                share = verdicts.count(name) / max(len(verdicts), 1)
                log_metric(f"rewards/{self.__name__}/{name}_fraction", share)
        return [SCORES.get(verdict, 0.0) for verdict in verdicts]

    def answer(self, text: str) -> Hashable:
        r"""Return what votes in evaluation for the text of a reply; ``None`` if it has no answer.

        Equal numbers are one vote however they are written, and units are left out; expressions
        are compared as text only.

        Example:
            >>> reward = MathReward()
            >>> reward.answer(r"\boxed{\frac{1}{2}}") == reward.answer("The answer is 0.5 km.")
            True
        """
        found = read_reply(text, starts_in_thought=self.starts_in_thought)
        return None if found is None else vote(found)

    def close(self) -> None:
        """End the worker processes; a later call starts them again."""
        self._judge.close()

    def _read(self, completion: Completion) -> Answer | None:
        return read_reply(completion_text(completion), starts_in_thought=self.starts_in_thought)

    def _answers(self, columns: dict[str, object]) -> Sequence[object]:
        answers = columns.get(self.answer_column)
        if isinstance(answers, Sequence):
            return answers
        raise RewardError(
            f"reward '{self.__name__}' got no column '{self.answer_column}' (columns: "
            f"{', '.join(sorted(columns))}), so no reply can be checked. Set `answer_column` in "
            "the `arguments` of this reward to the column that holds the gold answer."
        )


def _gold_answer(gold: object) -> Answer | None:
    """Return the gold answer of a dataset, which is a text or a finite number."""
    if isinstance(gold, str):
        return read_gold(gold)
    if isinstance(gold, bool) or not isinstance(gold, int | float | Decimal):
        return None
    return Number(Fraction(str(gold))) if math.isfinite(gold) else None


def _problems(name: str, time_limit_s: float, num_workers: int) -> Iterator[str]:
    if find_spec("math_verify") is None:
        yield (
            f"reward '{name}' compares expressions with math-verify, which is not installed, so "
            "not every reply could be scored. Install it with pip install 'trl-grpo-ext[math]'."
        )
    if not time_limit_s > 0:
        yield (
            f"reward '{name}' has `time_limit_s`={time_limit_s}, so no expression could be "
            "compared. Set `time_limit_s` in the `arguments` of this reward to some seconds."
        )
    if num_workers < 1:
        yield (
            f"reward '{name}' has `num_workers`={num_workers}, so nobody would compare "
            "expressions. Set `num_workers` in the `arguments` of this reward to at least 1."
        )
