"""How fast a run is: seconds of a step, and tokens a second."""

from __future__ import annotations

import time
from collections.abc import Callable

KEEP = 0.9  # a step counts this much of the one after it


class Pace:
    """How fast optimizer steps are, of late; what happens between them is not counted.

    Evaluations and checkpoints fall between the steps. Each step counts nine tenths of the next.

    Example:
        >>> pace = Pace(clock=iter([10.0, 14.0]).__next__)
        >>> pace.begin_step(0)
        >>> pace.end_step(1200)
        >>> pace.seconds_per_step, pace.tokens_per_second
        (4.0, 300.0)
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start: tuple[float, float] | None = None
        self._steps = self._seconds = self._tokens = 0.0

    def begin_step(self, num_tokens: float) -> None:
        """Note the time, and the tokens sampled so far."""
        self._start = self._clock(), num_tokens

    def end_step(self, num_tokens: float) -> None:
        """Count the step that has begun."""
        if self._start is None:
            return
        seconds, tokens = self._clock() - self._start[0], num_tokens - self._start[1]
        self._steps = KEEP * self._steps + 1
        self._seconds = KEEP * self._seconds + seconds
        self._tokens = KEEP * self._tokens + tokens

    @property
    def seconds_per_step(self) -> float | None:
        """``None`` before the first step has ended."""
        return self._seconds / self._steps if self._steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """Prompts and completions; ``None`` while none were sampled."""
        return self._tokens / self._seconds if self._tokens and self._seconds else None
