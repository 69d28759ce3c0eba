"""When one process of several fails, all of them end, soon, and the cause is told once.

A collective waits for every process. If one of them raises an error, is killed or meets an outage,
the others wait for it until the time limit of their group: 30 minutes with NCCL. Inside
:func:`ending_together` each process keeps a connection of its own to process 0, which the kernel
closes when the process ends, whatever ended it. There is no heartbeat and no time limit, so a
process that only is slow is never taken for a dead one.

::

    process 1: ValueError --report--> hub in process 0 --ruling--> process 0, 2, 3, ...
    process 2: SIGKILL ------EOF----> hub in process 0 --ruling--> process 0, 1, 3, ...
    process 0: SIGKILL ------EOF------------------------------> process 1, 2, 3, ...

A process that hears of another's failure gets some seconds to come out of what it does. Then a
thread ends it, even from inside a collective.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import torch.distributed as dist

from trl_grpo_ext.peer_hub import Ruling, close, connect_all, receive, send

if TYPE_CHECKING:
    from trl_grpo_ext.peer_hub import Line

PEER_FAILED_EXIT_CODE = 70
"""Of a process that ends because another one failed."""

_RULING_S = 5.0  # that a process waits for a ruling, if the hub itself is ending
_OWN_GRACE = 6  # times the grace of the others: a traceback, a last upload

_failed = threading.Event()  # of another process
_watch: _Watch | None = None
_told_elsewhere: BaseException | None = None


class PeerFailed(SystemExit):
    """Another process failed, so this one ends too, with :data:`PEER_FAILED_EXIT_CODE`.

    Not an error of this process: it has no traceback, and ``except Exception`` does not catch it.
    """

    def __init__(self) -> None:
        super().__init__(PEER_FAILED_EXIT_CODE)


def peer_failed() -> bool:
    """Return whether another process failed, so that no collective can succeed any more.

    It asks nobody, so that a signal handler can call it.

    Example:
        >>> peer_failed()
        False
    """
    return _failed.is_set()


@contextmanager
def ending_together(
    *, grace_s: float = 5.0, agreed: tuple[type[BaseException], ...] = ()
) -> Iterator[None]:
    """While inside, the failure of one process of the default group ends all of them.

    Every process must enter, and the normal way out waits until each is on it. With one process,
    without a group, and inside another ``ending_together``, this does nothing.

    The process that failed goes on with its exception: traceback and exit code are its own. Every
    other one leaves with :class:`PeerFailed`, or is ended by a thread after ``grace_s``; one of
    them says in a line why. Where each process raises the same error, each goes on with its own,
    and one of them prints its traceback.

    Args:
        grace_s: Seconds that a process has to come out by itself when another one failed. The
            process that failed has six times as long, for its traceback and what else it does.
        agreed: Exceptions that all processes raise together, having agreed on it. They are no
            failure, and pass.

    Raises:
        PeerFailed: another process failed.

    Example:
        >>> with ending_together():
        ...     pass  # trainer.train()
    """
    global _watch
    watch = None if _watch is not None else _start(grace_s)
    if watch is None:
        yield
        return
    _watch = watch
    try:
        yield
        watch.leave()
    except PeerFailed:
        raise
    except agreed:
        watch.leave()
        raise
    except BaseException as error:
        watch.fail(error)
        raise
    finally:
        _watch = None


class _Watch:
    """One process's end of the connection to the hub, and the thread that listens to it."""

    def __init__(self, connection: Line, *, grace_s: float) -> None:
        self._connection, self._grace_s = connection, grace_s
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._ruling: Ruling | None = None
        self._heard = threading.Event()  # the ruling, or that all processes are done
        self._told = threading.Lock()
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    # In the main thread ---------------------------------------------------------------------------

    def leave(self) -> None:
        """Wait until every process is done."""
        send(self._connection, {"done": True})
        self._heard.wait()
        if self._ruling is not None:
            self._tell(self._ruling)
            raise PeerFailed

    def fail(self, error: BaseException) -> None:
        """Report the error; return if it is the cause, or the same as the cause."""
        cause = _one_line(error)
        send(self._connection, {"failed": cause})
        self._heard.wait(_RULING_S)
        ruling = self._ruling
        if ruling is None or ruling.rank == self._rank:
            return
        if ruling.cause == cause:
            _print_no_traceback_of(error)
            return
        self._tell(ruling)
        raise PeerFailed from None

    # In its thread --------------------------------------------------------------------------------

    def _listen(self) -> None:
        message = receive(self._connection)
        if "done" in message:
            self._heard.set()
            close(self._connection)
            return
        ruling = self._ruling = Ruling(**(message or {"rank": 0, "cause": None}))
        own = ruling.rank == self._rank
        if not own:
            _failed.set()
        self._heard.set()
        if ruling.cause is None:  # at once: torchrun soon ends this process too
            self._tell(ruling)
        if self._all_failed_alike(self._grace_s * (_OWN_GRACE if own else 1)):
            _failed.clear()
            close(self._connection)
        else:
            self._end(ruling)

    def _end(self, ruling: Ruling) -> None:
        """End this process, whatever it is in the middle of."""
        own = ruling.rank == self._rank
        if own:
            sys.stderr.write(f"process {self._rank} of {self._world} failed: {ruling.cause}\n")
        else:
            self._tell(ruling)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if own else PEER_FAILED_EXIT_CODE)

    def _all_failed_alike(self, seconds: float) -> bool:
        """Wait for the hub to say so; else return after these seconds."""
        end = time.monotonic() + seconds
        if self._connection.poll(seconds) and "alike" in receive(self._connection):
            return True
        time.sleep(max(0.0, end - time.monotonic()))
        return False

    def _tell(self, ruling: Ruling) -> None:
        """Say once why this process ends, if it is the first of those that did not fail."""
        if self._rank == (ruling.rank == 0) and self._told.acquire(blocking=False):
            sys.stderr.write(ruling.line(rank=self._rank, world=self._world) + "\n")


def _start(grace_s: float) -> _Watch | None:
    """Watch the other processes; ``None`` where there are none."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    connection = connect_all()
    return None if connection is None else _Watch(connection, grace_s=grace_s)


def _forget_in_child() -> None:
    """A forked child has no peers, and no thread that watches them."""
    global _watch
    _watch = None
    _failed.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def _one_line(error: BaseException) -> str:
    name = type(error).__name__
    if isinstance(error, SystemExit):
        return f"{name}({error.code!r})"
    return ": ".join([name, *str(error).strip().splitlines()[:1]])[:500]


def is_told_elsewhere(error: BaseException) -> bool:
    """Return whether another process that ends for the same reason tells the error.

    Example:
        >>> is_told_elsewhere(ValueError("bad"))
        False
    """
    return error is _told_elsewhere


def _print_no_traceback_of(error: BaseException) -> None:
    """If the error ends the program: another process prints the same."""
    global _told_elsewhere
    _told_elsewhere = error
    before = sys.excepthook

    def hook(
        kind: type[BaseException], value: BaseException, traceback: TracebackType | None
    ) -> None:
        if value is not error:
            before(kind, value, traceback)

    sys.excepthook = hook
