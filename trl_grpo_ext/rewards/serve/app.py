"""The HTTP side of a reward server: paths, tokens, limits, errors."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import signal
from collections.abc import Callable, Coroutine, Iterator
from http import HTTPStatus
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from trl_grpo_ext.rewards.serve.backends import Backend
from trl_grpo_ext.rewards.serve.settings import Limits, ServeSettings
from trl_grpo_ext.rewards.serve.wire import (
    RefusedError,
    classify_reply,
    read_classify_request,
    read_reward_request,
    reward_reply,
)

T = TypeVar("T")

RETRY_AFTER_S = 1
MAX_CONNECTIONS = 1024  # open ones, idle included; uvicorn answers 503 beyond


def build_server(backend: Backend, *, settings: ServeSettings) -> uvicorn.Server:
    """Return a server that is not started yet; its ``run`` blocks."""
    app = build_app(
        backend, name=settings.served_name, limits=settings.limits, token=settings.token
    )
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=settings.grace_s,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """Leaves signals ignored that were when it was made; uvicorn would listen to them again."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        stopping = (signal.SIGINT, signal.SIGTERM)
        self._ignored = {sig for sig in stopping if signal.getsignal(sig) is signal.SIG_IGN}

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig not in self._ignored:
            super().handle_exit(sig, frame)


def build_app(backend: Backend, *, name: str, limits: Limits, token: str | None) -> Starlette:
    """Return the ASGI application, for a server of your own too.

    Args:
        backend: What answers.
        name: Under which clients know it.
        limits: Beyond which requests are refused.
        token: That clients must send as ``Authorization: Bearer ...``; ``None`` lets all in.
    """
    endpoints = _Endpoints(backend, name=name, limits=limits)
    return Starlette(
        routes=[
            Route("/get_reward", endpoints.get_reward, methods=["POST"]),
            Route("/classify", endpoints.classify, methods=["POST"]),
            Route("/v1/models", endpoints.models, methods=["GET"]),
            Route("/health", endpoints.health, methods=["GET"]),
        ],
        middleware=[Middleware(_TokenCheck, token=token)] if token is not None else [],
        exception_handlers={
            RefusedError: _refused,
            HTTPException: _refused,
            ClientDisconnect: _refused,
            Exception: _failed,
        },
    )


class _Endpoints:
    """The paths, and how much is going on in them."""

    def __init__(self, backend: Backend, *, name: str, limits: Limits) -> None:
        self._backend, self._name, self._limits = backend, name, limits
        self._num_requests = self._num_texts = 0

    async def get_reward(self, request: Request) -> Response:
        with self._room_for_request():
            asked = await self._read(request, read_reward_request)
            with self._room_for_texts(len(asked.query)):
                rewards = await _unless_gone(request, self._backend.rewards(asked))
        return JSONResponse(reward_reply(rewards))

    async def classify(self, request: Request) -> Response:
        with self._room_for_request():
            asked = await self._read(request, read_classify_request)
            if asked.model not in (None, self._name):
                raise RefusedError("No such model. /v1/models shows what is served.", status=404)
            with self._room_for_texts(len(asked.texts)):
                classified = await _unless_gone(request, self._backend.classify(asked))
        return JSONResponse(classify_reply(classified, model=self._name))

    async def models(self, request: Request) -> Response:
        served = {
            "id": self._name,
            "object": "model",
            "owned_by": "trl-grpo-ext",
            "max_model_len": self._backend.max_tokens,
        }
        return JSONResponse({"object": "list", "data": [served]})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _read(self, request: Request, read: Callable[..., T]) -> T:
        body = await _body(request, limits=self._limits)
        return await asyncio.to_thread(read, body, limits=self._limits)

    @contextlib.contextmanager
    def _room_for_request(self) -> Iterator[None]:
        if self._num_requests >= self._limits.requests:
            raise _overloaded()
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    @contextlib.contextmanager
    def _room_for_texts(self, num_texts: int) -> Iterator[None]:
        if self._num_texts + num_texts > self._limits.texts_in_flight:
            raise _overloaded()
        self._num_texts += num_texts
        try:
            yield
        finally:
            self._num_texts -= num_texts


class _TokenCheck:
    """Lets through who sends the token, and everybody to ``/health``."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/health" or self._is_sent(scope):
            await self._app(scope, receive, send)
            return
        message = "The token is missing or wrong. Send it as Authorization: Bearer TOKEN."
        reply = _error(message, status=401, headers={"WWW-Authenticate": "Bearer"})
        await reply(scope, receive, send)

    def _is_sent(self, scope: Scope) -> bool:
        sent = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(sent, self._expected)


async def _body(request: Request, *, limits: Limits) -> bytes:
    """Return the body of a request, read no further than the limit."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise RefusedError("The content type is not application/json.", status=415)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RefusedError("The body is compressed. Send it as it is.", status=415)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.read_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    message = f"The body is above the limit of {limits.body_bytes} bytes."
                    raise RefusedError(f"{message} Send several requests.", status=413)
    except TimeoutError:
        raise RefusedError("The body did not arrive in time.", status=408) from None
    return bytes(body)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what the work returns; give it up when the client hangs up."""
    working = asyncio.ensure_future(work)
    hanging_up = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({working, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        hanging_up.cancel()


def _overloaded() -> RefusedError:
    return RefusedError("More is asked than this server takes at once. Try again.", status=429)


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, RefusedError):
        retry = {"Retry-After": str(RETRY_AFTER_S)} if error.status == 429 else None
        return _error(str(error), status=error.status, headers=retry)
    if isinstance(error, HTTPException):  # no such path or method
        return _error(error.detail, status=error.status_code, headers=error.headers)
    return _error("The client hung up.", status=400)  # nobody reads it


async def _failed(request: Request, error: Exception) -> Response:
    """Return what a client is told; the server's log has the traceback."""
    return _error("Scoring failed. The log of the server says why.", status=500)


def _error(message: str, *, status: int, headers: Any = None) -> Response:
    error = {"message": message, "type": HTTPStatus(status).phrase, "code": status}
    return JSONResponse({"error": error}, status_code=status, headers=headers)
