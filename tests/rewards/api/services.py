"""What the tests of API rewards stand on: a protocol, a service, a loop that does not wait."""

from __future__ import annotations

import asyncio
import json
import selectors
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

from trl_grpo_ext.rewards.api.wire import Item, Reply, UnreadableReplyError, WireRequest

T = TypeVar("T")


@dataclass(frozen=True)
class Lengths:
    """Asks for the scores of ``batch_size`` texts a request, ``votes`` times."""

    batch_size: int = 1
    votes: int = 1
    is_sampled: bool = False
    version: str = "1"
    rubric: str = ""

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        starts = range(0, len(items), self.batch_size)
        parts = [range(start, min(start + self.batch_size, len(items))) for start in starts]
        return [self._request(items, tuple(part)) for part in parts for _ in range(self.votes)]

    def _request(self, items: Sequence[Item], part: tuple[int, ...]) -> WireRequest:
        texts = [f"{items[at].prompt}|{items[at].completion}" for at in part]
        expected = {"answers": [items[at].columns.get("answer") for at in part]}
        return WireRequest("/lengths", {"texts": texts, "rubric": self.rubric}, part, expected)

    def parse(self, request: WireRequest, body: Any) -> Reply:
        if "scores" not in body:
            raise UnreadableReplyError("the reply has no `scores`")
        return Reply(body["scores"], tokens=body.get("tokens", 0))


def lengths(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The right reply to :class:`Lengths`: the length of each completion, 10 tokens each."""
    completions = [text.partition("|")[2] for text in payload["texts"]]
    return {"scores": [len(text) for text in completions], "tokens": 10 * len(completions)}


@dataclass
class Asked:
    """A request that the service got."""

    path: str
    headers: Mapping[str, str]
    payload: Any


@dataclass
class Service:
    """A service on this machine: ``answer`` gives status, headers and body of each reply."""

    answer: Callable[[Asked], tuple[int, Mapping[str, str], bytes]]
    url: str = ""
    asked: list[Asked] = field(default_factory=list)


def right(asked: Asked) -> tuple[int, Mapping[str, str], bytes]:
    return 200, {}, json.dumps(lengths(asked.payload)).encode()


@contextmanager
def serving(
    answer: Callable[[Asked], tuple[int, Mapping[str, str], bytes]] = right,
) -> Iterator[Service]:
    """Run a service in threads while in the block."""
    service = Service(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            asked = Asked(self.path, dict(self.headers), json.loads(body))
            service.asked.append(asked)
            status, headers, reply = service.answer(asked)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(reply)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    service.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Selector(selectors.SelectSelector):
    """Does not wait: a wait moves the clock instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits, and no timer is set"
        self.now += max(timeout, 1e-9)  # time passes, as limiters that round rely on
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in a loop whose time starts at 0 and passes without waiting."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work())


def now() -> float:
    return asyncio.get_running_loop().time()
