"""SIGTERM and Ctrl-C as a wish: the run stops at the next safe point, and saves."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from trl_grpo_ext.peers import peer_failed

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingInterrupted(SystemExit):
    """The run stopped because it was asked to, by a signal; its state is saved.

    It ends the program with exit code 128 plus the signal's number, as a shell has it: 143 for
    SIGTERM, 130 for Ctrl-C.

    Attributes:
        checkpoint: Where the state is; ``None`` if there was nothing to save.
    """

    def __init__(self, number: int, checkpoint: str | None) -> None:
        super().__init__(128 + number)
        self.checkpoint = checkpoint


class StopSignals:
    """While it is entered, the first SIGTERM or SIGINT is kept in ``received``.

    The second one ends the process at once. Handlers can be set in the main thread only; in
    another, and where a signal is ignored on purpose (``nohup``), nothing changes.

    Attributes:
        received: Number of the signal; 0 if none came.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker of the data loader: it ends with the run, which shall be able to save
        if peer_failed():
            return  # this process ends too, very soon, and there is nobody to agree with
        self.received = number
        # A signal to the whole group ends the data loader's workers; torch would raise at that, at
        # any time from here on, also when the run has stopped.
        signal.signal(signal.SIGCHLD, _ignore)
        for each in _SIGNALS:
            if each not in self._previous:
                continue
            # A notebook's kernel outlives its cells; any other process ends, even inside C code.
            in_notebook = "ipykernel" in sys.modules
            signal.signal(each, self._previous[each] if in_notebook else signal.SIG_DFL)
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(
                f"\n{signal.Signals(number).name}: stopping at the next safe point, then saving a "
                "checkpoint. Once more ends the run at once.\n"
            )


def _ignore(number: int, frame: FrameType | None) -> None:
    """Stand in for a handler, so that one that is due already finds something to call."""
