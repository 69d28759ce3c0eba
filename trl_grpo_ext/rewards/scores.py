"""Checking what a reward function returned, before it trains a model."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

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
    if isinstance(values, str | bytes) or not (
        hasattr(values, "__len__") and hasattr(values, "__iter__")
    ):
        raise RewardError(
            f"The reward function '{name}' returned {_shown(values)}, not a list. "
            "Return one number (or None for 'could not be scored') for "
            f"each of the {num_completions} completions."
        )
    listed = list(values)
    if len(listed) != num_completions:
        raise RewardError(
            f"The reward function '{name}' returned {len(listed)} rewards, "
            f"but {num_completions} were expected: one for each completion, in their order; "
            "None for one that could not be scored."
        )
    scores = [_number(value, name=name, index=index) for index, value in enumerate(listed)]
    finite = [score if score is not None and math.isfinite(score) else None for score in scores]
    return finite, sum(score is not None and not math.isfinite(score) for score in scores)


def checking(reward_func: Callable[..., Any], *, name: str) -> Callable[..., Any]:
    """Return the reward function with its scores checked, for a trainer to call.

    Non-finite scores become ``None`` and are counted in the metric ``rewards/<name>/non_finite``,
    through the ``log_metric`` that TRL passes to reward functions. An asynchronous function stays
    asynchronous.

    Raises:
        RewardError: from the returned function, as :func:`checked_scores`.
    """

    def finish(
        values: object, prompts: Sequence[object], log_metric: Callable[[str, float], None]
    ) -> list[Score]:
        scores, num_bad = checked_scores(values, name=name, num_completions=len(prompts))
        if num_bad:
            log_metric(f"rewards/{name}/non_finite", float(num_bad))
        return scores

    if inspect.iscoroutinefunction(reward_func) or inspect.iscoroutinefunction(
        type(reward_func).__call__
    ):

        async def checked_async(
            *, prompts: Sequence[object], log_metric: Any, **kwargs: Any
        ) -> list[Score]:
            values = await reward_func(prompts=prompts, log_metric=log_metric, **kwargs)
            return finish(values, prompts, log_metric)

        return checked_async

    @functools.wraps(reward_func, updated=())
    def checked(*, prompts: Sequence[object], log_metric: Any, **kwargs: Any) -> list[Score]:
        values = reward_func(prompts=prompts, log_metric=log_metric, **kwargs)
        return finish(values, prompts, log_metric)

    return checked


def _number(value: object, *, name: str, index: int) -> Score:
    if value is None:
        return None
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise RewardError(
            f"The reward function '{name}' returned {_shown(value)} for completion {index}, which "
            "is not a number. Return a float, or None for a completion that could not be scored."
        ) from None


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"
