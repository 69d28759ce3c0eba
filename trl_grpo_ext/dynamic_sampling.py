"""Which further prompts to draw for a batch, and how groups of several rounds become one batch.

Pure parts of dynamic sampling: no model, no trainer, no processes. The first round is the batch as
TRL draws it; later rounds are of further prompts.

Shapes: ``B`` completions, ``P`` groups of a batch, ``D`` groups drawn in all rounds, ``G`` group
size, ``R`` reward functions. Rows ``p*G .. p*G+G-1`` are the completions of group ``p``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trl_grpo_ext.advantages import weighted_reward

Rows = dict[str, Tensor]  # each of shape (B,) or (B, width)

PADDED_LEFT = ("prompt_ids", "prompt_mask")


# Which prompts -----------------------------------------------------------------------------------


def num_groups_to_draw(
    *, missing: int, num_informative: int, num_drawn: int, most: int, multiple_of: int = 1
) -> int:
    """Return how many groups the next round draws: as many as should fill what is missing.

    That is ``missing`` divided by the share of informative groups so far; ``most`` while there was
    none.

    Args:
        missing: Informative groups that the batch lacks.
        num_informative: Of the groups drawn so far.
        num_drawn: Groups drawn so far, at least 1.
        most: Groups of a whole batch, a multiple of ``multiple_of``.
        multiple_of: What the processes can share out evenly.

    Example:
        >>> num_groups_to_draw(missing=2, num_informative=6, num_drawn=8, most=8)
        3
        >>> num_groups_to_draw(missing=8, num_informative=0, num_drawn=8, most=8)
        8
    """
    if missing <= 0:
        return 0
    wanted = math.ceil(missing * num_drawn / max(num_informative, 1))
    return min(math.ceil(wanted / multiple_of) * multiple_of, most)


class FurtherPrompts:
    """Draws prompts that a batch does not hold, in an order that a key alone decides.

    Nothing is kept from one batch to the next: the same key gives the same prompts, on every
    process and after a resume.

    Args:
        dataset: Rows with a column ``prompt``; at least one.
        used: Prompts of the batch. They are left out while others are there.
        key: Integers, such as the seed and the step; not negative.

    Example:
        >>> rows = [{"prompt": letter} for letter in "abc"]
        >>> further = FurtherPrompts(rows, used=["a"], key=(0, 1))
        >>> sorted(further.draw(2)), sorted(further.draw(3))
        ([1, 2], [0, 1, 2])
    """

    def __init__(self, dataset: Any, *, used: Iterable[object], key: Sequence[int]) -> None:
        self._dataset = dataset
        self._used = set(map(prompt_text, used))
        self._random = np.random.default_rng(list(key))
        self._order: Iterator[int] = self._shuffled()

    def draw(self, num_prompts: int) -> list[int]:
        """Return the places of this many further prompts in the dataset.

        None comes twice before all have come once.
        """
        return [self._next() for _ in range(num_prompts)]

    def _next(self) -> int:
        while True:
            for index in self._order:
                text = prompt_text(self._dataset[index]["prompt"])
                if text not in self._used:
                    self._used.add(text)
                    return index
            self._used.clear()
            self._order = self._shuffled()

    def _shuffled(self) -> Iterator[int]:
        return iter(self._random.permutation(len(self._dataset)).tolist())


def prompt_text(prompt: object) -> str:
    """Return what two prompts have in common if they are the same one."""
    return prompt if isinstance(prompt, str) else repr(prompt)


# Rounds become a batch ---------------------------------------------------------------------------


def fill_slots(informative_D: Tensor, *, num_slots: int) -> Tensor:
    """Return which of the groups drawn stands in each place of the batch.

    An informative group of the first round keeps its place. Informative groups of later rounds
    take the places of silent ones, in the order of their drawing; where none is left, the silent
    group stays.

    Args:
        informative_D: Shape ``(D,)``, booleans; the first ``num_slots`` are the first round.
        num_slots: ``P``.

    Returns:
        Shape ``(P,)``, numbers of groups.

    Example:
        >>> fill_slots(torch.tensor([True, False, False, False, True]), num_slots=3)
        tensor([0, 4, 2])
    """
    chosen_P = torch.arange(num_slots)
    silent = (~informative_D[:num_slots]).nonzero()[:, 0]
    spare = num_slots + informative_D[num_slots:].nonzero()[:, 0]
    num_filled = min(len(silent), len(spare))
    chosen_P[silent[:num_filled]] = spare[:num_filled]
    return chosen_P


def rows_of_groups(groups_P: Tensor, *, group_size: int) -> Tensor:
    """Return the rows of these groups, shape ``(P * G,)``.

    Example:
        >>> rows_of_groups(torch.tensor([0, 4]), group_size=2)
        tensor([0, 1, 8, 9])
    """
    return (groups_P[:, None] * group_size + torch.arange(group_size)).flatten()


def join_rows(parts: Sequence[Rows], *, padding: Mapping[str, float]) -> Rows:
    """Return the rows of all parts, one below the other, padded to the widest.

    Args:
        parts: With the same names.
        padding: What a name is padded with; 0 if it is not there. :data:`PADDED_LEFT` are padded
            on the left, all others on the right.
    """
    joined = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if values[0].ndim == 2:
            width = max(value.shape[1] for value in values)
            values = [_widened(v, width, name, padding.get(name, 0)) for v in values]
        joined[name] = torch.cat(values)
    return joined


def _widened(values: Tensor, width: int, name: str, padding: float) -> Tensor:
    missing = width - values.shape[1]
    sides = (missing, 0) if name in PADDED_LEFT else (0, missing)
    return functional.pad(values, sides, value=padding)


def take_rows(rows: Rows, chosen: Tensor | slice) -> Rows:
    """Return these rows of each value."""
    if isinstance(chosen, slice):
        return {name: value[chosen] for name, value in rows.items()}
    return {name: value[chosen.to(value.device)] for name, value in rows.items()}


def trim_padding(rows: Rows, *, multiple_of: int = 1) -> Rows:
    """Return the rows without the columns that are padding in all of them.

    Args:
        rows: With ``prompt_mask`` and ``completion_mask``. Values of width 1 stay as they are.
        multiple_of: What the widths stay a multiple of. At least one column of each is left.
    """
    prompt = _longest(rows["prompt_mask"], multiple_of)
    completion = _longest(rows["completion_mask"], multiple_of)
    return {
        name: value
        if value.ndim == 1
        else (value[:, -prompt:] if name in PADDED_LEFT else value[:, :completion])
        for name, value in rows.items()
    }


def _longest(mask_BT: Tensor, multiple_of: int) -> int:
    longest = int(mask_BT.bool().sum(dim=1).max())
    return max(math.ceil(longest / multiple_of), 1) * multiple_of


# Metrics -----------------------------------------------------------------------------------------


def merge_metrics(
    rounds: Sequence[Mapping[str, Sequence[float]]], num_rows: Sequence[int]
) -> dict[str, float]:
    """Return each metric over the completions of all rounds.

    Means are weighted by what they are means of: completions, or those that ended by themselves, or
    tool calls. Extremes are the extremes of all rounds, counts are summed, and of what TRL counts
    over the run the last value is kept. Deviations come out as means: :func:`reward_metrics` has
    those of rewards.

    Args:
        rounds: What TRL logged in each.
        num_rows: Completions of each.

    Example:
        >>> rounds = [{"reward": [1.0], "completions/max_length": [5.0]}]
        >>> rounds += [{"reward": [0.0], "completions/max_length": [9.0]}]
        >>> merge_metrics(rounds, [3, 1])
        {'reward': 0.75, 'completions/max_length': 9.0}
    """
    names = dict.fromkeys(name for found in rounds for name in found)
    return {name: _merged(name, rounds, num_rows) for name in names}


def _merged(
    name: str, rounds: Sequence[Mapping[str, Sequence[float]]], num_rows: Sequence[int]
) -> float:
    known = [
        (value, rows * _share(name, found))
        for found, rows in zip(rounds, num_rows, strict=True)
        for value in found.get(name, ())
        if not math.isnan(value)
    ]
    counted = [(value, weight) for value, weight in known if weight > 0] or known
    values = [value for value, _ in counted]
    if not values:
        return math.nan
    if name == "num_tokens":
        return values[-1]
    if name.endswith("/non_finite"):
        return sum(values)
    kind = name.rpartition("/")[2].partition("_")[0]
    if kind in ("min", "max"):
        return min(values) if kind == "min" else max(values)
    total = sum(weight for _, weight in counted)
    return sum(v * w for v, w in counted) / total if total else sum(values) / len(values)


def _share(name: str, found: Mapping[str, Sequence[float]]) -> float:
    """How many of the things that a metric is a mean of there are for each completion."""
    if name.endswith("_terminated_length"):
        return 1 - found["completions/clipped_ratio"][-1]
    if name == "tools/failure_frequency":
        return found["tools/call_frequency"][-1]
    return 1.0


def reward_metrics(
    rewards_BR: Tensor, *, weights_R: Tensor, names: Sequence[str]
) -> dict[str, float]:
    """Return TRL's metrics of rewards: mean and sample deviation over the scored completions.

    Args:
        rewards_BR: Shape ``(B, R)``, reward units; NaN where a reward was not given.
        weights_R: Shape ``(R,)``.
        names: Of the rewards.

    Returns:
        NaN for a mean of none, and for a deviation of fewer than two.

    Example:
        >>> rewards = torch.tensor([[1.0], [0.0], [float("nan")]])
        >>> metrics = reward_metrics(rewards, weights_R=torch.tensor([2.0]), names=["exact"])
        >>> metrics["reward"], metrics["rewards/exact/mean"]
        (1.0, 0.5)
    """
    metrics = {}
    for name, values_B in zip(names, rewards_BR.T, strict=True):
        mean, deviation = _mean_and_deviation(values_B)
        metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = mean, deviation
    summed_B = weighted_reward(rewards_BR, weights_R)
    metrics["reward"], metrics["reward_std"] = _mean_and_deviation(summed_B)
    return metrics


def _mean_and_deviation(values_B: Tensor) -> tuple[float, float]:
    scored_B = values_B[~values_B.isnan()].double()
    deviation = scored_B.std().item() if len(scored_B) > 1 else math.nan
    return (scored_B.mean().item() if len(scored_B) else math.nan), deviation
