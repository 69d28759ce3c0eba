"""Signs in the log that a run cannot learn, each with its likely cause and what to do.

False alarms are worse than silence: thresholds are far outside of what runs show that learn. Those
of the quickstart (nine runs of SmolLM2-135M, 24 to 72 steps) had at most 7 logs in a row without an
informative group, single KLs of up to 24 nats a token but never a median of ten above 0.6, and an
entropy below 0.01 nats only with the reward at its best.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeGuard

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from trl_grpo_ext.metrics import HEALTHY_KL

logger = logging.get_logger(__name__)

LogHistory = Sequence[Mapping[str, Any]]

NUM_UNSCORED = 3  # [logs] without any score: an outage that outlasts retries
NUM_SILENT = 10  # [logs]
NUM_TRUNCATED = 5  # [logs]
NUM_KL = 10  # [logs]; the median, since single tokens make the mean of a step jump
NUM_COLLAPSED = 10  # [logs]
NUM_NON_FINITE = 5  # [logs]; float16 overflows in a few steps until its loss scale has settled

TRUNCATED = 0.95  # [share of completions]
KL_FACTOR = 10  # times the floor of a quantized reference
COLLAPSED_ENTROPY = 0.01  # [nats a token]: the likeliest token has more than 99.8 %
NEAR_BEST = 0.1  # of the range that the reward has gone through


def diagnose(history: LogHistory) -> dict[str, str]:
    """Return a warning for each reason why the run cannot learn; empty for a healthy one.

    Args:
        history: ``trainer.state.log_history``, evaluations included. Only the last logs count, but
            for whether the reward is at its best and for the floor of the reference.

    Returns:
        By cause: ``unscored``, ``constant``, ``silent``, ``truncated``, ``kl``, ``collapsed``,
        ``non_finite``.

    Example:
        >>> diagnose([{"completions/clipped_ratio": 1.0, "reward": i} for i in range(5)]).keys()
        dict_keys(['truncated'])
        >>> diagnose([{"completions/clipped_ratio": 0.1, "reward": i} for i in range(5)])
        {}
    """
    rewards = (_unscored, _constant, _silent)  # each is a case of the next one
    found = [next(filter(None, (check(history) for check in rewards)), None)]
    found += [check(history) for check in (_truncated, _kl, _collapsed, _non_finite)]
    return dict(filter(None, found))


class HealthCallback(TrainerCallback):
    """Logs what :func:`diagnose` finds, each cause once until it was gone for some logs."""

    def __init__(self, warn: Callable[[str], object] | None = None) -> None:
        self._warn = warn or _warn_above_bars
        self._gone_for: dict[str, int] = {}

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the history, and warn of what is new in it."""
        if not state.is_world_process_zero:
            return
        found = diagnose(state.log_history)
        for cause in [cause for cause in self._gone_for if cause not in found]:
            self._gone_for[cause] += 1
            if self._gone_for[cause] > NUM_SILENT:
                del self._gone_for[cause]
        for cause, message in found.items():
            if cause not in self._gone_for:
                self._warn(f"step {state.global_step}: {message}")
            self._gone_for[cause] = 0


Finding = tuple[str, str] | None


def _unscored(history: LogHistory) -> Finding:
    rewards = _last(history, "reward", NUM_UNSCORED)
    if not rewards or any(map(_is_number, rewards)):
        return None
    return "unscored", (
        f"No completion got a reward in the last {NUM_UNSCORED} logs, so nothing is learned. "
        "Every reward function returned None, NaN or infinity for each of them: a service that is "
        "down, or a bug. Call your reward functions on a completion of `log_completions`, and look "
        "at rewards/<name>/non_finite and, of a service, at rewards/<name>/unscored_fraction."
    )


def _constant(history: LogHistory) -> Finding:
    rewards = _numbers(history, "reward", NUM_SILENT)
    spreads = _numbers(history, "reward_std", NUM_SILENT)
    same = bool(rewards) and max(rewards) - min(rewards) <= 1e-6 * max(map(abs, rewards))
    if not (same and spreads and max(spreads) <= 1e-6) or _at_best(history):
        return None
    return "constant", (
        f"Every completion of the last {NUM_SILENT} logs got the same reward, {rewards[0]:g}, so "
        "none is better than another and nothing is learned. Likely the reward never sees what it "
        "looks for (format, column of the answer), or the task is far too hard or too easy. "
        "Read some completions (`log_completions: true`), use a reward that gives part of the "
        "points, or choose other prompts."
    )


def _silent(history: LogHistory) -> Finding:
    shares = _numbers(history, "frac_reward_zero_std", NUM_SILENT)
    if not shares or min(shares) < 1 or _at_best(history):
        return None
    rewards = _numbers(history, "reward", NUM_SILENT)
    mean = f" (mean reward {statistics.fmean(rewards):.3g})" if rewards else ""
    return "silent", (
        f"All groups of the last {NUM_SILENT} logs were silent: within each, every completion got "
        f"the same reward{mean}, so nothing is learned. Likely each prompt is either too easy or "
        "too hard, or completions are nearly alike. Choose prompts that are solved now and then, "
        "set `dynamic_sampling: true`, raise `num_generations` or `temperature`, or use a reward "
        "that gives part of the points."
    )


def _truncated(history: LogHistory) -> Finding:
    shares = _numbers(history, "completions/clipped_ratio", NUM_TRUNCATED)
    if not shares or min(shares) < TRUNCATED:
        return None
    return "truncated", (
        f"{_at_least(min(shares))} completions were truncated in each of the last "
        f"{NUM_TRUNCATED} logs, so rewards judge text without its end. Likely "
        "`max_completion_length` is too short, or the model does not write its end-of-sequence "
        "token (a base model, or the wrong chat template). Raise `max_completion_length`, ask for "
        "shorter replies, or check the template."
    )


def _kl(history: LogHistory) -> Finding:
    values = _numbers(history, "kl", NUM_KL)
    median = statistics.median(values) if values else 0.0
    if median <= HEALTHY_KL:
        return None
    floors = [entry["reference/kl_floor"] for entry in history if "reference/kl_floor" in entry]
    floor = max((value for value in floors[-1:] if value is not None), default=0.0)
    if median <= KL_FACTOR * floor:
        return None
    limit = f"{HEALTHY_KL:g}, the most that a healthy run shows"
    if KL_FACTOR * floor > HEALTHY_KL:
        limit = f"{KL_FACTOR} times the floor of the quantized reference ({floor:.2g})"
    return "kl", (
        f"The KL to the reference is {median:.2g} nats a token (median of the last {NUM_KL} logs), "
        f"more than {limit}: the policy writes what its reference holds to be nearly impossible. "
        "Likely the learning rate is too high, or the reward is met by text that is no language. "
        "Read some completions, lower `learning_rate`, raise `beta`, or go back to a checkpoint."
    )


def _collapsed(history: LogHistory) -> Finding:
    entropies = _numbers(history, "entropy", NUM_COLLAPSED)
    if not entropies or statistics.median(entropies) >= COLLAPSED_ENTROPY or _at_best(history):
        return None
    return "collapsed", (
        f"The entropy is {statistics.median(entropies):.2g} nats a token (median of the last "
        f"{NUM_COLLAPSED} logs), and the reward is not at its best: the policy writes the same "
        "every time, so it finds nothing better. Likely the learning rate is too high or the "
        "reward favours one text. Go back to a checkpoint, lower `learning_rate`, raise "
        "`temperature` or `epsilon_high`, or set `entropy_coef`."
    )


def _non_finite(history: LogHistory) -> Finding:
    for metric in ("grad_norm", "loss"):
        values = _last(history, metric, NUM_NON_FINITE)
        if values and not any(map(_is_number, values)):
            return "non_finite", (
                f"`{metric}` was NaN or infinite in each of the last {NUM_NON_FINITE} logs, so the "
                "weights are broken or no longer change. Likely numbers overflowed: float16, a "
                "learning rate that is too high, or a huge reward. Go back to a checkpoint, "
                "and use `bf16: true` or float32, a lower `learning_rate` or `max_grad_norm`."
            )
    return None


def _at_best(history: LogHistory) -> bool:
    """Whether the reward has risen to its best and stays there: a run that is done, not stuck."""
    latest = _numbers(history, "reward", NUM_SILENT)
    if not latest:
        return False
    rewards = [entry["reward"] for entry in history if _is_number(entry.get("reward"))]
    low, high = min(rewards), max(rewards)
    risen = not math.isclose(low, high, rel_tol=1e-6)
    return risen and statistics.fmean(latest) >= high - NEAR_BEST * (high - low)


def _last(history: LogHistory, metric: str, count: int) -> list[float | None]:
    """The last ``count`` values of a metric, the newest first; empty if there are fewer."""
    logged = (entry[metric] for entry in reversed(history) if metric in entry)
    values = list(islice(logged, count))
    return values if len(values) == count else []


def _numbers(history: LogHistory, metric: str, count: int) -> list[float]:
    """The same; empty too if one of them is missing, NaN or infinite."""
    numbers = [value for value in _last(history, metric, count) if _is_number(value)]
    return numbers if len(numbers) == count else []


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _at_least(share: float) -> str:
    return "All" if share >= 1 else f"At least {math.floor(100 * share)}% of the"


def _warn_above_bars(message: str) -> None:
    with tqdm.external_write_mode():
        logger.warning(message)
