"""How a reward service is reached: addresses, key, patience, limits, and what cannot work."""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from trl_grpo_ext.rewards.api.secret import key_problems, shown_name

_POSITIVE = (
    "connect_timeout_s",
    "read_timeout_s",
    "timeout_s",
    "deadline_s",
    "max_backoff_s",
)
_NOT_NEGATIVE = ("backoff_s", "price_per_million_tokens")
_COUNTS = ("max_attempts", "max_concurrent", "max_reply_bytes")
_OPTIONAL_RATES = ("requests_per_minute", "tokens_per_minute")


@dataclass(frozen=True)
class APISettings:
    """How a service is asked; what it is asked is the protocol's.

    Attributes:
        base_urls: Tried in this order; one that cannot be reached is tried last for half a minute.
        api_key_env: The environment variable that holds the key.
        api_key_header: Header of the key: ``Authorization`` gets ``Bearer`` in front, any other
            the key alone.
        allow_http: Send prompts and key unencrypted to a host that is not this machine.
        connect_timeout_s: For the connection.
        read_timeout_s: Between two parts of a reply.
        timeout_s: For one request, from sending it to the end of the reply.
        deadline_s: For all completions of a call, with every retry and wait. What has no score by
            then is ``None``.
        max_attempts: How often a request is tried, at each address.
        backoff_s: Wait before the second attempt; it doubles from one to the next, and a random
            part of up to half is taken off.
        max_backoff_s: The longest such wait. A ``Retry-After`` of the service may be longer.
        max_concurrent: Requests under way at a time.
        requests_per_minute: ``None`` for any number. Bursts are one second's worth.
        tokens_per_minute: As counted by the service, and estimated before it has counted.
        max_reply_bytes: A reply is cut off there.
        price_per_million_tokens: For the metric ``cost``, in the reader's currency.
        cache: Keep scores on disk. ``None`` for wherever the judge is not sampled.
        cache_dir: Where; by default ``rewards`` in ``$TRL_GRPO_EXT_CACHE``, or else in
            ``~/.cache/trl_grpo_ext``.
    """

    base_urls: tuple[str, ...]
    api_key_env: str | None = field(default=None, repr=False)
    api_key_header: str = "Authorization"
    allow_http: bool = False
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 120.0
    timeout_s: float = 180.0
    deadline_s: float = 600.0
    max_attempts: int = 8
    backoff_s: float = 0.5
    max_backoff_s: float = 30.0
    max_concurrent: int = 32
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_reply_bytes: int = 4 * 2**20
    price_per_million_tokens: float = 0.0
    cache: bool | None = None
    cache_dir: str | os.PathLike[str] | None = None

    @classmethod
    def names(cls) -> frozenset[str]:
        """Return the names of the settings beside the addresses."""
        return frozenset(known.name for known in fields(cls)) - {"base_urls"}

    def shown(self) -> str:
        """Return addresses and the key's variable, for a ``repr``."""
        hosts = ", ".join(shown_url(url) for url in self.base_urls)
        return f"{hosts}, key in {shown_name(self.api_key_env)}" if self.api_key_env else hosts


def api_problems(settings: APISettings) -> Iterator[str]:
    """Yield what cannot work in these settings, without a network.

    Example:
        >>> for problem in api_problems(APISettings(("http://judge.example",), max_attempts=0)):
        ...     print(problem)  # doctest: +ELLIPSIS
        `base_url`=http://judge.example is not encrypted, so ... or set `allow_http` to true.
        `max_attempts`=0 is not a whole number above 0, ... Set `max_attempts` to at least 1.
    """
    if not settings.base_urls:
        yield (
            "`base_url` is empty, so there is nobody to ask. Set it to the address of the service, "
            "such as https://judge.example/v1, or to a list of them."
        )
    for url in settings.base_urls:
        yield from _url_problems(url, allow_http=settings.allow_http)
    yield from key_problems(settings.api_key_env)
    yield from _header_problems(settings.api_key_header)
    yield from _number_problems(settings)
    yield from _flag_problems(settings)
    yield from _folder_problems(settings.cache_dir)


def shown_url(url: str) -> str:
    """Return the address without what may be secret in it: user, password, query.

    Example:
        >>> shown_url("https://me:secret@judge.example:8000/v1?key=secret")
        'https://judge.example:8000/v1'
    """
    parts = _split(url)
    if parts is None or not parts.hostname:
        return "(no address)"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def is_loopback(host: str) -> bool:
    """Return whether the host is this machine.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("127.0.0.1.example")
        (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _url_problems(url: object, *, allow_http: bool) -> Iterator[str]:
    parts = _split(url)
    if parts is None or parts.scheme not in {"http", "https"} or not parts.hostname:
        yield (
            f"`base_url` holds {shown_url(url) if isinstance(url, str) else type(url).__name__}, "
            "which is no address of a web service, so it cannot be asked. Write it like "
            "https://judge.example/v1."
        )
        return
    shown = shown_url(str(url))
    if parts.username is not None or parts.query or parts.fragment:
        yield (
            f"`base_url`={shown} has a user, a query or a fragment after it (not shown), where "
            "keys would end up in logs. Take it away, and name the variable with the key in "
            "`api_key_env`."
        )
    if parts.scheme == "http" and not is_loopback(parts.hostname) and allow_http is not True:
        yield (
            f"`base_url`={shown} is not encrypted, so prompts and key could be read on the way. "
            "Use https, or set `allow_http` to true."
        )


def _split(url: object) -> SplitResult | None:
    if not isinstance(url, str) or any(not "!" <= letter <= "~" for letter in url):
        return None
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if it is no number
    except ValueError:
        return None
    return parts


def _header_problems(header: object) -> Iterator[str]:
    allowed = isinstance(header, str) and header.replace("-", "").isalnum() and header.isascii()
    if not allowed:
        yield (
            "`api_key_header` is not the name of a header, so the key could not be sent. Set it "
            "to Authorization, or to what the service wants, such as api-key."
        )


def _number_problems(settings: APISettings) -> Iterator[str]:
    for name in _COUNTS:
        value = getattr(settings, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield (
                f"`{name}`={value!r} is not a whole number above 0, so nothing could be scored. "
                f"Set `{name}` to at least 1."
            )
    for name in (*_POSITIVE, *_OPTIONAL_RATES):
        value = getattr(settings, name)
        if value is None and name in _OPTIONAL_RATES:
            continue
        if not _is_finite(value) or value <= 0:
            yield (
                f"`{name}`={value!r} is not a number above 0, so nothing could be scored. Set "
                f"`{name}` to one, or leave it out."
            )
    for name in _NOT_NEGATIVE:
        value = getattr(settings, name)
        if not _is_finite(value) or value < 0:
            yield (
                f"`{name}`={value!r} is not a number from 0 up, so waits or costs could not be "
                f"computed. Set `{name}` to one, or leave it out."
            )


def _flag_problems(settings: APISettings) -> Iterator[str]:
    for name, allowed in (("allow_http", (True, False)), ("cache", (True, False, None))):
        value = getattr(settings, name)
        if not any(value is choice for choice in allowed):
            yield (
                f"`{name}`={value!r} is neither true nor false, so it is not clear what is "
                f"wanted. Set `{name}` to true or false."
            )


def _folder_problems(folder: object) -> Iterator[str]:
    if folder is None:
        return
    if not isinstance(folder, str | os.PathLike) or not _can_be_written(Path(folder)):
        yield (
            f"`cache_dir`={folder!r} is no folder that can be made or written, so no score could "
            "be kept there. Set `cache_dir` to another one, or `cache` to false."
        )


def _can_be_written(folder: Path) -> bool:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
