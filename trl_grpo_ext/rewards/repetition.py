"""The reward against replies that say the same again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.base import TextReward

RepetitionUnit = Literal["words", "characters"]


def repeated_share(units: Sequence[str], *, ngram_size: int) -> float:
    """Return the share of n-grams that repeat an earlier one: ``(total - distinct) / total``.

    Args:
        units: Words, or a text, whose units are its characters.
        ngram_size: Units an n-gram, at least 1; the time is linear in it and in the units.

    Returns:
        From 0 to below 1; 0 if there are too few units for one n-gram.

    Example:
        >>> repeated_share("to be or not to be".split(), ngram_size=2)  # 5 pairs, "to be" twice
        0.2
        >>> repeated_share("abab", ngram_size=5)
        0.0
    """
    total = len(units) - ngram_size + 1
    if total < 1:
        return 0.0
    distinct = {tuple(units[at : at + ngram_size]) for at in range(total)}
    return (total - len(distinct)) / total


class RepetitionReward(TextReward):
    """Return from ``max_penalty`` to 0.0 for each reply, by the share of repeated n-grams.

    Words are what white space separates, in any script, whatever their case. Scripts that are
    written without spaces (Chinese, Japanese, Thai) need ``unit="characters"``: a whole sentence
    would be one word. White space is no character there.

    Args:
        ngram_size: Units an n-gram, at least 1.
        max_penalty: The reward of a reply in which every n-gram is a repetition, at most 0.
        unit: ``"words"`` or ``"characters"``.
        log_as: The name under which the trainer logs this reward.

    Raises:
        ConfigurationError: An argument is outside its range.

    References:
        The repetition penalty of open-r1, from appendix C.2 of "Demystifying Long Chain-of-Thought
        Reasoning in LLMs", arXiv:2502.03373.

    Example:
        >>> reward = RepetitionReward(ngram_size=1, max_penalty=-2.0)
        >>> reward(completions=["yes yes Yes yes", "one two"])
        [-1.5, 0.0]
    """

    def __init__(
        self,
        *,
        ngram_size: int = 3,
        max_penalty: float = -1.0,
        unit: RepetitionUnit = "words",
        log_as: str = "repetition",
    ) -> None:
        if problems := list(_problems(log_as, ngram_size, max_penalty, unit)):
            raise ConfigurationError(problems)
        self.ngram_size, self.max_penalty, self.unit = ngram_size, max_penalty, unit
        self.__name__ = log_as

    def score(self, reply: str) -> float:
        """Return the reward of one reply."""
        words = reply.lower().split()
        units = words if self.unit == "words" else "".join(words)
        share = repeated_share(units, ngram_size=self.ngram_size)
        return share * self.max_penalty if share else 0.0


def _problems(name: str, ngram_size: int, max_penalty: float, unit: object) -> Iterator[str]:
    if ngram_size < 1:
        yield (
            f"reward '{name}' has `ngram_size`={ngram_size}, so there is nothing that could be "
            "repeated. Set `ngram_size` in the `arguments` of this reward to at least 1."
        )
    if not -float("inf") < max_penalty <= 0:
        yield (
            f"reward '{name}' has `max_penalty`={max_penalty}, so repetitions would be rewarded or "
            "replies not scored. Set `max_penalty` in the `arguments` of this reward to a number "
            "up to 0."
        )
    if unit not in get_args(RepetitionUnit):
        yield (
            f"reward '{name}' has `unit`={unit!r}, so it is open what is repeated. Set `unit` in "
            "the `arguments` of this reward to 'words' or 'characters'."
        )
