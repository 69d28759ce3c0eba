"""Items to scores: what was asked early, what the cache has, and the rest over the network."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from trl_grpo_ext.rewards.api.cache import ScoreCache, request_key
from trl_grpo_ext.rewards.api.client import Answer, RewardClient
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireProtocol, WireRequest, mean_scores
from trl_grpo_ext.rewards.scores import Score


@dataclass(frozen=True)
class Scored:
    """The scores of a batch, and what became of its requests.

    Attributes:
        scores: In the order of the items.
        answers: To the requests, each once.
        num_failed: Items without a score that a request without an answer asked about.
    """

    scores: list[Score]
    answers: list[Answer]
    num_failed: int


@dataclass(frozen=True)
class _Job:
    """A request that is under way."""

    request: WireRequest
    task: asyncio.Task[Answer]

    def moved(self, positions: Sequence[int]) -> _Job:
        """Return the job with its indices in a larger batch."""
        indices = tuple(positions[index] for index in self.request.indices)
        return dataclasses.replace(self, request=dataclasses.replace(self.request, indices=indices))


@dataclass
class _Early:
    """What was submitted: the jobs of each copy of it."""

    since: float  # [s] on the loop's clock
    copies: dict[Hashable, list[_Job]] = field(default_factory=dict)

    @property
    def has_copy(self) -> bool:
        """Whether there is one to collect; one that failed meanwhile is to be asked for again."""
        self.copies = {copy: jobs for copy, jobs in self.copies.items() if not _failed(jobs)}
        return bool(self.copies)

    def take(self, *, once: bool) -> list[_Job]:
        """Return the jobs of the first copy; if ``once``, the next call gets another copy's."""
        first = next(iter(self.copies))
        return self.copies.pop(first) if once else self.copies[first]


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
        self._early: dict[str, _Early] = {}
        self._tasks: set[asyncio.Task[Answer]] = set()

    async def submit(self, items: Sequence[Item], *, copy: Hashable = None) -> None:
        """Ask for the scores of items that are asked about together, without waiting.

        That is a single item, or all completions of a prompt for a protocol that compares them.

        Args:
            items: To be scored.
            copy: Which of several equal submissions this is; the same one again changes nothing.
        """
        self._forget_old()
        requests = self._protocol.requests(items)
        if not requests:
            return
        early = self._early.setdefault(self._key(requests), _Early(self._now()))
        if copy in early.copies:
            return
        if early.copies and not self._protocol.is_sampled:
            early.copies[copy] = next(iter(early.copies.values()))
        else:
            early.copies[copy] = self._start(requests, num_before=len(early.copies))

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
        failed = {at for request, answer in answered if answer.failure for at in request.indices}
        return Scored(
            scores=scores,
            answers=[_answer(task) for task in tasks],
            num_failed=sum(scores[at] is None for at in failed),
        )

    def give_up(self) -> None:
        """Cancel what is under way: what was asked for is collected with the scores there are."""
        self._early.clear()
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Cancel what is under way, and wait for the end of it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _jobs(self, items: Sequence[Item]) -> list[_Job]:
        """Return the requests for these items, each under way or done."""
        jobs, rest = self._collect_early(items)
        asked = self._start(self._protocol.requests([items[position] for position in rest]))
        return jobs + [job.moved(rest) for job in asked]

    def _collect_early(self, items: Sequence[Item]) -> tuple[list[_Job], list[int]]:
        """Take out what was submitted; return its jobs, and the positions of the other items."""
        if not self._early:
            return [], list(range(len(items)))
        jobs, rest, used = [], [], set()
        for positions in self._units(items):
            key = self._key(self._protocol.requests([items[at] for at in positions]))
            if (early := self._early.get(key)) is None or not early.has_copy:
                rest += positions
                continue
            used.add(key)
            jobs += [job.moved(positions) for job in early.take(once=self._protocol.is_sampled)]
        for key in used:
            del self._early[key]
        return jobs, sorted(rest)

    def _units(self, items: Sequence[Item]) -> list[list[int]]:
        """Return the positions of items that are asked about together."""
        if not getattr(self._protocol, "is_relative", False):
            return [[position] for position in range(len(items))]
        groups: dict[int, list[int]] = {}
        for position, item in enumerate(items):
            groups.setdefault(item.group, []).append(position)
        return list(groups.values())

    def _start(self, requests: Sequence[WireRequest], *, num_before: int = 0) -> list[_Job]:
        """Start the requests; equal ones are asked once, but of a judge that is sampled."""
        tasks: dict[str, asyncio.Task[Answer]] = {}
        jobs = []
        for request, key in zip(requests, self._keys(requests, num_before), strict=True):
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

    def _keys(self, requests: Sequence[WireRequest], num_before: int) -> Iterator[str]:
        """Yield a key for each request; equal requests to a sampled judge are several votes."""
        keys = [request_key(request, identity=self._identity) for request in requests]
        if not self._protocol.is_sampled:
            yield from keys
            return
        seen = Counter({key: num_before * count for key, count in Counter(keys).items()})
        for key in keys:
            yield f"{key}-{seen[key]}"
            seen[key] += 1

    def _key(self, requests: Sequence[WireRequest]) -> str:
        return " ".join(request_key(request, identity=self._identity) for request in requests)

    def _forget_old(self) -> None:
        """Drop what was submitted long ago and never collected."""
        oldest = self._now() - self._forget_after_s
        while self._early and (key := next(iter(self._early))):
            if self._early[key].since >= oldest:
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


def _failed(jobs: Sequence[_Job]) -> bool:
    tasks = [job.task for job in jobs]
    return any(
        task.done() and (task.cancelled() or (not task.exception() and task.result().failure))
        for task in tasks
    )


def _answer(task: asyncio.Task[Answer]) -> Answer:
    """Return what a finished task found; another thread's call may have cancelled it."""
    return Answer(None, failure="cancelled") if task.cancelled() else task.result()
