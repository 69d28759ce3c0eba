"""The background thread with the event loop in which a reward's requests run."""

from __future__ import annotations

import asyncio
import os
import selectors
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from trl_grpo_ext.rewards.api.scorer import Scorer

JOIN_S = 5.0  # that closing waits for the thread
POLL_S = 0.2  # between two looks at whether to stop

T = TypeVar("T")

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
_inherited: list[Session] = []  # from before a fork; never freed, see _forget_after_fork


class Session:
    """A scorer in a daemon thread of its own, for callers in any thread.

    Attributes:
        is_foreign: The thread belongs to the process that this one was forked from.

    Args:
        open_scorer: Returns what opens the scorer; called and entered in the thread.
        name: Of the thread.

    Raises:
        Exception: what entering raises.
    """

    def __init__(
        self, open_scorer: Callable[[], AbstractAsyncContextManager[Scorer]], *, name: str
    ) -> None:
        started: Future[tuple[Scorer, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(
            target=_run, args=(open_scorer, self._selector, started), name=name, daemon=True
        )
        self._thread.start()
        self._scorer, self._loop, stop = started.result()
        self.is_foreign = False
        self._close = weakref.finalize(self, _shut_down, self._loop, stop, self._thread)
        _sessions.add(self)

    def start(self, work: Callable[[Scorer], Coroutine[Any, Any, T]]) -> Future[T]:
        """Start a coroutine of the scorer, and return what will hold its result."""
        return asyncio.run_coroutine_threadsafe(work(self._scorer), self._loop)

    def wait(
        self,
        work: Callable[[Scorer], Coroutine[Any, Any, T]],
        *,
        should_stop: Callable[[], bool] | None = None,
    ) -> T:
        """Return the result of a coroutine of the scorer; an interrupt cancels it.

        Args:
            work: Returns the coroutine.
            should_stop: Asked now and then; when it says yes, the scorer gives up what is under
                way, and the coroutine ends with what there is.
        """
        future = self.start(work)
        try:
            while should_stop is not None and not wait([future], timeout=POLL_S).done:
                if should_stop():
                    self._loop.call_soon_threadsafe(self._scorer.give_up)
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """Cancel what is under way, close the connections and end the thread."""
        self._close()

    def leave_to_parent(self) -> None:
        """In a forked process: touch nothing that the parent still uses."""
        self.is_foreign = True
        self._close.detach()
        # The selector is shared with the parent: what the child takes off, the parent no longer
        # sees. So the child closes its own handle, and gets an empty one.
        self._selector.close()
        vars(self._selector).update(vars(selectors.DefaultSelector()))


def _run(
    open_scorer: Callable[[], AbstractAsyncContextManager[Scorer]],
    selector: selectors.BaseSelector,
    started: Future[tuple[Scorer, asyncio.AbstractEventLoop, asyncio.Event]],
) -> None:
    """Be the thread: open, serve until told to stop, close."""

    async def serve() -> None:
        stop = asyncio.Event()
        async with open_scorer() as scorer:
            started.set_result((scorer, asyncio.get_running_loop(), stop))
            await stop.wait()

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        try:
            runner.run(serve())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)


def _shut_down(
    loop: asyncio.AbstractEventLoop, stop: asyncio.Event, thread: threading.Thread
) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(stop.set)
    if thread is not threading.current_thread():
        thread.join(timeout=JOIN_S)


def _forget_after_fork() -> None:
    """Keep the parent's sessions as they are: freeing one would run its clean-up here."""
    for session in list(_sessions):
        session.leave_to_parent()
        _inherited.append(session)
    _sessions.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
