"""The reward for answers to reasoning-gym's tasks: what the task's own scorer says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec

import numpy as np

from trl_grpo_ext.errors import ConfigurationError, RewardError
from trl_grpo_ext.rewards.completion import Completion, completion_text
from trl_grpo_ext.rewards.gym_process import GymProcess, Verdict

COLUMN = "reasoning_gym"
_LITERALS = (bool, int, float, complex, str, bytes, type(None))
COUNTED: Mapping[str, str] = {  # verdict: metric
    "broken": "broken_rows_fraction",
    "refused": "refused_answers_fraction",
    "late": "timeouts_fraction",
    "died": "crashes_fraction",
}


def scorer_row(task: str, options: Mapping[str, object], item: Mapping[str, object]) -> str:
    """Return what the scorer of a generated question needs, as a Python literal.

    A literal keeps tuples and keys that are no strings, which JSON does not, and scorers need them.

    Args:
        task: Its name in reasoning-gym.
        options: With which the question was drawn; scorers read some of them.
        item: As reasoning-gym gives it.

    Example:
        >>> scorer_row("gcd", {"seed": 1, "size": 9}, {"question": "?", "answer": "7"})
        "{'task': 'gcd', 'options': {}, 'entry': {'question': '?', 'answer': '7'}}"
    """
    kept = {name: value for name, value in options.items() if name not in ("seed", "size")}
    return repr(_plain({"task": task, "options": kept, "entry": dict(item)}))


class ReasoningGymReward:
    r"""Return for each reply the score of its final answer by the task's own scorer.

    Many tasks give a little for a near miss or for any answer, see their ``score_answer``. A reply
    without an answer is 0.0. So is an answer that the scorer raises an error on, or is not done
    with in time, as long as it can score the gold answer: some tasks raise on "abc" where a number
    is asked for, and an answer such as ``9**9**9**9`` keeps others busy for good. Where it fails on
    the gold answer too, it could not be scored: ``None``.

    Scorers run in a process of their own, without the environment's variables, that is ended when
    it takes too long. The code in an answer is not run: see ``gym_scorer.py``.

    Args:
        answer_tag: The answer is in the last ``<answer>...</answer>`` after the thinking; ``None``
            takes the whole reply.
        answer_pattern: Or a regular expression; the answer is the first group of its last match.
        column: The dataset column with what the scorer needs; the data set
            ``reasoning_gym:TASK`` has it.
        time_limit_s: Seconds that scoring an answer may take, above 0.
        max_characters: Of a reply in which ``answer_pattern`` is searched; longer ones have no
            answer.
        log_as: The name under which the trainer logs this reward.

    Raises:
        ConfigurationError: reasoning-gym is not installed, or an argument cannot work.

    Example:
        >>> reward = ReasoningGymReward()
        >>> row = scorer_row("gcd", {}, {"question": "Of 14 and 21?", "answer": "7"})
        >>> reward(completions=["<answer>7</answer>", "It is 7."], reasoning_gym=[row, row])
        [1.0, 0.0]
    """

    def __init__(
        self,
        *,
        answer_tag: str | None = "answer",
        answer_pattern: str | None = None,
        column: str = COLUMN,
        time_limit_s: float = 5.0,
        max_characters: int = 50_000,
        log_as: str = "reasoning_gym",
    ) -> None:
        if problems := list(_problems(log_as, answer_pattern, time_limit_s)):
            raise ConfigurationError(problems)
        self.answer_tag = answer_tag
        self.pattern = None if answer_pattern is None else re.compile(answer_pattern)
        self.column, self.time_limit_s, self.max_characters = column, time_limit_s, max_characters
        self.required_columns = frozenset({column})
        self.__name__ = log_as
        self._process = GymProcess()

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
            log_metric: Given the shares of completions that no answer could be scored for
                (``broken_rows_fraction``), whose answer the scorer raised an error on, took too
                long for, or crashed on.
            columns: What the scorer needs is the one called ``column``.

        Raises:
            RewardError: there is no such column, or the process does not start.
        """
        rows = self._rows(columns)
        verdicts = [
            self._verdict(row, self.answer(completion_text(completion)))
            for row, completion in zip(rows, completions, strict=True)
        ]
        if log_metric:
            counts = Counter(str(verdict) for verdict in verdicts)
            for verdict, name in COUNTED.items():
                share = counts[verdict] / max(len(verdicts), 1)
                log_metric(f"rewards/{self.__name__}/{name}", share)
        return [_reward(verdict) for verdict in verdicts]

    def answer(self, text: str) -> str | None:
        """Return the final answer in the text of a reply; ``None`` if there is none.

        Example:
            >>> ReasoningGymReward().answer("<answer>6</answer> no, <answer> 7 </answer>")
            '7'
        """
        after_thought = text.rpartition("</think>")[2]
        if self.pattern is not None:
            return self._last_match(after_thought)
        if self.answer_tag is None:
            return after_thought.strip() or None
        opened, closing, _ = after_thought.rpartition(f"</{self.answer_tag}>")
        _, opening, answer = opened.rpartition(f"<{self.answer_tag}>")
        return answer.strip() or None if closing and opening else None

    def close(self) -> None:
        """End the process; a later call starts it again."""
        self._process.close()

    def _last_match(self, text: str) -> str | None:
        last = None
        if self.pattern is not None and len(text) <= self.max_characters:
            for match in self.pattern.finditer(text):
                last = match
        return ((last[1] or "").strip() or None) if last else None

    def _verdict(self, row: object, answer: str | None) -> Verdict:
        if not isinstance(row, str):
            return "broken"
        if answer is None:
            return 0.0
        verdict = self._process.ask(row, answer, limit_s=self.time_limit_s)
        if verdict in ("late", "died"):
            own = self._process.ask(row, None, limit_s=self.time_limit_s)
            return "broken" if isinstance(own, str) else verdict
        return verdict

    def _rows(self, columns: Mapping[str, object]) -> Sequence[object]:
        rows = columns.get(self.column)
        if isinstance(rows, Sequence):
            return rows
        raise RewardError(
            f"reward '{self.__name__}' got no column '{self.column}' (columns: "
            f"{', '.join(sorted(columns))}), so no answer can be scored. Set `dataset` to "
            "'reasoning_gym:TASK', or `column` in the `arguments` of this reward to the column "
            "that was saved from such a data set."
        )


def _reward(verdict: Verdict) -> float | None:
    if isinstance(verdict, str):
        return None if verdict == "broken" else 0.0
    return verdict


def _plain(value: object) -> object:
    """Return the value made of Python's own types, whose ``repr`` is a literal."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        kind = next(kind for kind in (list, tuple, set) if isinstance(value, kind))
        return kind(map(_plain, value))
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    return value if type(value) in _LITERALS else str(value)


def _problems(name: str, pattern: str | None, time_limit_s: float) -> Iterator[str]:
    if find_spec("reasoning_gym") is None:
        yield (
            f"reward '{name}' needs reasoning-gym, which is not installed, so no answer can be "
            "scored. Install it with pip install 'trl-grpo-ext[quickstart]'."
        )
    if not time_limit_s > 0:
        yield (
            f"reward '{name}' has `time_limit_s`={time_limit_s}, so no answer could be scored in "
            "time. Set `time_limit_s` in the `arguments` of this reward to some seconds."
        )
    if pattern is not None and (fault := _pattern_fault(pattern)):
        yield (
            f"reward '{name}' has `answer_pattern`={pattern!r}, which {fault}, so no answer can be "
            "found. Correct it in the `arguments` of this reward, such as 'Answer: (.+)'."
        )


def _pattern_fault(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, TypeError) as error:
        return f"is not a regular expression ({error})"
    return "" if groups else "has no group for the answer"
