"""How much is asked at a time and a minute, on a clock that does not wait."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from rewards.api.services import now, run

from trl_grpo_ext.rewards.api.limits import Limits
from trl_grpo_ext.rewards.api.settings import APISettings


def starts(
    num: int, *, num_bytes: int = 4, tokens: int = 0, held_s: float = 0.0, **settings: Any
) -> list[float]:
    """When each of so many requests was allowed to start."""
    times: list[float] = []

    async def work() -> None:
        limits = Limits(APISettings((), **settings))

        async def one() -> None:
            async with limits.slot(num_bytes=num_bytes):
                times.append(now())
                await asyncio.sleep(held_s)
            limits.count_tokens(tokens, num_bytes=num_bytes)

        await asyncio.gather(*(one() for _ in range(num)))

    run(work)
    return times


def busiest_minute(times: list[float]) -> int:
    return max(sum(start <= time < start + 60 for time in times) for start in times)


def test_no_more_than_the_limit_run_at_a_time() -> None:
    assert starts(5, max_concurrent=2, held_s=1.0) == pytest.approx([0, 0, 1, 1, 2], abs=1e-3)


def test_no_rate_is_no_wait() -> None:
    assert starts(500, max_concurrent=500) == pytest.approx([0] * 500, abs=1e-3)


def test_slow_rate_is_one_request_at_a_time() -> None:
    assert starts(4, requests_per_minute=6) == pytest.approx([0, 10, 20, 30], abs=1e-3)


@pytest.mark.parametrize("rate", [60, 90, 600])
def test_no_minute_has_more_than_its_number_and_that_of_a_second(rate: int) -> None:
    times = starts(3 * rate, requests_per_minute=rate, max_concurrent=1000)
    assert busiest_minute(times) <= rate + rate / 60 + 1
    assert times[-1] == pytest.approx(3 * 60, rel=0.03)  # and no fewer


def test_tokens_are_estimated_before_the_service_counts() -> None:
    # 400 bytes are 100 tokens, of 600 a minute: one each 10 s, after a burst of 10 tokens.
    found = starts(4, num_bytes=400, tokens_per_minute=600, max_concurrent=1)
    assert found == pytest.approx([9, 19, 29, 39], abs=0.01)


def test_tokens_beyond_the_estimate_are_waited_for_by_the_next_request() -> None:
    # The first takes 10 of 600 a minute, and turns out to be 70: the next waits for the other 60,
    # and for its own 10 + 0.1 x 60, as the estimate learns.
    found = starts(2, num_bytes=40, tokens=70, tokens_per_minute=600, max_concurrent=1)
    assert found == pytest.approx([0, 7.6], abs=0.01)


def test_request_of_more_tokens_than_a_minute_has_goes_through() -> None:
    assert starts(1, num_bytes=4 * 1200, tokens_per_minute=600) == pytest.approx([119], abs=0.01)
