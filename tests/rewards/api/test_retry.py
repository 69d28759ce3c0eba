"""When requests are repeated: at the expected seconds of a clock that does not wait."""

from __future__ import annotations

import random
from typing import Any

import pytest
from rewards.api.services import now, run

from trl_grpo_ext.rewards.api.retry import RetriableError, default_uniform, retry_after_s, retrying
from trl_grpo_ext.rewards.api.settings import APISettings


def upper(_: float, high: float) -> float:
    return high


def lower(low: float, _: float) -> float:
    return low


def attempts(
    *, wait_s: float = 0.0, deadline: float = 1e6, uniform: Any = upper, **settings: Any
) -> list[float]:
    """The times of all attempts of a request that never works."""
    times: list[float] = []

    async def fail() -> None:
        times.append(now())
        raise RetriableError("no", wait_s=wait_s)

    async def work() -> None:
        again = retrying(APISettings((), **settings), deadline=deadline, uniform=uniform)
        with pytest.raises(RetriableError):
            await again(fail)

    run(work)
    return times


def test_waits_double_up_to_the_longest() -> None:
    found = attempts(max_attempts=5, backoff_s=1.0, max_backoff_s=3.0)
    assert found == pytest.approx([0, 1, 3, 6, 9], abs=1e-3)


def test_up_to_half_of_a_wait_is_taken_off() -> None:
    found = attempts(max_attempts=3, backoff_s=1.0, uniform=lower)
    assert found == pytest.approx([0, 0.5, 1.5], abs=1e-3)


def test_service_may_ask_for_a_longer_wait_but_not_for_a_shorter_one() -> None:
    assert attempts(max_attempts=2, backoff_s=1.0, wait_s=7.0) == pytest.approx([0, 7], abs=1e-3)
    assert attempts(max_attempts=2, backoff_s=1.0, wait_s=0.2) == pytest.approx([0, 1], abs=1e-3)


def test_wait_beyond_the_deadline_is_not_begun() -> None:
    assert attempts(backoff_s=1.0, deadline=5.0, max_attempts=99) == pytest.approx(
        [0, 1, 3], abs=1e-3
    )
    assert attempts(wait_s=1e30, deadline=5.0) == pytest.approx([0], abs=1e-3)


def test_only_one_attempt_if_no_more_are_wanted() -> None:
    assert len(attempts(max_attempts=1)) == 1


def test_other_errors_are_not_repeated() -> None:
    async def fail() -> None:
        raise KeyError

    async def work() -> None:
        with pytest.raises(KeyError):
            await retrying(APISettings(()), deadline=9.0, uniform=upper)(fail)
        assert now() < 1e-3

    run(work)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("7", 7),
        (" 7 ", 7),
        ("-7", 0),
        ("0", 0),
        ("nan", 0),
        ("", 0),
        ("tomorrow", 0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 30),
        ("Sun, 06 Nov 1994 08:48:37 GMT", 0),
        ("Sun, 06 Nov 99999 08:49:37 GMT", 0),
        (None, 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, expected: float) -> None:
    # 784111777 is 06 Nov 1994 08:49:37 GMT, the date of RFC 9110, section 5.6.7.
    assert retry_after_s(value, now=lambda: 784111777 - 30) == expected


def test_random_part_of_a_wait_leaves_the_seed_of_the_run_alone() -> None:
    random.seed(0)
    expected = random.random()
    random.seed(0)
    default_uniform()(0, 1)
    assert random.random() == expected
