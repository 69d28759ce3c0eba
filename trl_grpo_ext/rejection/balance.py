"""How many replies to a prompt are kept, by how difficult it is for the model that sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Balance = Literal["prop2diff", "uniform"]

BUCKETS = ("0", "(0, 1/4]", "(1/4, 1/2]", "(1/2, 3/4]", "(3/4, 1)", "1")


def pass_rate(right: Sequence[bool | None]) -> float | None:
    """Return the share of right replies among the judged ones; ``None`` if none was judged.

    Example:
        >>> pass_rate([True, False, None, False, False])
        0.25
    """
    judged = [one for one in right if one is not None]
    return sum(judged) / len(judged) if judged else None


def quota(right: Sequence[bool | None], *, best_n: int, balance: Balance) -> int:
    """Return how many replies to a prompt may be kept.

    ``uniform`` is ``best_n`` for every prompt. ``prop2diff`` is ``best_n`` times the share of wrong
    replies, rounded up, and at least 1: proportional to the difficulty.

    What a fixed number of samples leaves is bent towards easy prompts: they have many right
    replies, hard ones a few. The cap of ``uniform`` straightens it in part (a prompt with one right
    reply has no more to give), ``prop2diff`` further.

    Args:
        right: Of each reply to the prompt; ``None`` was not judged.
        best_n: At least 1.
        balance: Which of the two.

    References:
        Fail rate as difficulty, and data in proportion to it: DART-Math, arXiv:2407.13690, which
        samples hard prompts more often instead of keeping less of easy ones. A cap for each
        prompt: ReST-EM, arXiv:2312.06585.

    Example:
        >>> quota([True, False, False, False], best_n=4, balance="prop2diff")
        3
        >>> quota([True, True], best_n=4, balance="prop2diff")
        1
    """
    judged = [one for one in right if one is not None]
    if balance == "uniform" or not judged:
        return best_n
    num_wrong = len(judged) - sum(judged)
    return max(1, -(-best_n * num_wrong // len(judged)))


def bucket(rate: float) -> str:
    """Return the range of pass rates that a prompt is counted in, one of :data:`BUCKETS`.

    Example:
        >>> [bucket(rate) for rate in (0.0, 0.25, 0.26, 0.99, 1.0)]
        ['0', '(0, 1/4]', '(1/4, 1/2]', '(3/4, 1)', '1']
    """
    if rate in (0.0, 1.0):
        return BUCKETS[0] if rate == 0.0 else BUCKETS[-1]
    return BUCKETS[1 + sum(rate > edge for edge in (0.25, 0.5, 0.75))]
