"""Items to scores: what is asked once, what is asked early, what the cache has."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest
from rewards.api.services import Lengths, lengths, run

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.api.cache import ScoreCache
from trl_grpo_ext.rewards.api.client import RewardClient
from trl_grpo_ext.rewards.api.scorer import Scorer
from trl_grpo_ext.rewards.api.settings import APISettings
from trl_grpo_ext.rewards.api.wire import Item

T = TypeVar("T")


class Service:
    """Gives the right scores after a second, but refuses and breaks on two words."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.breaks = True

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        payload = json.loads(request.content)
        self.texts += payload["texts"]
        await asyncio.sleep(1.0)
        status = 401 if "|refuse" in payload["texts"][0] else 200
        breaks = self.breaks and "break" in payload["texts"][0]
        status = 503 if breaks else status
        body = json.dumps(lengths(payload)).encode()
        return httpx2.Response(status, stream=httpx2.ByteStream(body))


def with_scorer(
    work: Callable[[Scorer], Coroutine[Any, Any, T]],
    *,
    service: Service,
    protocol: Lengths | None = None,
    cache: ScoreCache | None = None,
    max_concurrent: int = 32,
    **options: Any,
) -> T:
    settings = APISettings(
        ("https://judge.example",), max_attempts=2, max_concurrent=max_concurrent
    )
    chosen = protocol or Lengths()

    async def opened() -> T:
        transport = httpx2.MockTransport(service)
        async with RewardClient(settings, chosen, name="judge", transport=transport) as client:
            scorer = Scorer(client, chosen, identity=chosen.version, cache=cache, **options)
            result = await work(scorer)
            await scorer.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return result

    return run(opened)


def items(*completions: str) -> list[Item]:
    return [Item("p", completion) for completion in completions]


def scores(service: Service, asked: Sequence[Item], **options: Any) -> list[float | None]:
    async def work(scorer: Scorer) -> list[float | None]:
        return (await scorer.collect(asked)).scores

    return with_scorer(work, service=service, **options)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 99])
def test_scores_are_in_the_order_of_the_items(batch_size: int) -> None:
    asked = items("a", "bbb", "cc", "", "eeeee")
    found = scores(Service(), asked, protocol=Lengths(batch_size=batch_size))
    assert found == [1, 3, 2, 0, 5]


def test_what_cannot_be_scored_is_none_and_the_rest_is_kept() -> None:
    assert scores(Service(), items("a", "break", "cc")) == [1, None, 2]


def test_equal_requests_are_sent_once() -> None:
    service = Service()
    assert scores(service, items("a", "bb", "a")) == [1, 2, 1]
    assert service.texts == ["p|a", "p|bb"]


def test_equal_requests_to_a_sampled_judge_are_votes() -> None:
    service = Service()
    sampled = Lengths(votes=3, is_sampled=True)
    assert scores(service, items("a", "a"), protocol=sampled) == [1, 1]
    assert service.texts == ["p|a"] * 6


def test_refusal_ends_the_batch() -> None:
    service = Service()
    with pytest.raises(RewardError, match="HTTP 401"):
        scores(service, items("break", "refuse", "a"))


def test_refusal_cancels_what_was_not_sent_yet() -> None:
    service = Service()

    async def work(scorer: Scorer) -> None:
        with pytest.raises(RewardError):
            await scorer.collect(items("refuse", "a", "bb", "ccc", "dddd"))
        await asyncio.sleep(100.0)

    with_scorer(work, service=service, max_concurrent=1)
    assert len(service.texts) <= 2


def test_submitted_item_is_asked_once_and_collected_later() -> None:
    service = Service()

    async def work(scorer: Scorer) -> list[Any]:
        for _ in range(3):
            await scorer.submit([Item("p", "early", {"answer": 7}, group=5)])
        await asyncio.sleep(2.0)
        sent = list(service.texts)
        batch = [Item("p", "late"), Item("p", "early", {"answer": 7, "unused": 1}), *items("early")]
        first = await scorer.collect(batch)
        again = await scorer.collect(batch[1:2])
        return [sent, first.scores, again.scores]

    sent, first, again = with_scorer(work, service=service)
    assert sent == ["p|early"]
    assert first == [4, 5, 5]
    assert again == [5]
    # Another answer is expected of the last item, so it is another request; and what was
    # collected is forgotten.
    assert service.texts == ["p|early", "p|late", "p|early", "p|early"]


def test_equal_completions_of_a_group_share_what_was_submitted() -> None:
    service = Service()

    async def work(scorer: Scorer) -> list[float | None]:
        await scorer.submit([Item("p", "twin")])
        await scorer.submit([Item("p", "twin")])
        return (await scorer.collect(items("twin", "twin", "a"))).scores

    assert with_scorer(work, service=service) == [4, 4, 1]
    assert service.texts == ["p|twin", "p|a"]


def test_refusal_of_what_was_submitted_is_raised_when_it_is_collected() -> None:
    async def work(scorer: Scorer) -> None:
        await scorer.submit([Item("p", "refuse")])
        await asyncio.sleep(2.0)
        with pytest.raises(RewardError, match="HTTP 401"):
            await scorer.collect(items("refuse"))

    with_scorer(work, service=Service())


def test_what_nobody_collects_is_forgotten() -> None:
    service = Service()

    async def work(scorer: Scorer) -> None:
        await scorer.submit([Item("p", "old")])
        await asyncio.sleep(100.0)
        await scorer.submit([Item("p", "new")])
        await scorer.collect(items("old", "new"))

    with_scorer(work, service=service, forget_after_s=60.0)
    assert service.texts == ["p|old", "p|new", "p|old"]


def test_kept_scores_are_not_asked_for_again(tmp_path: Path) -> None:
    service, cache = Service(), ScoreCache(tmp_path)
    assert scores(service, items("a", "break"), cache=cache) == [1, None]
    service.texts.clear()

    async def work(scorer: Scorer) -> None:
        found = await scorer.collect(items("a", "break"))
        assert found.scores == [1, None]
        assert [answer.is_cached for answer in found.answers].count(True) == 1

    with_scorer(work, service=service, cache=cache)
    assert set(service.texts) == {"p|break"}
    assert scores(service, items("a"), cache=cache, protocol=Lengths(version="2")) == [1]
    assert service.texts[-1] == "p|a"
    cache.close()


def test_votes_of_a_sampled_judge_are_kept_apart(tmp_path: Path) -> None:
    service, cache = Service(), ScoreCache(tmp_path)
    sampled = Lengths(votes=2, is_sampled=True)
    for _ in range(2):
        assert scores(service, items("a"), protocol=sampled, cache=cache) == [1]
    assert service.texts == ["p|a", "p|a"]
    cache.close()


def test_what_failed_early_is_asked_again_when_it_is_collected() -> None:
    service = Service()

    async def work(scorer: Scorer) -> list[float | None]:
        await scorer.submit([Item("p", "late break")])
        await asyncio.sleep(60)  # both attempts are over
        service.breaks = False
        return (await scorer.collect(items("late break"))).scores

    assert with_scorer(work, service=service) == [10.0]
