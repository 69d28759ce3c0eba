"""pass@k, majority vote at k, and bootstrap intervals; pure functions.

Shapes: ``P`` prompts. A prompt has ``n`` completions, of which ``c`` are right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb

import numpy as np
import torch
from torch import Tensor

CONFIDENCE = 0.95
_DRAWS_AT_A_TIME = 4_000_000  # 32 MB of indices


def pass_at_k(num_correct_P: Tensor, num_samples_P: Tensor, *, k: int) -> Tensor:
    """Return the chance that at least one of ``k`` completions of a prompt is right.

    ``1 - C(n - c, k) / C(n, k)``: the share of the subsets of size ``k`` that hold a right one. It
    is unbiased, where ``1 - (1 - c/n)^k`` is too low. Computed as ``1 - prod(1 - k / i)`` over
    ``i = n - c + 1 .. n``, which never overflows.

    Args:
        num_correct_P: ``c``, shape ``(P,)``, from 0 to ``n``.
        num_samples_P: ``n``, shape ``(P,)``, at least 0.
        k: At least 1.

    Returns:
        Shape ``(P,)``, float64; NaN where a prompt has fewer than ``k`` completions.

    References:
        Chen et al. 2021, Evaluating Large Language Models Trained on Code, section 2.1,
        arXiv:2107.03374.

    Example:
        >>> pass_at_k(torch.tensor([0, 1, 3]), torch.tensor([4, 4, 4]), k=2)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    correct_P1, samples_P1 = num_correct_P[:, None].double(), num_samples_P[:, None].double()
    most = int(num_samples_P.max()) if len(num_samples_P) else 0
    i_n = torch.arange(1, most + 1, dtype=torch.float64)
    counted_Pn = (i_n > samples_P1 - correct_P1) & (i_n <= samples_P1)
    factors_Pn = torch.where(counted_Pn, (1 - k / i_n).clamp(min=0.0), 1.0)
    chance_P = 1 - factors_Pn.prod(dim=1)
    return chance_P.masked_fill(num_samples_P < k, torch.nan)


def majority_at_k(answers: Sequence[Hashable], is_correct: Sequence[bool], *, k: int) -> float:
    """Return the chance that the most frequent answer among ``k`` completions is right.

    The mean over all subsets of size ``k``, exactly (for ``k = n`` there is one). In a subset the
    answers vote; of several with the most votes each is taken with the same chance. ``None`` is no
    answer and has no vote; a subset in which nobody votes is wrong. If completions with the same
    answer were judged differently, the answer is right as often as they were.

    The subsets are not listed: for each number ``w`` of winning votes, answer after answer, it
    counts the ways to pick ``v`` completions such that ``t`` answers have ``w`` votes and none has
    more. That takes about ``n k^2`` additions.

    Args:
        answers: Of the ``n`` completions of a prompt; ``None`` where there is none.
        is_correct: Whether each completion was judged right.
        k: At least 1.

    Returns:
        From 0 to 1; NaN with fewer than ``k`` completions.

    References:
        Wang et al. 2022, Self-Consistency Improves Chain of Thought Reasoning in Language Models,
        arXiv:2203.11171.

    Example:
        >>> majority_at_k([7, 7, 8], [True, True, False], k=3)
        1.0
        >>> round(majority_at_k([7, 7, 8], [True, True, False], k=2), 4)  # 7 7, and twice 7 8
        0.6667
    """
    if len(answers) < k:
        return float("nan")
    votes = Counter(answer for answer in answers if answer is not None)
    correct = Counter(a for a, right in zip(answers, is_correct, strict=True) if right)
    ballot = [(count, correct[answer] / count) for answer, count in votes.items()]
    num_silent = len(answers) - votes.total()
    most = max(votes.values(), default=0)
    won = sum(_won_with(top, ballot, num_silent, k) for top in range(1, most + 1))
    return won / comb(len(answers), k)


def _won_with(top: int, ballot: list[tuple[int, float]], num_silent: int, k: int) -> float:
    """Number of subsets that ``top`` votes win, each weighed with the chance to be right.

    ``ways[v, t]`` counts the ways to pick ``v`` completions of the answers so far, of which ``t``
    have ``top`` votes and none has more; ``right[v, t]`` weighs each with how many of these ``t``
    are right.
    """
    if top > k:
        return 0.0
    ways = np.zeros((k + 1, k // top + 2))
    right = np.zeros_like(ways)
    for silent in range(min(num_silent, k) + 1):
        ways[silent, 0] = comb(num_silent, silent)
    for count, correctness in ballot:
        old_ways, old_right = ways, right
        ways, right = np.zeros_like(ways), np.zeros_like(right)
        for picked in range(min(count, top, k) + 1):
            left, tied = k + 1 - picked, int(picked == top)
            before = np.s_[:left, : ways.shape[1] - tied]
            after = np.s_[picked:, tied:]
            num = comb(count, picked)
            ways[after] += num * old_ways[before]
            right[after] += num * (old_right[before] + tied * correctness * old_ways[before])
    tied_t = np.arange(1, ways.shape[1])
    return float((right[k, 1:] / tied_t).sum())


def bootstrap_interval(
    values_P: Tensor, *, num_resamples: int = 1000, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float]:
    """Return an interval for the mean over prompts: what other prompts could have given.

    The percentile bootstrap: prompts are drawn again with replacement, ``P`` of them each time,
    and the interval holds the middle ``confidence`` of the means. Completions of one prompt depend
    on each other, so prompts are drawn and not completions.

    Args:
        values_P: One value a prompt; NaN is left out.
        num_resamples: At least 1.
        confidence: Share of the means inside, between 0 and 1.
        seed: The same values and seed give the same interval.

    Returns:
        The lower and the upper end; both NaN if there is no value.

    References:
        Efron 1979, Bootstrap methods: another look at the jackknife, Annals of Statistics 7(1).
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.

    Example:
        >>> bootstrap_interval(torch.tensor([1.0, 1.0, 1.0]))
        (1.0, 1.0)
    """
    values_P = values_P[~values_P.isnan()].double()
    num_prompts = len(values_P)
    if not num_prompts:
        return float("nan"), float("nan")
    generator = torch.Generator().manual_seed(seed)
    at_a_time = max(_DRAWS_AT_A_TIME // num_prompts, 1)
    means = []
    for start in range(0, num_resamples, at_a_time):
        shape = (min(at_a_time, num_resamples - start), num_prompts)
        drawn = torch.randint(num_prompts, shape, generator=generator)
        means.append(values_P[drawn].mean(dim=1))
    tail = (1 - confidence) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.cat(means).quantile(ends).tolist()
    return low, high
