"""Items to scores: what was asked early, what the cache has, and the rest over the network."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trl_grpo_ext.rewards.api.cache import ScoreCache, request_key
from trl_grpo_ext.rewards.api.client import Answer, RewardClient
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireProtocol, WireRequest, mean_scores
from trl_grpo_ext.rewards.scores import Score


@dataclass(frozen=True)
class Scored:
    """The scores of a batch, and what became of its requests."""

    scores: list[Score]
    answers: list[Answer]


@dataclass(frozen=True)
class _Job:
    """A request that is under way."""

    request: WireRequest
    task: asyncio.Task[Answer]

    def moved(self, positions: Sequence[int]) -> _Job:
        """Return the job with its indices in a larger batch."""
        indices = tuple(positions[index] for index in self.request.indices)
        return dataclasses.replace(self, request=dataclasses.replace(self.request, indices=indices))


class Scorer:
    """Scores items; belongs to one event loop, whose thread alone may call it.

    Attributes:
        client: What asks the service.

    Args:
        client: Asks the service.
        protocol: Makes the requests.
        identity: What beside a request determines its scores; JSON.
        cache: ``None`` without one.
        forget_after_s: How long an answer that nobody collects is kept.
    """

    def __init__(
        self,
        client: RewardClient,
        protocol: WireProtocol,
        *,
        identity: object,
        cache: ScoreCache | None = None,
        forget_after_s: float = 3600.0,
    ) -> None:
        self.client = client
        self._protocol = protocol
        self._identity = identity
        self._cache = cache
        self._forget_after_s = forget_after_s
        self._early: dict[str, tuple[float, list[_Job]]] = {}
        self._tasks: set[asyncio.Task[Answer]] = set()

    async def submit(self, item: Item) -> None:
        """Ask for one item's score; nothing happens if that was done already.

        Protocols that compare the completions of a group have nothing to ask about a single one.
        """
        self._forget_old()
        requests = self._protocol.requests([item])
        key = self._item_key(requests)
        if requests and key not in self._early:
            self._early[key] = (self._now(), self._start(requests))

    async def collect(self, items: Sequence[Item]) -> Scored:
        """Return the scores of the items, asking for those that were not submitted.

        Raises:
            RewardError: as :meth:`RewardClient.ask`. The other requests of the batch are cancelled.
        """
        jobs = self._jobs(items)
        tasks = {job.task for job in jobs}
        try:
            await _finish(tasks)
        finally:
            for task in tasks:
                task.cancel()
        answered = [(job.request, _answer(job.task)) for job in jobs]
        replies = [(request, answer.reply) for request, answer in answered if answer.reply]
        scores = mean_scores(replies, num_items=len(items))
        return Scored(scores=scores, answers=[_answer(task) for task in tasks])

    async def close(self) -> None:
        """Cancel what is under way, and wait for the end of it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _jobs(self, items: Sequence[Item]) -> list[_Job]:
        """Return the requests for these items, each under way or done."""
        early, rest = self._collect_early(items), []
        jobs: list[_Job] = []
        for position in range(len(items)):
            if position in early:
                jobs += [job.moved([position]) for job in early[position]]
            else:
                rest.append(position)
        asked = self._start(self._protocol.requests([items[position] for position in rest]))
        return jobs + [job.moved(rest) for job in asked]

    def _collect_early(self, items: Sequence[Item]) -> dict[int, list[_Job]]:
        """Take out what was submitted: the jobs by the position of their item."""
        if not self._early:
            return {}
        keys = [self._item_key(self._protocol.requests([item])) for item in items]
        found = {at: self._early[key][1] for at, key in enumerate(keys) if key in self._early}
        for at in found:
            self._early.pop(keys[at], None)
        return found

    def _start(self, requests: Sequence[WireRequest]) -> list[_Job]:
        """Start the requests; equal ones are asked once, but of a judge that is sampled."""
        tasks: dict[str, asyncio.Task[Answer]] = {}
        jobs = []
        for request, key in zip(requests, self._keys(requests), strict=True):
            if key not in tasks:
                tasks[key] = self._task(request, key)
            jobs.append(_Job(request, tasks[key]))
        return jobs

    def _task(self, request: WireRequest, key: str) -> asyncio.Task[Answer]:
        task = asyncio.create_task(self._ask(request, key))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Answer]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # of one that nobody collects, asyncio would complain

    async def _ask(self, request: WireRequest, key: str) -> Answer:
        if self._cache is None:
            return await self.client.ask(request)
        kept = self._cache.get(key, num_scores=len(request.indices))
        if kept is not None:
            return Answer(Reply(kept), is_cached=True)
        answer = await self.client.ask(request)
        if answer.reply:
            self._cache.put(key, answer.reply.scores)
        return answer

    def _keys(self, requests: Sequence[WireRequest]) -> Iterator[str]:
        """Yield a key for each request; equal requests to a sampled judge are several votes."""
        seen: Counter[str] = Counter()
        for request in requests:
            key = request_key(request, identity=self._identity)
            yield f"{key}-{seen[key]}" if self._protocol.is_sampled else key
            seen[key] += 1

    def _item_key(self, requests: Sequence[WireRequest]) -> str:
        return " ".join(request_key(request, identity=self._identity) for request in requests)

    def _forget_old(self) -> None:
        """Drop what was submitted long ago and never collected."""
        oldest = self._now() - self._forget_after_s
        while self._early and (key := next(iter(self._early))):
            if self._early[key][0] >= oldest:
                return
            del self._early[key]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


async def _finish(tasks: set[asyncio.Task[Answer]]) -> None:
    """Wait for all tasks, or for the first that raises, and raise that."""
    if not tasks:
        return
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        if not task.cancelled() and (error := task.exception()):
            raise error


def _answer(task: asyncio.Task[Answer]) -> Answer:
    """Return what a finished task found; another thread's call may have cancelled it."""
    return Answer(None, failure="cancelled") if task.cancelled() else task.result()
