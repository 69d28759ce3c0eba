"""The reward for replies that keep to an asked format."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.completion import Completion, completion_text


class FormatReward:
    r"""Return 1.0 for each reply that matches a regular expression as a whole, else 0.0.

    White space around the reply is ignored. The pattern is Python's; ``(?s)`` at its start lets a
    dot match line breaks too.

    Args:
        pattern: The regular expression.
        max_characters: Longer replies are 0.0 without a look, as a pattern with repetitions next
            to or inside each other takes time that grows with a power of the length, or worse.
        log_as: The name under which the trainer logs this reward.

    Raises:
        ConfigurationError: The pattern is not a regular expression, or ``max_characters`` is
            below 1.

    Example:
        >>> reward = FormatReward(pattern=r"The answer is -?\d+\.")
        >>> reward(completions=["The answer is 7.", "7"])
        [1.0, 0.0]
    """

    def __init__(
        self, *, pattern: str, max_characters: int = 50_000, log_as: str = "format"
    ) -> None:
        if max_characters < 1:
            raise ConfigurationError([_too_few_characters(log_as, max_characters)])
        self.pattern = _compiled(pattern, name=log_as)
        self.max_characters = max_characters
        self.__name__ = log_as

    def __call__(
        self, *, completions: Sequence[Completion], **columns: object
    ) -> list[float | None]:
        """Return one reward a completion; called by TRL with lists of equal length."""
        return [self._score(completion_text(completion)) for completion in completions]

    def _score(self, reply: str) -> float:
        text = reply.strip()
        matches = len(text) <= self.max_characters and self.pattern.fullmatch(text)
        return 1.0 if matches else 0.0


def _compiled(pattern: str, *, name: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, TypeError) as error:
        raise ConfigurationError(
            [
                f"reward '{name}' has `pattern`={pattern!r}, which is not a regular expression "
                f"({error}), so no reply can be checked. Correct `pattern` in the `arguments` of "
                "this reward; a literal bracket or dot needs a backslash."
            ]
        ) from error


def _too_few_characters(name: str, max_characters: int) -> str:
    return (
        f"reward '{name}' has `max_characters`={max_characters}, so every reply would be too long "
        "and score 0. Set `max_characters` in the `arguments` of this reward to at least 1."
    )
