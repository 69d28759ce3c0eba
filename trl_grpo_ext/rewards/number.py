"""The reward for replies whose last number is the answer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal

from trl_grpo_ext.errors import ConfigurationError, RewardError
from trl_grpo_ext.rewards.completion import Completion, completion_text

MINUS = "-\N{MINUS SIGN}"

# Linear in the length of the text: a group of three digits that is not followed by another digit
# is given back at most once, and what has matched is never read again.
_NUMBER = re.compile(
    rf"""
    (?P<sign> (?<![{MINUS}\w)\]}}]) [{MINUS}] )?   # in "5-3", "(a)-3" and "--3" it is no sign
    [$€£]?
    (?P<magnitude>
        \d{{1,3}} (?: ,\d{{3}} )+ (?!\d) (?: \.\d+ )?   # 1,234,567.8
        | \d+ (?: \.\d+ )?                          # 1234567.8
        | (?<!\w) \.\d+                             # .8
    )
    """,
    re.VERBOSE,
)


def last_number(text: str) -> Decimal | None:
    """Return the last number that is written in the text, exactly.

    A number is made of decimal digits of any script, with an optional fraction after a full stop,
    commas between groups of three digits, a currency sign in front, and a minus (ASCII or U+2212)
    that touches it. A minus after a word, a digit or a closing bracket is a subtraction or a
    hyphen. Exponents and fractions are not read: "1e5" ends in 5 and "1/2" in 2.

    Args:
        text: Untrusted text of any length; the time is linear in it.

    Returns:
        The number, of any size; ``None`` if there is no digit in the text.

    Example:
        >>> last_number("7 - 12 = -5.")
        Decimal('-5')
        >>> last_number("She has 5-3 apples, so $1,234.50 it is.")
        Decimal('1234.50')
    """
    last = None
    for match in _NUMBER.finditer(text):
        last = match
    return _value(last) if last else None


class LastNumberReward:
    """Return 1.0 for each reply whose last number equals the gold answer, else 0.0.

    A reply without a number is a wrong answer: 0.0. A gold answer that is not a number cannot be
    compared with: ``None``, and TRL leaves the reward out.

    Args:
        answer_column: The dataset column that holds the gold answers, numbers or their text.
        log_as: The name under which the trainer logs this reward.

    Example:
        >>> reward = LastNumberReward()
        >>> reward(completions=["4 + 3 = 7", "4 + 3 = 8"], answer=["7", "7"])
        [1.0, 0.0]
    """

    answer = staticmethod(last_number)  # what votes in evaluation: majority vote at k

    def __init__(self, *, answer_column: str = "answer", log_as: str = "last_number") -> None:
        self.answer_column = answer_column
        self.required_columns = frozenset({answer_column})
        self.__name__ = log_as

    def __call__(
        self, *, completions: Sequence[Completion], **columns: object
    ) -> list[float | None]:
        """Return one reward a completion; called by TRL with lists of equal length."""
        answers = self._answers(columns)
        return [self._score(reply, gold) for reply, gold in zip(completions, answers, strict=True)]

    def _score(self, completion: Completion, gold: object) -> float | None:
        wanted = _gold_number(gold)
        if wanted is None:
            return None
        return 1.0 if last_number(completion_text(completion)) == wanted else 0.0

    def _answers(self, columns: dict[str, object]) -> Sequence[object]:
        answers = columns.get(self.answer_column)
        if isinstance(answers, Sequence):
            return answers
        raise RewardError(
            f"reward '{self.__name__}' got no column '{self.answer_column}' (columns: "
            f"{', '.join(sorted(columns))}), so no reply can be checked. Set `answer_column` in "
            "the `arguments` of this reward to the column that holds the gold answer."
        )


class NumberDistanceReward(LastNumberReward):
    """Return how near the last number of each reply is to the gold answer, from 0.0 to 1.0.

    The reward is ``1 - |number - answer| / span``, not below 0: a near miss earns something, so
    that a group in which nobody is right still has something to learn. Beside
    :class:`LastNumberReward`, not instead of it.

    Args:
        span: The distance at which the reward is 0, above 0, in the units of the answer.
        answer_column: As for :class:`LastNumberReward`.
        log_as: The name under which the trainer logs this reward.

    Raises:
        ConfigurationError: ``span`` is not above 0.

    Example:
        >>> reward = NumberDistanceReward(span=4)
        >>> reward(completions=["7", "6", "0", "none"], answer=["7", "7", "7", "7"])
        [1.0, 0.75, 0.0, 0.0]
    """

    def __init__(
        self, *, span: float, answer_column: str = "answer", log_as: str = "number_distance"
    ) -> None:
        super().__init__(answer_column=answer_column, log_as=log_as)
        if not span > 0:
            raise ConfigurationError(
                [
                    f"reward '{log_as}' has `span`={span}, so no number could be near. Set `span` "
                    "in the `arguments` of this reward to the distance that earns nothing."
                ]
            )
        self.span = Decimal(str(span))

    def _score(self, completion: Completion, gold: object) -> float | None:
        wanted, found = _gold_number(gold), last_number(completion_text(completion))
        if wanted is None:
            return None
        if found is None:
            return 0.0
        return max(0.0, 1.0 - float(abs(found - wanted) / self.span))


def _gold_number(gold: object) -> Decimal | None:
    """Return the gold answer as a number if it is one as a whole, not only ends in one."""
    if isinstance(gold, bool):
        return None
    if isinstance(gold, int):
        return Decimal(gold)
    if isinstance(gold, float):
        return Decimal(str(gold)) if math.isfinite(gold) else None
    match = _NUMBER.fullmatch(gold.strip()) if isinstance(gold, str) else None
    return _value(match) if match else None


def _value(match: re.Match[str]) -> Decimal:
    """Return the number of a match; unlike ``int``, ``Decimal`` reads any count of digits."""
    magnitude = Decimal(match["magnitude"].replace(",", ""))
    return magnitude.copy_negate() if match["sign"] else magnitude
