"""The client on an injected transport and a clock that does not wait: what is asked again."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from rewards.api.services import Lengths, lengths, now, run

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.api.client import Answer, RewardClient
from trl_grpo_ext.rewards.api.settings import APISettings
from trl_grpo_ext.rewards.api.wire import Item, WireRequest

KEY = "sk-tell/nobody+42"
REQUEST = Lengths().requests([Item("p", "four")])[0]


@dataclass(frozen=True)
class Replying:
    """A reply that can be given again and again, and is read from a stream."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    def __call__(self, _: httpx2.Request) -> httpx2.Response:
        stream = httpx2.ByteStream(self.body)
        return httpx2.Response(self.status, headers=self.headers, stream=stream)


def reply(status: int = 200, content: Any = None, **headers: str) -> Replying:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Replying(status, body, headers)


def right(request: httpx2.Request) -> httpx2.Response:
    return reply(content=lengths(json.loads(request.content)))(request)


class Service:
    """Replies in turn, the last one for ever; notes when and what it was asked."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.asked: list[tuple[float, httpx2.Request]] = []

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append((now(), request))
        found = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(found, Exception):
            raise found
        if isinstance(found, int | float):
            await asyncio.sleep(found)
            found = right
        answered: httpx2.Response = found(request)
        return answered

    @property
    def times(self) -> list[float]:
        return [time for time, _ in self.asked]


def ask(
    service: Callable[..., Any],
    *,
    request: WireRequest = REQUEST,
    urls: tuple[str, ...] = ("https://judge.example/v1",),
    protocol: Any = None,
    **settings: Any,
) -> Answer:
    async def work() -> Answer:
        options: dict[str, Any] = {"backoff_s": 1.0, "max_attempts": 3, **settings}
        async with RewardClient(
            APISettings(urls, **options),
            protocol or Lengths(),
            name="judge",
            transport=httpx2.MockTransport(service),
            uniform=lambda _, high: high,
        ) as client:
            return await client.ask(request)

    return run(work)


def test_answer_has_scores_tokens_and_how_long_it_took() -> None:
    service = Service(2.5)
    answer = ask(service)
    assert answer.reply
    assert (list(answer.reply.scores), answer.reply.tokens) == ([4.0], 10)
    assert answer.latency_s == pytest.approx(2.5)
    assert (answer.num_requests, answer.failure, answer.is_cached) == (1, "", False)
    (_, sent) = service.asked[0]
    assert str(sent.url) == "https://judge.example/v1/lengths"
    assert json.loads(sent.content) == REQUEST.payload


@pytest.mark.parametrize(
    "failure",
    [
        *[reply(status) for status in (408, 425, 429, 500, 502, 503, 504, 529, 599)],
        httpx2.ConnectError("refused"),
        httpx2.ConnectTimeout("late"),
        httpx2.ReadTimeout("late"),
        httpx2.ReadError("reset"),
        httpx2.RemoteProtocolError("peer closed connection"),
        reply(content=b"<html>"),
        reply(content={"scores": [1, 2]}),
        reply(content=b'{"scores": [NaN]}'),
        reply(content=b'{"scores": [' + b"9" * 400 + b"]}"),
        reply(204, content=b""),
        999.0,  # seconds, beyond timeout_s
    ],
    ids=lambda failure: str(failure)[:40],
)
def test_what_may_pass_is_asked_again(failure: Any) -> None:
    service = Service(failure, right)
    answer = ask(service, timeout_s=100.0)
    assert answer.reply
    assert list(answer.reply.scores) == [4.0]
    assert answer.num_requests == 2
    assert service.times[1] >= 1.0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 410, 413, 422])
def test_other_refusals_are_errors_of_configuration(status: int) -> None:
    service = Service(reply(status, {"error": {"message": "no model judge-71b"}}))
    with pytest.raises(RewardError) as caught:
        ask(service)
    message = str(caught.value)
    assert (
        f"reward 'judge' was refused by https://judge.example/v1/lengths (HTTP {status}" in message
    )
    assert "no model judge-71b" in message
    assert "Check" in message
    assert len(service.asked) == 1


def test_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    said = {"error": f"bad key {KEY}", "url": f"?key={KEY}", "a": KEY.replace("/", "%2F")}
    service = Service(reply(401, json.dumps(said).replace("/", r"\/").encode()))
    with pytest.raises(RewardError) as caught:
        ask(service, api_key_env="JUDGE_KEY")
    assert service.asked[0][1].headers["authorization"] == f"Bearer {KEY}"
    assert "tell" not in repr(caught.value)
    assert b"tell" not in pickle.dumps(caught.value)
    assert caught.value.__cause__ is None


def test_key_goes_into_another_header_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    service = Service(right)
    ask(service, api_key_env="JUDGE_KEY", api_key_header="api-key")
    headers = service.asked[0][1].headers
    assert headers["api-key"] == KEY
    assert "authorization" not in headers


def test_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    service = Service(reply(307, location=f"https://elsewhere.example/v1?key={KEY}"))
    with pytest.raises(RewardError) as caught:
        ask(service, api_key_env="JUDGE_KEY")
    assert "moved to https://elsewhere.example/v1, which is not followed" in str(caught.value)
    assert "tell" not in str(caught.value)
    assert [request.url.host for _, request in service.asked] == ["judge.example"]


def test_wait_that_the_service_asks_for_is_kept() -> None:
    service = Service(reply(429, **{"retry-after": "17"}), right)
    assert ask(service).reply
    assert service.times == pytest.approx([0, 17], abs=1e-3)


def test_service_that_is_down_gives_no_score_after_the_last_attempt() -> None:
    service = Service(reply(503))
    answer = ask(service, max_attempts=4)
    assert answer == Answer(None, num_requests=4, failure="HTTP 503")
    assert service.times == pytest.approx([0, 1, 3, 7], abs=1e-3)


def test_service_that_hangs_gives_no_score_at_the_deadline() -> None:
    async def timed() -> float:
        async with RewardClient(
            APISettings(("https://judge.example",), timeout_s=40.0, deadline_s=100.0),
            Lengths(),
            name="judge",
            transport=httpx2.MockTransport(Service(1e9)),
        ) as client:
            answer = await client.ask(REQUEST)
        assert answer.reply is None
        assert answer.failure == "no answer in time (`timeout_s`)"
        return now()

    assert 80 < run(timed) < 100.01


def test_wait_for_a_free_slot_counts_towards_the_deadline() -> None:
    service = Service(60.0)

    async def work() -> list[Answer]:
        settings = APISettings(("https://judge.example",), max_concurrent=1, deadline_s=100.0)
        transport = httpx2.MockTransport(service)
        async with RewardClient(settings, Lengths(), name="judge", transport=transport) as client:
            return await asyncio.gather(*(client.ask(REQUEST) for _ in range(3)))

    answers = run(work)
    assert [answer.reply is not None for answer in answers] == [True, False, False]
    assert [answer.num_requests for answer in answers] == [1, 1, 0]
    assert answers[2].failure == "no answer before `deadline_s`"


def test_addresses_are_tried_in_order_without_a_wait() -> None:
    def by_host(request: httpx2.Request) -> httpx2.Response:
        return right(request) if request.url.host == "c.example" else reply(500)(request)

    service = Service(by_host)
    answer = ask(service, urls=("https://a.example", "https://b.example/", "https://c.example"))
    assert answer.reply
    assert service.times == pytest.approx([0, 0, 0], abs=1e-3)
    assert [request.url.host for _, request in service.asked] == [
        "a.example",
        "b.example",
        "c.example",
    ]


def test_address_that_cannot_be_reached_is_tried_last_by_the_next_request() -> None:
    hosts = []

    def by_host(request: httpx2.Request) -> httpx2.Response:
        hosts.append(request.url.host)
        if request.url.host == "a.example":
            raise httpx2.ConnectError("refused")
        return right(request)

    async def work() -> None:
        settings = APISettings(("https://a.example", "https://b.example"))
        transport = httpx2.MockTransport(by_host)
        async with RewardClient(settings, Lengths(), name="judge", transport=transport) as client:
            await client.ask(REQUEST)
            await client.ask(REQUEST)

    run(work)
    assert hosts == ["a.example", "b.example", "b.example"]


def test_nobody_there_is_said_once_in_an_outage(caplog: pytest.LogCaptureFixture) -> None:
    refused = httpx2.ConnectError("refused")
    service = Service(refused, refused, right, reply(503), right, refused)

    async def work() -> None:
        settings = APISettings(("https://user:pw@judge.example/v1",), max_attempts=3, deadline_s=90)
        transport = httpx2.MockTransport(service)
        async with RewardClient(settings, Lengths(), name="judge", transport=transport) as client:
            for _ in range(3):
                await client.ask(REQUEST)

    run(work)
    assert len(service.asked) == 8  # 3 for the first answer, 2 for the second, 3 for none
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("reward 'judge' does not reach https://judge.example")
    assert "It asks again for up to 90 s a request." in caplog.messages[0]


class Endless(httpx2.AsyncByteStream):
    """A body without an end; counts what was read of it."""

    num_bytes = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.num_bytes += 1000
            yield b" " * 1000


@pytest.mark.parametrize(("status", "most"), [(200, 6000), (500, 70_000)])
def test_body_is_cut_off_at_its_limit(status: int, most: int) -> None:
    stream = Endless()
    service = Service(lambda _: httpx2.Response(status, stream=stream))
    answer = ask(service, max_attempts=1, max_reply_bytes=5000)
    assert answer.reply is None
    assert stream.num_bytes <= most
    if status == 200:
        assert answer.failure == "the reply is longer than `max_reply_bytes`=5000"


def test_body_of_exactly_the_limit_is_read() -> None:
    body = b'{"scores": [4]}'
    answer = ask(Service(reply(content=body)), max_reply_bytes=len(body))
    assert answer.reply
    assert ask(Service(reply(content=body)), max_reply_bytes=len(body) - 1).reply is None


def test_compressed_reply_is_not_unpacked() -> None:
    stream = Endless()
    headers = {"content-encoding": "gzip"}
    service = Service(lambda _: httpx2.Response(200, headers=headers, stream=stream))
    answer = ask(service, max_attempts=1)
    assert "compressed" in answer.failure
    assert stream.num_bytes == 0
    assert service.asked[0][1].headers["accept-encoding"] == "identity"


def test_finite_scores_beside_a_lasting_nan_are_kept() -> None:
    huge = b"9" * 400
    service = Service(reply(content=b'{"scores": [1, ' + huge + b', 3], "tokens": 5}'))
    request = WireRequest("/lengths", {"texts": ["", "", ""]}, (0, 1, 2))
    answer = ask(service, request=request)
    assert answer.reply
    assert list(answer.reply.scores) == [1.0, None, 3.0]
    assert (answer.num_requests, answer.failure) == (
        3,
        "the reply has a score of NaN or infinity",
    )


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_request_that_is_not_json_is_an_error(value: object) -> None:
    payload: Mapping[str, Any] = {"answer": value}
    with pytest.raises(RewardError, match="reward 'judge' cannot write its request as JSON"):
        ask(Service(right), request=WireRequest("/lengths", payload, (0,)))


def test_lone_surrogates_in_a_completion_are_sent() -> None:
    service = Service(reply(content={"scores": [1]}))
    ask(service, request=WireRequest("/lengths", {"texts": ["\ud800"]}, (0,)))
    assert service.asked[0][1].content == b'{"texts":["\\ud800"]}'
