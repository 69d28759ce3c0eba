"""What counts of each reward: within its limits, and only where the gates are open."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

Gates = Mapping[str, float]  # reward name: the least score that opens it
Limits = Mapping[str, Sequence[float]]  # reward name: lowest and highest value that counts


def shut_gates(rewards_BR: Tensor, *, names: Sequence[str], gates: Gates) -> Tensor:
    """Return which completions fail a gate: a reward below the least score asked of it.

    A completion that a gate's reward does not apply to (NaN) passes it.

    Args:
        rewards_BR: Shape ``(B, R)``, reward units.
        names: Of the ``R`` rewards.
        gates: The least score by the name of the reward.

    Returns:
        Shape ``(B,)``, booleans.

    Example:
        >>> rewards = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
        >>> shut_gates(rewards, names=["math", "format"], gates={"format": 1.0})
        tensor([False,  True])
    """
    shut_B = torch.zeros(len(rewards_BR), dtype=torch.bool, device=rewards_BR.device)
    for name, least in gates.items():
        shut_B |= rewards_BR[:, names.index(name)] < least
    return shut_B


def counting_rewards(
    rewards_BR: Tensor, *, names: Sequence[str], gates: Gates, limits: Limits
) -> Tensor:
    """Return what counts of each reward.

    A reward with limits is cut to them. Where a gate is shut, nothing that another reward gives
    counts, but what it takes does: values above 0 become 0, penalties stay. The rewards of the
    gates themselves count as they are. Gates are judged by the scores as given.

    Args:
        rewards_BR: Shape ``(B, R)``, reward units; NaN where a reward was not given, which stays.
        names: Of the ``R`` rewards.
        gates: As in :func:`shut_gates`.
        limits: The lowest and highest value that counts, by the name of the reward.

    Returns:
        Shape ``(B, R)``; the input itself without gates and limits.

    Example:
        >>> rewards = torch.tensor([[9.0, 1.0, -0.5], [9.0, 0.0, -0.5]])
        >>> names = ["model", "format", "length"]
        >>> counting_rewards(rewards, names=names, gates={"format": 1.0}, limits={"model": (-3, 3)})
        tensor([[ 3.0000,  1.0000, -0.5000],
                [ 0.0000,  0.0000, -0.5000]])
    """
    if not gates and not limits:
        return rewards_BR
    counting_BR = rewards_BR.clone()
    for name, (lowest, highest) in limits.items():
        column = names.index(name)
        counting_BR[:, column] = counting_BR[:, column].clamp(lowest, highest)
    shut_B = shut_gates(rewards_BR, names=names, gates=gates)
    rest_R = torch.tensor([name not in gates for name in names], device=rewards_BR.device)
    return torch.where(shut_B[:, None] & rest_R, counting_BR.clamp(max=0.0), counting_BR)


def counting_steps(
    step_rewards_BT: Tensor,
    rewards_BR: Tensor,
    *,
    name: str,
    names: Sequence[str],
    gates: Gates,
    limits: Limits,
) -> Tensor:
    """Return what counts of the rewards of steps: each is cut as the reward that gave them.

    Args:
        step_rewards_BT: Shape ``(B, T)``, reward units; NaN where no step ends, which stays.
        rewards_BR: As in :func:`counting_rewards`.
        name: Of the reward that gave the steps.
        names: As in :func:`counting_rewards`.
        gates: As in :func:`counting_rewards`.
        limits: As in :func:`counting_rewards`.

    Returns:
        Shape ``(B, T)``.

    Example:
        >>> steps, rewards = torch.tensor([[0.9, 0.2]]), torch.tensor([[0.2, 0.0]])
        >>> gates = {"format": 1.0}
        >>> names = ["steps", "format"]
        >>> counting_steps(steps, rewards, name="steps", names=names, gates=gates, limits={})
        tensor([[0., 0.]])
    """
    if name in limits:
        lowest, highest = limits[name]
        step_rewards_BT = step_rewards_BT.clamp(lowest, highest)
    if name in gates:
        return step_rewards_BT
    shut_B = shut_gates(rewards_BR, names=names, gates=gates)
    return torch.where(shut_B[:, None], step_rewards_BT.clamp(max=0.0), step_rewards_BT)


def combination_problems(gates: object, limits: object) -> Iterator[str]:
    """Yield what is wrong with the options ``reward_gates`` and ``reward_clip``.

    Example:
        >>> next(combination_problems({"format": "one"}, None))
        "`reward_gates` has 'one' for 'format', which is no finite number. Set the least score \
with which the other rewards count, such as {format: 1.0}."
    """
    for name, least in _entries(gates):
        if not _is_number(least):
            yield (
                f"`reward_gates` has {least!r} for {name!r}, which is no finite number. Set the "
                "least score with which the other rewards count, such as {format: 1.0}."
            )
    for name, ends in _entries(limits):
        if not _is_range(ends):
            yield (
                f"`reward_clip` has {ends!r} for {name!r}, which is no range. Set the lowest and "
                "the highest value that counts, such as {outcome_model: [-3, 3]}."
            )
    for option, given in (("reward_gates", gates), ("reward_clip", limits)):
        if given is not None and not isinstance(given, Mapping):
            yield (
                f"`{option}` is {given!r}, which is no mapping, so it says of no reward what "
                "counts. Write names of rewards and values, such as {format: 1.0}; on the command "
                "line as JSON, '{\"format\": 1.0}'."
            )


def unknown_reward_problems(
    gates: object, limits: object, *, names: Sequence[str]
) -> Iterator[str]:
    """Yield which names in the options are of no reward of the run."""
    for option, given in (("reward_gates", gates), ("reward_clip", limits)):
        if unknown := [name for name, _ in _entries(given) if name not in names]:
            yield (
                f"`{option}` names {', '.join(map(repr, unknown))}, but the rewards of this run "
                f"are {', '.join(names)}, so it would have no effect. Name one of these."
            )


def _entries(given: object) -> list[tuple[object, object]]:
    return list(given.items()) if isinstance(given, Mapping) else []


def _is_range(ends: object) -> bool:
    if not isinstance(ends, list | tuple) or len(ends) != 2 or not all(map(_is_number, ends)):
        return False
    return bool(ends[0] < ends[1])


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)
