"""What the report says first: accuracy before and after, how sure it is, how it was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

WILSON_Z = 1.959964  # [standard deviations] two-sided 95%


def wilson_interval(share: float, *, num_trials: int) -> tuple[float, float]:
    r"""Return the 95% confidence interval of a share, sound also near 0 and 1.

    .. math:: \frac{p + z^2/2n \pm z \sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}

    Args:
        share: ``p``, from 0 to 1.
        num_trials: ``n``, at least 1.

    Returns:
        The lower and the upper end, from 0 to 1.

    References:
        Wilson 1927, Probable inference, J. Am. Stat. Assoc. 22, 209-212.

    Example:
        >>> low, high = wilson_interval(0.5, num_trials=64)
        >>> f"{low:.3f} {high:.3f}"
        '0.381 0.619'
    """
    z2 = WILSON_Z**2 / num_trials
    spread = WILSON_Z * math.sqrt(share * (1 - share) / num_trials + z2 / (4 * num_trials))
    low, high = ((share + z2 / 2 + sign * spread) / (1 + z2) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def headline(summary: Mapping[str, object], *, settings: Mapping[str, object]) -> str:
    """Return accuracy before and after, with intervals if it is known how many prompts there were.

    The intervals count each prompt once. With several replies to a prompt that is on the safe side:
    the mean over them varies no more than a single reply does.
    """
    after = summary.get("accuracy_after")
    if not isinstance(after, int | float):
        return ""
    before, num_prompts = summary.get("accuracy_before"), _count(summary, "num_eval_prompts")
    arrow = _accuracy(after, num_prompts)
    if isinstance(before, int | float):
        arrow = f"{_accuracy(before, num_prompts)} → {arrow}"
    prompts = "held-out prompts"
    if num_prompts:
        prompts = f"{num_prompts} held-out prompts (in brackets: Wilson's 95% intervals)"
    how = _how_measured(_count({**settings, **summary}, "eval_samples"), num_prompts=num_prompts)
    return f"**Accuracy: {arrow}** on {prompts}. {how}".rstrip()


def _count(values: Mapping[str, object], key: str) -> int | None:
    value = values.get(key)
    return value if isinstance(value, int) else None


def _accuracy(accuracy: float, num_prompts: int | None) -> str:
    if not num_prompts:
        return f"{accuracy:.1%}"
    low, high = wilson_interval(accuracy, num_trials=num_prompts)
    return f"{accuracy:.1%} ({low:.1%} to {high:.1%})"


def _how_measured(num_samples: int | None, *, num_prompts: int | None) -> str:
    if num_samples is None:
        return ""
    if num_samples == 0:
        return "It was measured on the greedy reply to each prompt."
    sampled = "to each prompt, sampled at the training temperature."
    if num_samples == 1:
        return f"It was measured on one reply {sampled}"
    mean = f"It is the mean over {num_samples} replies {sampled}"
    if not num_prompts:
        return mean
    return f"{mean} The intervals count each prompt once: they are too wide rather than too narrow."
