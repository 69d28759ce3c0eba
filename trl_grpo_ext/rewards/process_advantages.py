"""What a process reward with ``process_advantages`` needs of a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl_grpo_ext.errors import RewardError


def has_process_advantages(reward: object) -> bool:
    """Return whether the steps that this reward scores are to have advantages of their own."""
    return bool(getattr(reward, "process_advantages", False))


def checked_steps(
    values: Sequence[Any], *, texts: Sequence[str], name: str
) -> tuple[list[Any], int]:
    """Return the scores of steps, ``None`` for a completion with one that is not finite.

    Args:
        values: What ``step_scores`` returned: for each completion ``None``, or an object with
            ``ends`` and ``scores``.
        texts: Of the completions.
        name: Of the reward.

    Returns:
        One a completion, and how many were not finite.

    Raises:
        RewardError: there is not one a completion, or one does not say of each step where it ends
            and what its score is.
    """
    if len(values) != len(texts):
        raise RewardError(
            f"`step_scores` of the reward '{name}' returned {len(values)} values, but {len(texts)} "
            "were expected. Return one a completion; None for one that could not be scored."
        )
    for steps, text in zip(values, texts, strict=True):
        if steps is not None and not _is_sound(steps, text):
            raise RewardError(
                f"`step_scores` of the reward '{name}' returned {steps!r:.200} for a text of "
                f"{len(text)} characters. Return `ends` that increase up to the length of the "
                "text, and as many numbers in `scores`; None for what could not be scored."
            )
    finite = [s if s is None or all(map(math.isfinite, s.scores)) else None for s in values]
    return finite, finite.count(None) - list(values).count(None)


def _is_sound(steps: Any, text: str) -> bool:
    try:
        ends, scores = list(steps.ends), [float(score) for score in steps.scores]
        rising = all(a < b for a, b in itertools.pairwise(ends))
        return rising and 0 < len(ends) == len(scores) and ends[-1] == len(text)
    except (AttributeError, TypeError, ValueError):
        return False


def process_advantage_problems(
    rewards: Sequence[object], *, args: Any, given: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what cannot work beside a reward with ``process_advantages``.

    Args:
        rewards: Of the run.
        args: The configuration of the run.
        given: What the constructor of the trainer was given.
    """
    num_rewards = sum(map(has_process_advantages, rewards))
    if num_rewards == 0:
        if getattr(args, "step_baseline", "group") != "group":
            yield (
                f"`step_baseline` is {args.step_baseline!r}, but no reward has "
                "`process_advantages`, so there are no steps to compare. Set `process_advantages: "
                "true` in the arguments of a process reward, or remove `step_baseline`."
            )
        return
    if num_rewards > 1:
        yield (
            f"`process_advantages` is true for {num_rewards} rewards, but the tokens of a "
            "completion can be cut into the steps of one only. Leave it to one of them."
        )
    if not getattr(args, "extensions", True):
        yield (
            "`process_advantages` is true, but `extensions` is false, so TRL would give each "
            "completion one advantage. Set `extensions: true`, or remove `process_advantages`."
        )
    for option, is_set, does in (
        ("loss_type: vespo", args.loss_type == "vespo", "weighs"),
        ("off_policy_mask_threshold", args.off_policy_mask_threshold is not None, "drops"),
    ):
        if is_set:
            yield (
                f"`{option}` {does} whole completions by the sign of their one advantage, but with "
                "`process_advantages` each step has its own. Remove one of the two."
            )
    if getattr(args, "advantage_baseline", "mean") != "mean":
        yield (
            f"`advantage_baseline` is {args.advantage_baseline!r}, but with `process_advantages` "
            "the steps of a group are compared with their mean. Remove `advantage_baseline`."
        )
    for name in ("tools", "environment_factory", "rollout_func"):
        if given.get(name):
            yield (
                f"`{name}` is given, which adds tokens that the policy did not write, but "
                "`process_advantages` must know which step a token is of. Remove one of the two."
            )
