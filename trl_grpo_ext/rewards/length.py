"""The reward for replies of the right length: a penalty that sets in softly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

from trl_grpo_ext.errors import ConfigurationError, RewardError
from trl_grpo_ext.rewards.completion import Completion, completion_text

LengthUnit = Literal["tokens", "characters"]


def length_penalty(length: int, *, max_length: int, buffer: int, min_length: int = 0) -> float:
    """Return 0 for a length in the wanted window, and down to -1 for one outside it.

    The soft overlong punishment of DAPO: 0 up to ``max_length - buffer``, from there linear to -1
    at ``max_length``, and -1 beyond. Below ``min_length`` it is linear too, to -1 at length 0.

    Args:
        length: At least 0.
        max_length: The length from which on the penalty is -1, at least 1.
        buffer: How far before that it sets in, from 1 to ``max_length``.
        min_length: The shortest length without a penalty, from 0 to ``max_length - buffer``.

    References:
        DAPO, equation 13, arXiv:2503.14476.

    Example:
        >>> [length_penalty(n, max_length=100, buffer=20) for n in (80, 85, 100, 101)]
        [0.0, -0.25, -1.0, -1.0]
        >>> length_penalty(6, max_length=100, buffer=20, min_length=8)
        -0.25
    """
    if length < min_length:
        return length / min_length - 1.0
    excess = length - (max_length - buffer)
    return max(-1.0, -excess / buffer) if excess > 0 else 0.0


class LengthReward:
    """Return from -1.0 to 0.0 for each reply, by :func:`length_penalty` of its length.

    Tokens are those that were sampled, with the end-of-text token, as TRL passes them in
    ``completion_ids``; so a reply that was cut off at `max_completion_length` has exactly that
    length. Characters are those of the reply's text.

    Args:
        max_length: The length from which on the penalty is -1, at least 1; in tokens, such as
            `max_completion_length`.
        buffer: How far before that it sets in, from 1 to ``max_length``.
        min_length: The shortest length without a penalty, from 0 to ``max_length - buffer``.
        unit: ``"tokens"`` or ``"characters"``.
        log_as: The name under which the trainer logs this reward.

    Raises:
        ConfigurationError: An argument is outside its range.

    Example:
        >>> reward = LengthReward(max_length=10, buffer=4, unit="characters")
        >>> reward(completions=["short", "12345678", "far too long"])
        [0.0, -0.5, -1.0]
    """

    def __init__(
        self,
        *,
        max_length: int,
        buffer: int,
        min_length: int = 0,
        unit: LengthUnit = "tokens",
        log_as: str = "length",
    ) -> None:
        if problems := list(_problems(log_as, max_length, buffer, min_length, unit)):
            raise ConfigurationError(problems)
        self.window = {"max_length": max_length, "buffer": buffer, "min_length": min_length}
        self.unit = unit
        self.__name__ = log_as

    def __call__(
        self,
        *,
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: object,
    ) -> list[float | None]:
        """Return one reward a completion; called by TRL with lists of equal length.

        Raises:
            RewardError: tokens are to be counted, and there are no ``completion_ids``.
        """
        counted: Sequence[Sequence[object]]
        if self.unit == "characters":
            counted = [completion_text(completion) for completion in completions]
        elif completion_ids is not None:
            counted = completion_ids
        else:
            raise RewardError(_no_tokens(self.__name__))
        return [length_penalty(len(units), **self.window) for units in counted]


def _problems(
    name: str, max_length: int, buffer: int, min_length: int, unit: object
) -> Iterator[str]:
    if unit not in get_args(LengthUnit):
        yield (
            f"reward '{name}' has `unit`={unit!r}, so it is open what to count. Set `unit` in the "
            "`arguments` of this reward to 'tokens' or 'characters'."
        )
    if max_length < 1:
        yield (
            f"reward '{name}' has `max_length`={max_length}, so every reply would be too long. "
            "Set `max_length` in the `arguments` of this reward to at least 1."
        )
    elif not 1 <= buffer <= max_length:
        yield (
            f"reward '{name}' has `buffer`={buffer} and `max_length`={max_length}, so the penalty "
            "has no range to grow in. Set `buffer` in the `arguments` of this reward to 1 to "
            f"{max_length}."
        )
    elif not 0 <= min_length <= max_length - buffer:
        yield (
            f"reward '{name}' has `min_length`={min_length}, but lengths above "
            f"{max_length - buffer} (`max_length` - `buffer`) are penalized, so no length would be "
            "right. Set `min_length` in the `arguments` of this reward to 0 to "
            f"{max_length - buffer}."
        )


def _no_tokens(name: str) -> str:
    return (
        f"reward '{name}' got no `completion_ids`, so it cannot count tokens. Pass the token "
        "ids of the completions (`trl-grpo-ext score` takes a `--tokenizer`), or set "
        "`unit: characters` in the `arguments` of this reward."
    )
