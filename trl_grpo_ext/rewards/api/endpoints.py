"""Several addresses of one service, and which to try first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REST_S = 30.0  # how long an address that did not answer is tried last


class Endpoints:
    """Addresses in order of preference.

    Args:
        urls: The first is preferred.
        now: Seconds on any clock that does not go back.

    Example:
        >>> endpoints = Endpoints(["https://a.example", "https://b.example"], now=lambda: 0.0)
        >>> endpoints.rest("https://a.example")
        >>> endpoints.in_order()
        ['https://b.example', 'https://a.example']
    """

    def __init__(self, urls: Sequence[str], *, now: Callable[[], float]) -> None:
        self._urls = list(urls)
        self._now = now
        self._rests_until: dict[str, float] = {}

    def in_order(self) -> list[str]:
        """Return all addresses, those that did not answer lately last."""
        now = self._now()
        return sorted(self._urls, key=lambda url: self._rests_until.get(url, now) > now)

    def rest(self, url: str) -> None:
        """Put this address last for half a minute, as it did not answer."""
        self._rests_until[url] = self._now() + REST_S
