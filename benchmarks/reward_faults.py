"""Does a reward from an API stay right, bounded and complete while its service misbehaves?

Starts a service in another process that answers most requests badly on purpose (errors, resets,
cut-off, wrong, huge and late replies), scores completions with it, and compares with the true
scores, which follow from the texts. Some completions are never answered: those alone may be
unscored. Then the service is shut down, and a batch must come back in bounded time, all ``None``.

    python benchmarks/reward_faults.py --json

Ten thousand requests take some minutes on two cores. The last line of ``--json`` has `requests`,
`false_scores`, `unscored`, `lost_though_retriable`, `leaked_tasks`, `seconds` and more.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from email.utils import formatdate
from typing import Any

import psutil

from trl_grpo_ext.rewards.api.reward import APIReward
from trl_grpo_ext.rewards.api.scorer import Scorer
from trl_grpo_ext.rewards.api.wire import Item, Reply, UnreadableReplyError, WireRequest

SHARE_OF_500 = 0.3
SHARE_OF_EACH_OTHER = 0.02
NEVER = "(never answered)"
SERVED_S = 1.0  # that the client waits for a reply
MAX_REPLY_BYTES = 65_536
HUGE_BYTES = 32 * 2**20


def true_score(text: str) -> float:
    """Return the score that belongs to a text: a number from 0 to 1, different for each."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


@dataclass(frozen=True)
class Rerank:
    """A protocol whose service replies in the order of the scores, as rerankers do."""

    batch_size: int = 2
    version: str = "1"
    is_sampled: bool = False

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return requests for ``batch_size`` items each."""
        starts = range(0, len(items), self.batch_size)
        parts = [range(start, min(start + self.batch_size, len(items))) for start in starts]
        return [
            WireRequest("/rerank", {"texts": [items[i].completion for i in part]}, tuple(part))
            for part in parts
        ]

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the scores in the order of the request."""
        scores = {result["index"]: result["score"] for result in body["results"]}
        if sorted(scores) != list(range(len(request.indices))) or len(body["results"]) != len(
            scores
        ):
            raise UnreadableReplyError("the reply has other indices than the request")
        return Reply([scores[at] for at in range(len(scores))], tokens=body["tokens"])


@dataclass(frozen=True)
class Connection:
    """One request to the service, to be answered well or badly."""

    writer: asyncio.StreamWriter
    texts: Sequence[str]

    def right(self) -> bytes:
        """Return the right reply, sorted by score."""
        results = [{"index": i, "score": true_score(text)} for i, text in enumerate(self.texts)]
        results.sort(key=lambda result: -float(result["score"]))
        return json.dumps({"results": results, "tokens": 10 * len(results)}).encode()

    def send(self, body: bytes, *, status: str = "200 OK", length: int | None = None) -> None:
        """Send a reply that says that it has this length, or its own."""
        size = len(body) if length is None else length
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n"
        self.writer.write(head.encode() + b"\r\n" + body)

    def send_429(self, retry_after: str = "") -> None:
        """Send 'too many requests', perhaps with when to come again."""
        header = f"\r\nRetry-After: {retry_after}" if retry_after else ""
        self.send(b'{"error": "overloaded"}', status=f"429 Too Many Requests{header}")

    def cut(self) -> None:
        """Reset the connection."""
        tcp = self.writer.get_extra_info("socket")
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


async def _answer_500(asked: Connection) -> None:
    asked.send(b"<html>Internal Server Error</html>", status="500 Internal Server Error")


async def _answer_429(asked: Connection) -> None:
    asked.send_429()


async def _answer_429_seconds(asked: Connection) -> None:
    asked.send_429("1")


async def _answer_429_date(asked: Connection) -> None:
    asked.send_429(formatdate(time.time() + 1, usegmt=True))


async def _reset(asked: Connection) -> None:
    asked.cut()


async def _truncate(asked: Connection) -> None:
    whole = asked.right()
    asked.send(whole[: len(whole) // 2], length=len(whole))
    await asked.writer.drain()
    asked.writer.close()


async def _answer_half(asked: Connection) -> None:
    asked.send(asked.right()[:-9])


async def _answer_page(asked: Connection) -> None:
    asked.send(b"<html>We will be right back</html>")


async def _answer_too_few(asked: Connection) -> None:
    asked.send(b'{"results": [{"index": 1, "score": 0.5}], "tokens": 1}')


async def _answer_same_index(asked: Connection) -> None:
    results = [{"index": 0, "score": 0.5} for _ in asked.texts]
    asked.send(json.dumps({"results": results, "tokens": 1}).encode())


async def _answer_nan(asked: Connection) -> None:
    results = [{"index": i, "score": float("nan")} for i in range(len(asked.texts))]
    asked.send(json.dumps({"results": results, "tokens": 1}).encode())


async def _answer_beyond_floats(asked: Connection) -> None:
    results = ",".join(f'{{"index": {i}, "score": 1e999}}' for i in range(len(asked.texts)))
    asked.send(f'{{"results": [{results}], "tokens": 1}}'.encode())


async def _answer_twice_named(asked: Connection) -> None:
    results = ",".join(
        f'{{"index": {i}, "score": 0.1, "score": 0.9}}' for i in range(len(asked.texts))
    )
    asked.send(f'{{"results": [{results}], "tokens": 1}}'.encode())


async def _answer_deep(asked: Connection) -> None:
    asked.send(b"[" * 30_000 + b"]" * 30_000)


async def _answer_huge(asked: Connection) -> None:
    asked.send(b"", length=HUGE_BYTES)
    for _ in range(HUGE_BYTES // 65_536):
        asked.writer.write(b" " * 65_536)
        await asked.writer.drain()


async def _drip(asked: Connection) -> None:
    whole = asked.right()
    asked.send(b"", length=len(whole))
    for byte in whole:
        asked.writer.write(bytes([byte]))
        await asked.writer.drain()
        await asyncio.sleep(4 * SERVED_S / len(whole))


async def _answer_late(asked: Connection) -> None:
    await asyncio.sleep(2 * SERVED_S)
    asked.send(asked.right())


async def _answer_right(asked: Connection) -> None:
    asked.send(asked.right())


Answering = Callable[[Connection], Coroutine[Any, Any, None]]

OTHERS: tuple[Answering, ...] = (
    _answer_429,
    _answer_429_seconds,
    _answer_429_date,
    _reset,
    _truncate,
    _answer_half,
    _answer_page,
    _answer_too_few,
    _answer_same_index,
    _answer_nan,
    _answer_beyond_floats,
    _answer_twice_named,
    _answer_deep,
    _answer_huge,
    _drip,
    _answer_late,
)


def _chosen(texts: Sequence[str], draw: random.Random) -> Answering:
    if any(NEVER in text for text in texts):
        return _answer_500
    shares = [SHARE_OF_500, *[SHARE_OF_EACH_OTHER] * len(OTHERS)]
    choices = [_answer_500, *OTHERS, _answer_right]
    return draw.choices(choices, [*shares, 1 - sum(shares)])[0]


async def _serve(*, seed: int) -> None:
    draw = random.Random(seed)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                asked = Connection(writer, json.loads(await _read_body(reader))["texts"])
                await _chosen(asked.texts, draw)(asked)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=2**20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _read_body(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").lower().split("\r\n")
    (length,) = [line.partition(":")[2] for line in lines if line.startswith("content-length")]
    return await reader.readexactly(int(length))


@contextmanager
def service(*, seed: int = 0) -> Any:
    """Run the service in another process while in the block; give its address."""
    command = [sys.executable, __file__, "--serve", "--seed", str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def faulty_reward(address: str, **options: Any) -> APIReward:
    """Return a reward that is as patient as this service needs."""
    settings: dict[str, Any] = {
        "timeout_s": SERVED_S,
        "deadline_s": 900.0,
        "max_attempts": 30,
        "backoff_s": 0.02,
        "max_backoff_s": 0.5,
        "max_concurrent": 64,
        "max_reply_bytes": MAX_REPLY_BYTES,
        "cache": False,
    }
    return APIReward(address, protocol=Rerank(), log_as="faulty", **{**settings, **options})


@dataclass(frozen=True)
class Result:
    """What the benchmark prints."""

    requests: int
    false_scores: int
    unscored: int
    lost_though_retriable: int
    leaked_tasks: int
    seconds: float
    leaked_sockets: int
    leaked_threads: int
    sent: int
    retries: int
    latency_p95_s: float
    peak_memory_growth_bytes: int
    down_unscored_fraction: float
    down_seconds: float


def measure(*, num_requests: int, seed: int) -> Result:
    """Score completions with a service that misbehaves, then with none."""
    process, num_threads = psutil.Process(), threading.active_count()
    sockets_before = len(process.net_connections(kind="inet"))
    texts = [
        f"text {i}{NEVER if i % 400 < Rerank.batch_size else ''}"
        for i in range(num_requests * Rerank.batch_size)
    ]
    with service(seed=seed) as address, MemoryPeak(process) as peak:
        reward = faulty_reward(address)
        started = time.monotonic()
        scores = reward(prompts=[""] * len(texts), completions=texts)
        seconds, statistics = time.monotonic() - started, reward.statistics
        leaked_tasks = reward.session().wait(_count_tasks)
        reward.close()
    down_scores, down_seconds = _without_service(address)
    pairs = list(zip(texts, scores, strict=True))
    return Result(
        requests=num_requests,
        false_scores=sum(score not in (None, true_score(text)) for text, score in pairs),
        unscored=scores.count(None),
        lost_though_retriable=sum(score is None and NEVER not in text for text, score in pairs),
        leaked_tasks=leaked_tasks,
        seconds=round(seconds, 2),
        leaked_sockets=len(process.net_connections(kind="inet")) - sockets_before,
        leaked_threads=threading.active_count() - num_threads,
        sent=statistics.requests,
        retries=statistics.retries,
        latency_p95_s=round(statistics.latency_p95_s, 4),
        peak_memory_growth_bytes=peak.growth_bytes,
        down_unscored_fraction=down_scores.count(None) / len(down_scores),
        down_seconds=round(down_seconds, 2),
    )


async def _count_tasks(_: Scorer) -> int:
    """Return the tasks of the loop beside the one that keeps it open and the one that counts."""
    await asyncio.sleep(0)
    return len(asyncio.all_tasks()) - 2


def _without_service(address: str) -> tuple[list[float | None], float]:
    started = time.monotonic()
    with faulty_reward(address, max_attempts=1000, deadline_s=3.0) as reward:
        scores = reward(prompts=[""] * 200, completions=[f"text {i}" for i in range(200)])
    return scores, time.monotonic() - started


class MemoryPeak:
    """The growth of this process's memory while in the block, looked at each 50 ms."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.growth_bytes = 0

    def _watch(self) -> None:
        start = self._process.memory_info().rss
        while not self._ended.wait(0.05):
            self.growth_bytes = max(self.growth_bytes, self._process.memory_info().rss - start)

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000, help="of two completions each")
    parser.add_argument("--seed", type=int, default=0, help="of what the service does")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--serve", action="store_true", help="be the service")
    options = parser.parse_args(arguments)
    if options.serve:
        with suppress(KeyboardInterrupt):
            asyncio.run(_serve(seed=options.seed))
        return
    figures = asdict(measure(num_requests=options.requests, seed=options.seed))
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:26} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
