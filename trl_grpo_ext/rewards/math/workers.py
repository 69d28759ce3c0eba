"""Processes that compare expressions, and how the comparisons of a batch are shared by them."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from trl_grpo_ext.rewards.worker_process import Work, WorkerProcess

COMPARISONS = Work(
    module=Path(__file__).with_name("worker.py"),
    memory_bytes=2 * 2**30,
    does="compares expressions",
    scores="expression",
    package="math-verify",
    extra="math",
)

Job = TypeVar("Job")
Result = TypeVar("Result")


class Worker(WorkerProcess[bool | None]):
    """One process that is asked whether an answer equals a gold answer; ``None`` if one is none.

    Args:
        command: What to start instead of it, for tests.
    """

    def __init__(self, command: Sequence[str] | None = None) -> None:
        super().__init__(COMPARISONS, command=command)


class WorkerPool:
    """Workers that share the comparisons of a batch.

    A process that was forked from the one in which the pool was made gets workers of its own.

    Args:
        num_workers: How many processes there are at most.
        command: As for :class:`Worker`.
    """

    def __init__(self, num_workers: int, *, command: Sequence[str] | None = None) -> None:
        self.num_workers = num_workers
        self._command = command
        self._owner = 0
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()

    def map(self, run: Callable[[Worker, Job], Result], jobs: Sequence[Job]) -> list[Result]:
        """Return ``run(worker, job)`` for each job, in their order."""
        if not jobs:
            return []
        self._own()

        def with_worker(job: Job) -> Result:
            worker = self._idle.get()
            try:
                return run(worker, job)
            finally:
                self._idle.put(worker)

        with ThreadPoolExecutor(min(self.num_workers, len(jobs))) as threads:
            return list(threads.map(with_worker, jobs))

    def close(self) -> None:
        """End all processes; they start again when there is something to do."""
        if self._owner == os.getpid():
            for worker in [self._idle.get() for _ in range(self.num_workers)]:
                worker.close()
                self._idle.put(worker)

    def __getstate__(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "command": self._command}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["num_workers"], command=state["command"])  # type: ignore[misc]

    def _own(self) -> None:
        if self._owner != os.getpid():
            self._owner, self._idle = os.getpid(), queue.SimpleQueue()
            for _ in range(self.num_workers):
                self._idle.put(Worker(self._command))
