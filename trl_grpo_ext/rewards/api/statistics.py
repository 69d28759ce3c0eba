"""What a batch of API scores took."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

from trl_grpo_ext.rewards.api.client import Answer
from trl_grpo_ext.rewards.scores import Score


@dataclass(frozen=True)
class RewardStatistics:
    """Figures of one call of a reward; all are 0 before the first one.

    Attributes:
        unscored_fraction: Completions without a score.
        latency_p50_s: Median of the seconds that an answered request took, without the waits for
            limits and retries.
        latency_p95_s: 95th percentile of these.
        retries: Requests sent beyond the first of each.
        cache_hits: Requests whose scores came from the disk.
        requests: Sent.
        tokens: Counted by the service.
        cost: Of the tokens, at the price that was given.
    """

    unscored_fraction: float = 0.0
    latency_p50_s: float = 0.0
    latency_p95_s: float = 0.0
    retries: int = 0
    cache_hits: int = 0
    requests: int = 0
    tokens: int = 0
    cost: float = 0.0

    def log(self, log_metric: Callable[[str, float], None], *, name: str) -> None:
        """Hand each figure to TRL as ``rewards/<name>/<figure>``."""
        for figure in fields(self):
            log_metric(f"rewards/{name}/{figure.name}", float(getattr(self, figure.name)))


def summarize(
    scores: Sequence[Score], answers: Sequence[Answer], *, price_per_million_tokens: float
) -> RewardStatistics:
    """Return the figures of one call.

    Args:
        scores: Of the completions.
        answers: To the requests, each once.
        price_per_million_tokens: In any currency.
    """
    latencies = sorted(_latencies_s(answers))
    tokens = sum(answer.reply.tokens for answer in answers if answer.reply and not answer.is_cached)
    return RewardStatistics(
        unscored_fraction=sum(score is None for score in scores) / len(scores) if scores else 0.0,
        latency_p50_s=_percentile(latencies, 0.5),
        latency_p95_s=_percentile(latencies, 0.95),
        retries=sum(max(0, answer.num_requests - 1) for answer in answers),
        cache_hits=sum(answer.is_cached for answer in answers),
        requests=sum(answer.num_requests for answer in answers),
        tokens=tokens,
        cost=tokens * price_per_million_tokens / 1e6,
    )


def _latencies_s(answers: Sequence[Answer]) -> Iterator[float]:
    return (answer.latency_s for answer in answers if answer.latency_s is not None)


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share does not exceed; 0 of none."""
    if not ordered:
        return 0.0
    return ordered[math.ceil(share * len(ordered)) - 1]
