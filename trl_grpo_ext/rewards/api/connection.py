"""Connections to a service: one request out, one reply of bounded size and time back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from urllib.parse import urlsplit

import httpx2

from trl_grpo_ext.rewards.api.retry import RetriableError
from trl_grpo_ext.rewards.api.secret import excerpt
from trl_grpo_ext.rewards.api.settings import APISettings, is_loopback

MAX_REFUSAL_BYTES = 65_536  # read of a refusal, to be shown


@dataclass(frozen=True)
class Exchange:
    """A reply as it came, whatever its status.

    Attributes:
        url: That was asked.
        status: Of HTTP.
        headers: Of the reply, in lower case.
        body: Of the reply.
        latency_s: From sending the request to the end of the reply.
    """

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes
    latency_s: float


def open_http(
    settings: APISettings, *, key: str | None, transport: httpx2.AsyncBaseTransport | None
) -> httpx2.AsyncClient:
    """Return the connections to a service, with HTTP/2 where ``h2`` is installed.

    Args:
        settings: With timeouts and limits.
        key: Sent in each request.
        transport: Instead of the network, for tests.
    """
    return httpx2.AsyncClient(
        headers=sent_headers(settings, key=key),
        http2=find_spec("h2") is not None,
        timeout=httpx2.Timeout(
            settings.timeout_s,
            connect=settings.connect_timeout_s,
            read=settings.read_timeout_s,
            pool=None,  # the slots of Limits are as many as the connections
        ),
        limits=httpx2.Limits(
            max_connections=settings.max_concurrent,
            max_keepalive_connections=settings.max_concurrent,
        ),
        follow_redirects=False,
        transport=transport,
        mounts=_without_proxy(settings) if transport is None else None,
    )


def sent_headers(settings: APISettings, *, key: str | None) -> dict[str, str]:
    """Return the headers of ours in each request."""
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if key:
        is_bearer = settings.api_key_header.lower() == "authorization"
        headers[settings.api_key_header] = f"Bearer {key}" if is_bearer else key
    return headers


async def post(
    http: httpx2.AsyncClient, url: str, content: bytes, *, max_bytes: int, timeout_s: float
) -> Exchange:
    """Return the reply to one request, whatever its status.

    Args:
        http: The connections.
        url: To ask.
        content: JSON.
        max_bytes: Of an answer. Of a refusal, only the start is read.
        timeout_s: From sending the request to the end of the reply.

    Raises:
        RetriableError: there is no whole reply.
    """
    started = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(timeout_s):
            status, headers, body = await _receive(http, url, content, max_bytes=max_bytes)
    except (TimeoutError, httpx2.TimeoutException) as error:
        unreachable = isinstance(error, httpx2.ConnectTimeout)
        raise RetriableError(_timed_out(error), is_unreachable=unreachable) from None
    except httpx2.TransportError as error:
        unreachable = isinstance(error, httpx2.ConnectError)
        reason = excerpt(f"{type(error).__name__}: {error}", key=None)
        raise RetriableError(reason, is_unreachable=unreachable) from None
    return Exchange(url, status, headers, body, asyncio.get_running_loop().time() - started)


async def _receive(
    http: httpx2.AsyncClient, url: str, content: bytes, *, max_bytes: int
) -> tuple[int, dict[str, str], bytes]:
    async with http.stream("POST", url, content=content) as response:
        is_answer = response.is_success
        limit = max_bytes if is_answer else MAX_REFUSAL_BYTES
        if is_answer and response.headers.get("content-encoding", "identity") != "identity":
            raise RetriableError("the reply is compressed, which was not asked for")
        body = await _read(response, max_bytes=limit)
        if is_answer and len(body) > limit:
            raise RetriableError(f"the reply is longer than `max_reply_bytes`={limit}")
        return response.status_code, dict(response.headers), body[:limit]


async def _read(response: httpx2.Response, *, max_bytes: int) -> bytes:
    """Return the body, or somewhat more than ``max_bytes`` of a longer one."""
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > max_bytes:
            break
    return bytes(body)


def _without_proxy(settings: APISettings) -> dict[str, None]:
    """Return mounts that keep requests to this machine away from the environment's proxy."""
    hosts = {urlsplit(url).hostname or "" for url in settings.base_urls}
    return {
        f"all://{f'[{host}]' if ':' in host else host}": None for host in hosts if is_loopback(host)
    }


def _timed_out(error: Exception) -> str:
    kind = type(error).__name__ if isinstance(error, httpx2.TimeoutException) else "`timeout_s`"
    return f"no answer in time ({kind})"
