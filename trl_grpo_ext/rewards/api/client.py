"""The HTTP client: one request to one answer, with its limits, timeouts and retries."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

import httpx2

from trl_grpo_ext.errors import RewardError, RewardRefusedError
from trl_grpo_ext.rewards.api.body import has_non_finite, read_reply
from trl_grpo_ext.rewards.api.connection import Exchange, open_http, post, sent_headers
from trl_grpo_ext.rewards.api.endpoints import Endpoints
from trl_grpo_ext.rewards.api.limits import Limits
from trl_grpo_ext.rewards.api.retry import (
    RetriableError,
    default_uniform,
    is_retriable,
    retry_after_s,
    retrying,
)
from trl_grpo_ext.rewards.api.secret import excerpt, masked, read_key
from trl_grpo_ext.rewards.api.settings import APISettings, shown_url
from trl_grpo_ext.rewards.api.wire import Reply, UnreadableReplyError, WireProtocol, WireRequest

logger = logging.getLogger(__name__)

_HINTS = {
    401: "Check the key in the variable that `api_key_env` names.",
    403: "Check what the key in the variable that `api_key_env` names is allowed to do.",
    404: "Check `base_url` (with its /v1, if it has one), `protocol` and `model`.",
}
_HINT = "Check `protocol`, `model` and the other options of this reward."


@dataclass(frozen=True)
class Answer:
    """What became of one request.

    Attributes:
        reply: With the scores; ``None`` if there are none.
        latency_s: Of the exchange that gave the scores.
        num_requests: That were sent for it, over all attempts and addresses.
        failure: Why the last attempt gave no score; empty if it did.
        is_cached: The scores are from the disk.
    """

    reply: Reply | None
    latency_s: float | None = None
    num_requests: int = 0
    failure: str = ""
    is_cached: bool = False


@dataclass
class _Trail:
    """What happened to a request so far; outlives its cancellation at the deadline."""

    num_requests: int = 0
    failure: str = "no answer before `deadline_s`"
    partial: Reply | None = None

    def note(self, error: RetriableError, *, reason: str) -> None:
        self.failure = reason
        self.partial = error.partial or self.partial


class RewardClient:
    """Asks a service. Belongs to one event loop; use it as ``async with``.

    Redirects are not followed, so that the key goes to no other host. Compressed replies are
    refused, so that a small one cannot fill the memory.

    Args:
        settings: Addresses, key, patience and limits.
        protocol: How replies are read.
        name: Of the reward, for error messages.
        transport: Instead of the network, for tests.
        uniform: Draws the random part of a backoff.
    """

    def __init__(
        self,
        settings: APISettings,
        protocol: WireProtocol,
        *,
        name: str,
        transport: httpx2.AsyncBaseTransport | None = None,
        uniform: Callable[[float, float], float] | None = None,
    ) -> None:
        self._settings = settings
        self._protocol = protocol
        self._name = name
        self._key = read_key(settings.api_key_env)
        self._http = open_http(settings, key=self._key, transport=transport)
        self._limits = Limits(settings)
        self._endpoints = Endpoints([url.rstrip("/") for url in settings.base_urls], now=_now)
        self._uniform = uniform or default_uniform()
        self._is_down = False  # and a warning has said so

    async def __aenter__(self) -> RewardClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, request: WireRequest) -> Answer:
        """Return the answer, within ``deadline_s``, whatever the service does.

        Raises:
            RewardError: the service refuses the request as such (HTTP 400, 401, 404, ...), or it
                cannot be written as JSON.
        """
        content, trail = self._content(request), _Trail()
        deadline = _now() + self._settings.deadline_s
        try:
            async with asyncio.timeout_at(deadline):
                again = retrying(self._settings, deadline=deadline, uniform=self._uniform)
                found: tuple[Reply, float] = await again(self._round, request, content, trail)
        except (RetriableError, TimeoutError):
            return Answer(trail.partial, num_requests=trail.num_requests, failure=trail.failure)
        return Answer(found[0], latency_s=found[1], num_requests=trail.num_requests)

    async def exchange(self, request: WireRequest) -> Exchange:
        """Return the reply to one request as it comes: one attempt, at the first address.

        Raises:
            RetriableError: there is no whole reply.
        """
        content = self._content(request)
        async with self._limits.slot(num_bytes=len(content)):
            return await self._send(self._endpoints.in_order()[0] + request.path, content)

    def refusal(self, exchange: Exchange) -> RetriableError | RewardError:
        """Return what a reply that is no answer stands for."""
        if is_retriable(exchange.status):
            wait_s = retry_after_s(exchange.headers.get("retry-after"))
            return RetriableError(f"HTTP {exchange.status}", wait_s=wait_s)
        return RewardRefusedError(
            f"reward '{self._name}' was refused by {shown_url(exchange.url)} (HTTP "
            f"{exchange.status}: {self._said(exchange)}), so it can score nothing; asking again "
            f"would not help. {_HINTS.get(exchange.status, _HINT)}"
        )

    def shown_headers(self) -> dict[str, str]:
        """Return the headers of ours that are sent, with the key masked."""
        sent = sent_headers(self._settings, key=self._key)
        return {name: self.shown(value) for name, value in sent.items()}

    def shown(self, text: str) -> str:
        """Return a text with the key masked."""
        return masked(text, key=self._key)

    async def _round(
        self, request: WireRequest, content: bytes, trail: _Trail
    ) -> tuple[Reply, float]:
        """Try each address once; raise what the last one gave if none gave scores."""
        failed: RetriableError | None = None
        for url in self._endpoints.in_order():
            try:
                return await self._attempt(url, request, content, trail)
            except RetriableError as error:
                trail.note(error, reason=self.shown(error.reason))
                failed = error
                if error.is_unreachable:
                    self._endpoints.rest(url)
        assert failed is not None, "there is at least one address"
        self._warn(failed)
        raise failed

    def _warn(self, failed: RetriableError) -> None:
        """Say once in an outage that nobody is there, as it may be asked for long."""
        if failed.is_unreachable and not self._is_down:
            logger.warning(
                "reward '%s' does not reach %s (%s). It asks again for up to %g s a request. See "
                "that the service runs and that the address is right.",
                self._name,
                " or ".join(shown_url(url) for url in self._settings.base_urls),
                self.shown(failed.reason),
                self._settings.deadline_s,
            )
        self._is_down |= failed.is_unreachable

    async def _attempt(
        self, url: str, request: WireRequest, content: bytes, trail: _Trail
    ) -> tuple[Reply, float]:
        async with self._limits.slot(num_bytes=len(content)):
            trail.num_requests += 1
            exchange = await self._send(url + request.path, content)
        if not 200 <= exchange.status <= 299:
            raise self.refusal(exchange)
        try:
            reply = read_reply(self._protocol, request, exchange.body)
        except UnreadableReplyError as error:
            raise RetriableError(excerpt(str(error), key=self._key)) from None
        self._is_down = False
        self._limits.count_tokens(reply.tokens, num_bytes=len(content))
        if has_non_finite(reply.scores):
            raise RetriableError("the reply has a score of NaN or infinity", partial=_finite(reply))
        return reply, exchange.latency_s

    def _said(self, exchange: Exchange) -> str:
        """Return what the service says about its refusal, without secrets."""
        if 300 <= exchange.status <= 399:
            target = shown_url(exchange.headers.get("location", ""))
            return f"moved to {excerpt(target, key=self._key)}, which is not followed"
        text = exchange.body.decode("utf-8", "replace")
        return excerpt(text, key=self._key) or "without a word"

    async def _send(self, url: str, content: bytes) -> Exchange:
        return await post(
            self._http,
            url,
            content,
            max_bytes=self._settings.max_reply_bytes,
            timeout_s=self._settings.timeout_s,
        )

    def _content(self, request: WireRequest) -> bytes:
        try:
            return json.dumps(request.payload, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError, RecursionError) as error:
            reason = masked(str(error), key=self._key)
            raise RewardError(
                f"reward '{self._name}' cannot write its request as JSON ({reason}), so the "
                "completion cannot be scored. Keep to texts, finite numbers, lists and mappings "
                "in the columns and options that this reward sends."
            ) from None


def _finite(reply: Reply) -> Reply:
    scores = [None if has_non_finite([score]) else score for score in reply.scores]
    return Reply(scores=scores, tokens=reply.tokens)


def _now() -> float:
    return asyncio.get_running_loop().time()
