"""Checking what a reward function returned, before it trains a model."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from trl_grpo_ext.errors import RewardError

Score = float | None


def checked_scores(values: object, *, name: str, num_completions: int) -> tuple[list[Score], int]:
    """Return the scores as floats, ``None`` for each NaN or infinity, and the number of these.

    Args:
        values: What the reward function returned: one number or ``None`` a completion. Booleans,
            NumPy scalars and zero-dimensional tensors count as numbers.
        name: Of the reward function, for the error message.
        num_completions: How many scores are expected.

    Returns:
        The scores, and the number of non-finite ones. ``None`` means that the completion could not
        be scored.

    Raises:
        RewardError: not a sequence, of another length, or with something else than a number in it.

    Example:
        >>> checked_scores([1, None, float("nan")], name="mine", num_completions=3)
        ([1.0, None, None], 1)
    """
    try:
        listed = None if isinstance(values, str | bytes) else list(cast(Any, values))
    except TypeError:  # a number, a coroutine, a tensor without dimensions
        listed = None
    if listed is None:
        raise RewardError(
            f"The reward function '{name}' returned {_shown(values)}, not a list. "
            "Return one number (or None for 'could not be scored') for "
            f"each of the {num_completions} completions."
        )
    if len(listed) != num_completions:
        raise RewardError(
            f"The reward function '{name}' returned {len(listed)} rewards, "
            f"but {num_completions} were expected: one for each completion, in their order; "
            "None for one that could not be scored."
        )
    scores = [_number(value, name=name, index=index) for index, value in enumerate(listed)]
    finite = [score if score is not None and math.isfinite(score) else None for score in scores]
    return finite, sum(score is not None and not math.isfinite(score) for score in scores)


def checking(
    reward_func: Callable[..., Any], *, name: str, count_non_finite: Callable[[int], None]
) -> Callable[..., Any]:
    """Return the reward function with its scores checked, for a trainer to call.

    Scores that are NaN or infinite become ``None``. An asynchronous function stays asynchronous.

    Args:
        reward_func: A TRL reward function.
        name: Under which it is logged.
        count_non_finite: Called after each call with the number of scores that were not finite.

    Raises:
        RewardError: from the returned function, as :func:`checked_scores`.
    """

    def finish(values: object, prompts: Sequence[object]) -> list[Score]:
        scores, num_bad = checked_scores(values, name=name, num_completions=len(prompts))
        count_non_finite(num_bad)
        return scores

    if is_asynchronous(reward_func):

        async def checked_async(*, prompts: Sequence[object], **kwargs: Any) -> list[Score]:
            return finish(await reward_func(prompts=prompts, **kwargs), prompts)

        return checked_async

    def checked(*, prompts: Sequence[object], **kwargs: Any) -> list[Score]:
        return finish(reward_func(prompts=prompts, **kwargs), prompts)

    return checked


def is_asynchronous(reward_func: Callable[..., Any]) -> bool:
    """Return whether calling the function gives something to await.

    Looks through ``functools.partial`` and at the ``__call__`` of an object, as TRL does.
    """
    while isinstance(reward_func, functools.partial):
        reward_func = reward_func.func
    return inspect.iscoroutinefunction(reward_func) or inspect.iscoroutinefunction(
        type(reward_func).__call__
    )


def _number(value: object, *, name: str, index: int) -> Score:
    if value is None:
        return None
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer beyond every float
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        raise RewardError(
            f"The reward function '{name}' returned {_shown(value)} for completion {index}, which "
            "is not a number. Return a float, or None for a completion that could not be scored."
        ) from None


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"
