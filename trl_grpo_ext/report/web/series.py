"""The numbers behind the curves; pure functions of a history.

S: logged steps.
"""

from __future__ import annotations

import math

import numpy as np

from trl_grpo_ext.report.accuracy import wilson_interval
from trl_grpo_ext.report.history import Floats, History
from trl_grpo_ext.report.plots import PHASES

MAX_POINTS = 600  # of a curve: about one a pixel
MIN_SMOOTHED = 24  # logs; a shorter curve is shown as it is
NUM_WINDOWS = 12  # of the running mean, over a curve

Band = tuple[Floats, Floats]


def standard_error_band(mean_S: Floats, std_S: Floats, *, num_prompts: int) -> Band:
    r"""Return mean :math:`\pm` std / sqrt(prompts): how sure the mean of a generation is.

    Each prompt counts once, as if its completions were copies of each other. They are not, so the
    band is too wide rather than too narrow.

    Example:
        >>> low, high = standard_error_band(np.array([1.0]), np.array([0.4]), num_prompts=4)
        >>> float(low[0]), float(high[0])
        (0.8, 1.2)
    """
    error_S = std_S / math.sqrt(num_prompts)
    return mean_S - error_S, mean_S + error_S


def wilson_band(share_S: Floats, num_trials_S: Floats) -> Band:
    """Return Wilson's 95% interval of each share; NaN where share or number is."""
    ends = [
        wilson_interval(min(max(share, 0.0), 1.0), num_trials=round(trials))
        if math.isfinite(share) and trials >= 1
        else (math.nan, math.nan)
        for share, trials in zip(share_S, num_trials_S, strict=True)
    ]
    low_S, high_S = np.array(ends, dtype=float).reshape(-1, 2).T
    return low_S, high_S


def running_mean(values_S: Floats, *, window: int) -> Floats:
    """Return the mean of the ``window`` logs around each one, of those there are; NaN for none.

    Args:
        values_S: With NaN where nothing was logged.
        window: An odd number.

    Example:
        >>> running_mean(np.array([0.0, 3.0, 6.0, math.nan]), window=3).tolist()
        [1.5, 3.0, 4.5, 6.0]
    """
    kernel = np.ones(window)
    is_there_S = np.isfinite(values_S)
    totals_S = np.convolve(np.where(is_there_S, values_S, 0.0), kernel, mode="full")
    counts_S = np.convolve(is_there_S.astype(float), kernel, mode="full")
    middle = slice(window // 2, window // 2 + len(values_S))
    with np.errstate(invalid="ignore", divide="ignore"):
        return totals_S[middle] / np.round(counts_S[middle])


def smoothing_window(values_S: Floats) -> int:
    """Return the odd width of the running mean of a curve; 1 for one that is short or smooth.

    Example:
        >>> rough = np.tile([0.0, 1.0], 24)
        >>> smoothing_window(rough), smoothing_window(rough[:10]), smoothing_window(np.arange(48.0))
        (5, 1, 1)
    """
    logged = values_S[np.isfinite(values_S)]
    moves = np.diff(logged)
    num_turns = int(np.sum(moves[1:] * moves[:-1] < 0))
    if len(logged) < MIN_SMOOTHED or num_turns < len(logged) / 8:
        return 1
    return 2 * (len(logged) // (2 * NUM_WINDOWS)) + 1


def kept_points(values_S: Floats, *, most: int = MAX_POINTS) -> list[int]:
    """Return the indices to draw: all, or first, least, greatest and last of equal stretches.

    Args:
        values_S: Of the curve; NaN is never the least or the greatest.
        most: About so many; no peak is lost.

    Example:
        >>> kept_points(np.array([0.0, 1, 9, 1, 1, 0, -9, 0]), most=4)
        [0, 2, 3, 4, 6, 7]
    """
    if len(values_S) <= most:
        return list(range(len(values_S)))
    kept: set[int] = set()
    for stretch in np.array_split(np.arange(len(values_S)), max(most // 4, 2)):
        kept |= {int(stretch[0]), int(stretch[-1])}
        logged = stretch[np.isfinite(values_S[stretch])]
        if len(logged):
            part = values_S[logged]
            kept |= {int(logged[part.argmin()]), int(logged[part.argmax()])}
    return sorted(kept)


def tokens_per_second(history: History) -> tuple[Floats, Floats]:
    """Return steps, and tokens trained on a second of ``step_time``: prompts and completions.

    A log stands for the steps since the one before; the first, for those from 0.
    """
    steps_S, (num_tokens_S, step_time_S) = history.columns("num_tokens", "step_time")
    there_S = np.isfinite(num_tokens_S) & np.isfinite(step_time_S) & (step_time_S > 0)
    steps_S, num_tokens_S, step_time_S = (
        values[there_S] for values in (steps_S, num_tokens_S, step_time_S)
    )
    seconds_S = np.diff(steps_S, prepend=0.0) * step_time_S
    with np.errstate(invalid="ignore", divide="ignore"):
        return steps_S, np.diff(num_tokens_S, prepend=0.0) / seconds_S


def phase_times(history: History) -> tuple[Floats, dict[str, Floats]]:
    """Return steps, and the seconds of each phase of a step, by name; without empty phases.

    ``other`` is what ``step_time`` has beyond the phases.
    """
    metrics = [metric for _, metric, _ in PHASES]
    steps_S, (total_S, *phases) = history.columns("step_time", *metrics)
    seconds = [np.nan_to_num(phase) for phase in phases]
    times = {label: times_S for (label, _, _), times_S in zip(PHASES, seconds, strict=True)}
    times["other"] = np.clip(np.nan_to_num(total_S) - np.sum(seconds, axis=0), 0, None)
    return steps_S, {label: times_S for label, times_S in times.items() if times_S.any()}


def ends(history: History, metric: str) -> tuple[float, float, int] | None:
    """Return the mean of the first and of the last few logs, and of how many; ``None`` for none.

    Example:
        >>> history = History({"reward": {1: 0.0, 2: 1.0, 3: 4.0, 4: 6.0}})
        >>> ends(history, "reward")
        (0.5, 5.0, 2)
    """
    values = history.logged(metric)
    if not values:
        return None
    window = max(1, min(5, len(values) // 2))
    return float(np.mean(values[:window])), float(np.mean(values[-window:])), window
