"""What is asked again, when, and how often."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from trl_grpo_ext.rewards.api.settings import APISettings
from trl_grpo_ext.rewards.api.wire import Reply

RETRIABLE_STATUSES = frozenset({408, 425, 429})
_MAX_DOUBLINGS = 60  # keeps 2**attempts a float


class RetriableError(Exception):
    """An attempt that gave no score, and may give one when it is repeated.

    Attributes:
        reason: For the reader of the log, without secrets.
        wait_s: How long the service wants us to wait, at least.
        is_unreachable: The address did not answer at all.
        partial: What could be read off a reply in which not every score is finite.
    """

    def __init__(
        self,
        reason: str,
        *,
        wait_s: float = 0.0,
        is_unreachable: bool = False,
        partial: Reply | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait_s = wait_s
        self.is_unreachable = is_unreachable
        self.partial = partial


def is_retriable(status: int) -> bool:
    """Return whether a reply of this status may be followed by a better one.

    Example:
        >>> [status for status in (400, 401, 408, 422, 425, 429, 500, 503) if is_retriable(status)]
        [408, 425, 429, 500, 503]
    """
    return status in RETRIABLE_STATUSES or 500 <= status <= 599


def retry_after_s(value: str | None, *, now: Callable[[], float] = time.time) -> float:
    """Return the seconds that a ``Retry-After`` header asks for; 0 if there is none to read.

    Args:
        value: Seconds, or a date in the form of HTTP.
        now: Seconds since 1970, compared with the date.

    References:
        RFC 9110, section 10.2.3.

    Example:
        >>> retry_after_s("2.5"), retry_after_s("soon"), retry_after_s(None)
        (2.5, 0.0, 0.0)
        >>> retry_after_s("Thu, 01 Jan 1970 00:01:00 GMT", now=lambda: 50.0)
        10.0
    """
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        seconds = _seconds_until(value, now())
    return max(0.0, seconds) if not math.isnan(seconds) else 0.0


def retrying(
    settings: APISettings, *, deadline: float, uniform: Callable[[float, float], float]
) -> AsyncRetrying:
    """Return what repeats a coroutine while it raises :class:`RetriableError`.

    It waits between half the backoff and all of it, or as long as the service asks if that is
    longer, and gives up at once if the wait would end after the deadline.

    Args:
        settings: With ``max_attempts``, ``backoff_s`` and ``max_backoff_s``.
        deadline: In the time of the running event loop.
        uniform: Draws between two numbers, such as ``random.uniform``.
    """
    loop = asyncio.get_running_loop()

    def wait(state: RetryCallState) -> float:
        backoff_s = backoff(state.attempt_number, settings=settings)
        return max(uniform(backoff_s / 2, backoff_s), _asked_wait_s(state))

    def stop(state: RetryCallState) -> bool:
        is_last = state.attempt_number >= settings.max_attempts
        return is_last or loop.time() + state.upcoming_sleep >= deadline

    return AsyncRetrying(
        sleep=asyncio.sleep,
        wait=wait,
        stop=stop,
        retry=retry_if_exception_type(RetriableError),
        reraise=True,
    )


def backoff(attempt: int, *, settings: APISettings) -> float:
    """Return the longest wait after the attempt of this number, the first being 1, in seconds.

    Example:
        >>> settings = APISettings((), backoff_s=0.5, max_backoff_s=3)
        >>> [backoff(attempt, settings=settings) for attempt in (1, 2, 3, 4, 9999)]
        [0.5, 1.0, 2.0, 3, 3]
    """
    return min(settings.max_backoff_s, settings.backoff_s * 2.0 ** min(attempt - 1, _MAX_DOUBLINGS))


def default_uniform() -> Callable[[float, float], float]:
    """Return a draw of its own, so that the seeds of a run neither change nor are changed."""
    return random.Random().uniform


def _asked_wait_s(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return error.wait_s if isinstance(error, RetriableError) else 0.0


def _seconds_until(date: str, now: float) -> float:
    try:
        return parsedate_to_datetime(date).timestamp() - now
    except (ValueError, OverflowError, TypeError):
        return 0.0
