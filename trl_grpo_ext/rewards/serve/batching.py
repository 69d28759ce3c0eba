"""Dynamic batching: texts of several requests in one forward pass."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Worker:
    """A thread beside the server's event loop, in which the model or the function runs.

    Blocking calls run one after another, in the order in which they came; coroutines share the
    thread. It does not keep a process from ending, even if a call never returns.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="reward-worker", daemon=True
        )
        self._thread.start()

    async def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns, awaited if that is a coroutine; its errors too."""
        call = _called(function, *args, **kwargs)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self._loop))

    def close(self, *, timeout_s: float = 1.0) -> None:
        """End the thread after the call that it is in, or leave it if that takes longer."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._loop.close()


async def _called(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    result = function(*args, **kwargs)
    return await result if inspect.isawaitable(result) else result


@dataclass(eq=False)
class _Request(Generic[Result]):
    """A request whose texts may be in several passes."""

    future: asyncio.Future[list[Result]]
    arrived_s: float
    num_items: int
    results: dict[int, Result] = field(default_factory=dict)

    def finish(self, index: int, result: Result) -> None:
        self.results[index] = result
        if len(self.results) == self.num_items and not self.future.done():
            self.future.set_result([self.results[index] for index in range(self.num_items)])

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[Item, Result]):
    request: _Request[Result]
    index: int
    item: Item


class Batcher(Generic[Item, Result]):
    """Runs the items of requests that arrive together in shared passes.

    A round takes everything that waits: the first request waits ``wait_s`` for others, and what
    arrives during a round goes into the next one, so no text waits longer than a round. A pass
    that fails is tried again request by request, so that only the culprit's client hears of it.

    Args:
        run: One pass: items to as many results. It runs in ``worker``.
        plan: The items of a round to the indices of each pass.
        worker: See :class:`Worker`.
        wait_s: How long a request waits for others.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        plan: Callable[[Sequence[Item]], Sequence[Sequence[int]]],
        worker: Worker,
        wait_s: float,
    ) -> None:
        self._run, self._plan, self._worker, self._wait_s = run, plan, worker, wait_s
        self._waiting: list[_Waiting[Item, Result]] = []
        self._rounds: asyncio.Task[None] | None = None

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Return one result an item; whatever ``run`` raises for them is raised here.

        A caller that is cancelled takes the items with it that are in no pass yet.
        """
        if not items:
            return []
        loop = asyncio.get_running_loop()
        request = _Request[Result](loop.create_future(), loop.time(), len(items))
        self._waiting += [_Waiting(request, *indexed) for indexed in enumerate(items)]
        if self._rounds is None or self._rounds.done():
            self._rounds = loop.create_task(self._run_rounds())
        return await request.future

    async def _run_rounds(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            due_s = self._waiting[0].request.arrived_s + self._wait_s
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            taken, self._waiting = self._waiting, []
            for indices in self._plan([waiting.item for waiting in taken]):
                await self._run_pass([taken[index] for index in indices])

    async def _run_pass(self, taken: Sequence[_Waiting[Item, Result]]) -> None:
        wanted = [waiting for waiting in taken if not waiting.request.future.done()]
        if not wanted:
            return
        items = [waiting.item for waiting in wanted]
        call = asyncio.ensure_future(self._worker.call(_one_each, self._run, items))
        await asyncio.wait([call])
        if (error := call.exception()) is None:
            for waiting, result in zip(wanted, call.result(), strict=True):
                waiting.request.finish(waiting.index, result)
        elif len(requests := {waiting.request for waiting in wanted}) == 1:
            wanted[0].request.fail(error)
        else:
            for request in requests:
                await self._run_pass([waiting for waiting in wanted if waiting.request is request])


def _one_each(
    run: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]
) -> Sequence[Result]:
    results = run(items)
    assert len(results) == len(items)
    return results
