from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from trl_grpo_ext.rewards.serve.batching import Batcher, Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def whole_round(items: Sequence[Any]) -> list[list[int]]:
    return [list(range(len(items)))]


def test_batcher_shares_passes_and_gives_each_request_its_own(worker: Worker) -> None:
    passes: list[list[int]] = []

    def square(items: Sequence[int]) -> list[int]:
        passes.append(list(items))
        return [item * item for item in items]

    async def ask() -> list[list[int]]:
        batcher = Batcher(square, plan=lambda items: [[1, 3], [0, 2]], worker=worker, wait_s=0.05)
        return await asyncio.gather(batcher.submit([1, 2]), batcher.submit([3, 4]))

    assert asyncio.run(ask()) == [[1, 4], [9, 16]]
    assert passes == [[2, 4], [1, 3]]


def test_batcher_waits_for_others_before_a_pass(worker: Worker) -> None:
    passes: list[list[int]] = []

    def run(items: Sequence[int]) -> Sequence[int]:
        passes.append(list(items))
        return items

    async def ask() -> None:
        batcher = Batcher(run, plan=whole_round, worker=worker, wait_s=1)
        first = asyncio.ensure_future(batcher.submit([1]))
        await asyncio.sleep(0.1)
        assert await asyncio.gather(first, batcher.submit([2])) == [[1], [2]]

    asyncio.run(ask())
    assert passes == [[1, 2]]


def test_batcher_collects_for_the_next_round_while_one_runs(worker: Worker) -> None:
    passes: list[list[str]] = []
    may_go_on = threading.Event()

    def run(items: Sequence[str]) -> Sequence[str]:
        passes.append(list(items))
        assert may_go_on.wait(10)
        return items

    async def ask() -> None:
        batcher = Batcher(run, plan=whole_round, worker=worker, wait_s=0)
        first = asyncio.ensure_future(batcher.submit(["a"]))
        while not passes:
            await asyncio.sleep(0.01)
        later = [asyncio.ensure_future(batcher.submit([name])) for name in "bc"]
        await asyncio.sleep(0.01)
        may_go_on.set()
        assert await asyncio.gather(first, *later) == [["a"], ["b"], ["c"]]

    asyncio.run(ask())
    assert passes == [["a"], ["b", "c"]]


def test_batcher_fails_only_the_request_that_cannot_be_run(worker: Worker) -> None:
    def invert(items: Sequence[int]) -> list[float]:
        return [1 / item for item in items]

    async def ask() -> list[Any]:
        batcher = Batcher(invert, plan=whole_round, worker=worker, wait_s=0.05)
        asked = [batcher.submit(items) for items in ([1, 2], [4, 0], [5])]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second, third = asyncio.run(ask())
    assert (first, third) == ([1.0, 0.5], [0.2])
    assert isinstance(second, ZeroDivisionError)


def test_batcher_notices_a_pass_of_another_length(worker: Worker) -> None:
    async def ask() -> None:
        batcher = Batcher(lambda items: items[1:], plan=whole_round, worker=worker, wait_s=0)
        await batcher.submit([1, 2])

    with pytest.raises(AssertionError):
        asyncio.run(ask())


def test_batcher_leaves_out_what_nobody_waits_for(worker: Worker) -> None:
    passes: list[list[int]] = []

    def run(items: Sequence[int]) -> Sequence[int]:
        passes.append(list(items))
        return items

    async def ask() -> list[int]:
        batcher = Batcher(run, plan=whole_round, worker=worker, wait_s=0.05)
        left = asyncio.ensure_future(batcher.submit([1]))
        stays = asyncio.ensure_future(batcher.submit([2]))
        await asyncio.sleep(0)
        left.cancel()
        assert await batcher.submit([]) == []
        return await stays

    assert asyncio.run(ask()) == [2]
    assert passes == [[2]]


def test_worker_runs_blocking_calls_one_after_another_and_coroutines_together(
    worker: Worker,
) -> None:
    events: list[str] = []
    met = asyncio.Event()

    def blocking(name: str) -> None:
        events.extend([f"{name} in", f"{name} out"])

    async def waits() -> str:
        await asyncio.wait_for(met.wait(), 10)
        return "met"

    async def meets() -> None:
        met.set()

    async def ask() -> None:
        await asyncio.gather(worker.call(blocking, "a"), worker.call(blocking, "b"))
        assert (await asyncio.gather(worker.call(waits), worker.call(meets)))[0] == "met"

    asyncio.run(ask())
    assert events == ["a in", "a out", "b in", "b out"]


def test_worker_that_hangs_is_left_behind() -> None:
    worker, go_on = Worker(), threading.Event()

    async def ask(function: Callable[[], object]) -> None:
        call = asyncio.ensure_future(worker.call(function))
        await asyncio.sleep(0.05)
        call.cancel()

    asyncio.run(ask(lambda: go_on.wait(10)))
    worker.close(timeout_s=0.05)
    assert worker._thread.is_alive()
    go_on.set()
    worker.close(timeout_s=10)
    assert not worker._thread.is_alive()
