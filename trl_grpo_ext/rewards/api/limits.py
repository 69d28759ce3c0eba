"""How much is asked at a time and a minute."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiolimiter import AsyncLimiter

from trl_grpo_ext.rewards.api.settings import APISettings

BYTES_PER_TOKEN = 4  # of English text, until the service has counted


class Limits:
    """The requests under way, and the requests and tokens a minute. Belongs to one event loop.

    Both rates are leaky buckets of one second's worth (of at least one request), so that no minute
    sees more than its number and that second's. Tokens are known only afterwards: a request takes
    an estimate, and the next one what the estimate lacked.

    Args:
        settings: With ``max_concurrent``, ``requests_per_minute`` and ``tokens_per_minute``.
    """

    def __init__(self, settings: APISettings) -> None:
        self._slots = asyncio.Semaphore(settings.max_concurrent)
        self._requests = _bucket(settings.requests_per_minute)
        self._tokens = _bucket(settings.tokens_per_minute)
        self._tokens_per_byte = 1 / BYTES_PER_TOKEN
        self._owed_tokens = 0.0

    @asynccontextmanager
    async def slot(self, *, num_bytes: int) -> AsyncIterator[None]:
        """Hold one of the concurrent requests, once the rates allow it.

        Args:
            num_bytes: Of the request's body.
        """
        async with self._slots:
            if self._tokens:
                needed = num_bytes * self._tokens_per_byte + self._owed_tokens
                self._owed_tokens = 0.0
                await _take(self._tokens, needed)
            if self._requests:
                await _take(self._requests, 1)
            yield

    def count_tokens(self, tokens: int, *, num_bytes: int) -> None:
        """Note what a request of so many bytes cost in the end; 0 if the service did not say."""
        if tokens > 0 and num_bytes > 0:
            estimate = num_bytes * self._tokens_per_byte
            self._owed_tokens += max(0.0, tokens - estimate)
            self._tokens_per_byte += 0.1 * (tokens / num_bytes - self._tokens_per_byte)


def _bucket(per_minute: float | None) -> AsyncLimiter | None:
    if per_minute is None:
        return None
    size = max(1.0, per_minute / 60)
    return AsyncLimiter(size, time_period=60 * size / per_minute)


async def _take(bucket: AsyncLimiter, amount: float) -> None:
    """Take any amount, in parts that fit into the bucket."""
    while amount > 0:
        part = min(amount, bucket.max_rate)
        await bucket.acquire(part)
        amount -= part
