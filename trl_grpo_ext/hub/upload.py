"""Uploads in the background of a run, again and again while the Hub is down."""

from __future__ import annotations

import atexit
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from tenacity import Retrying, retry_if_exception_type, wait_exponential, wait_random
from transformers.utils import logging

from trl_grpo_ext.hub import attempt as attempt_script
from trl_grpo_ext.hub.attempt import Outcome
from trl_grpo_ext.hub.record import Upload, read_record, write_record

logger = logging.get_logger(__name__)

FAILING_S = 60.0  # how long the end of a run waits for a Hub that does not answer
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _PAUSE_AT_END_S = 2, 300, 10
_POLL_S = 0.1
_INTERRUPTED = "the upload was interrupted"


class _NotReachedError(Exception):
    """The Hub could not take an upload now."""


class BackgroundUploads:
    """The uploads of a run: one at a time, each in a process, in the order they were asked for.

    Nothing here raises because of the Hub, and nothing waits for it but :meth:`wait` and, if
    ``waits_at_exit``, the end of the program; both for a time that is bounded.

    Args:
        run_dir: With the record of what is missing; what an earlier run left there is uploaded too.
        token: As of ``HfApi``; ``None`` for the one of the login.
        wait_s: Longest wait.
        offline: Whether nothing is tried, only noted.
        on_created: Is told the full name of a repository.

    Attributes:
        waits_at_exit: Whether the program waits for what is left when it ends.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        token: str | None = None,
        wait_s: float = 3600.0,
        offline: bool = False,
        on_created: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.run_dir, self.token, self.wait_s, self.offline = run_dir, token, wait_s, offline
        self.waits_at_exit = False
        self._on_created = on_created
        self._changed = threading.Condition()
        self._missing: list[Upload] = read_record(run_dir) or []
        self._futures: dict[Upload, Future[CommitInfo | None]] = {}
        self._refused: dict[Upload, str] = {}
        self._trouble: str | None = None  # of the last attempt
        self._hurries = self._closed = self._gave_up = False
        self._reading = threading.Lock()  # while an attempt reads files
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        atexit.register(self.close)

    @property
    def missing(self) -> list[Upload]:
        """What is not uploaded."""
        with self._changed:
            return list(self._missing)

    def submit(self, upload: Upload) -> Future[CommitInfo | None]:
        """Upload in the background, in place of an earlier upload to the same place.

        Returns:
            Done when it is uploaded, with the commit; or with ``None`` when it will not be: it was
            refused or replaced.
        """
        future: Future[CommitInfo | None] = Future()
        with self._changed:
            for old in [each for each in self._missing if _replaces(upload, each)]:
                self._drop(old)
            self._missing.append(upload)
            self._futures[upload] = future
            self._gave_up = False
            self._refused.clear()  # what was refused may be right by now
            self._note()
            self._start()
            self._changed.notify_all()
        return future

    def wait(self) -> bool:
        """Wait until all is uploaded, refused, or plainly will not be soon; say what is missing.

        Returns:
            Whether all is uploaded.
        """
        began = time.monotonic()
        with self._changed:
            self._hurries = True
            self._changed.notify_all()
            while self._worth_waiting(time.monotonic() - began):
                self._changed.wait(_POLL_S)
            self._hurries = False
            self._gave_up = bool(self._missing)
        if self._gave_up:
            logger.warning(self.not_uploaded())
        return not self._gave_up

    def not_uploaded(self) -> str:
        """Return what is missing, why, and the command that uploads it."""
        with self._changed:
            listed = ", ".join(map(str, self._missing))
            reasons = {*self._refused.values(), *([self._trouble] if self._trouble else [])}
        why = "HF_HUB_OFFLINE is set" if self.offline else "; ".join(sorted(reasons))
        return (
            f"Not on the Hub: {listed}{f' ({why})' if why else ''}. All of it is in "
            f"{self.run_dir}. To upload it: trl-grpo-ext push {shlex.quote(str(self.run_dir))}"
        )

    @contextmanager
    def held(self, *, withdraw: bool) -> Iterator[bool]:
        """Hold uploads back while files are written.

        Args:
            withdraw: Whether an attempt that is reading is ended, and made again later.

        Yields:
            Whether no attempt reads.
        """
        free = self._reading.acquire(blocking=False)
        while withdraw and not free:
            self._end_attempt()
            free = self._reading.acquire(timeout=_POLL_S)
        try:
            yield free
        finally:
            if free:
                self._reading.release()

    def close(self) -> None:
        """End the uploads; wait for them before if ``waits_at_exit``. Say what is missing."""
        atexit.unregister(self.close)
        waits = self.waits_at_exit and not (self.offline or self._gave_up)
        try:
            if waits and self.missing:
                logger.warning(f"Waiting for the Hub (up to {self.wait_s:g} s; Ctrl-C ends that).")
                self.wait()
        except KeyboardInterrupt:
            waits = False
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._end_attempt()
        if self.missing and not waits:
            logger.warning(self.not_uploaded())

    # In the background ----------------------------------------------------------------------------

    def _start(self) -> None:
        if not self.offline and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._work, name="hub-uploads", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        longer = wait_exponential(multiplier=_FIRST_PAUSE_S, max=_LONGEST_PAUSE_S)
        retrying = Retrying(
            retry=retry_if_exception_type(_NotReachedError),
            wait=longer + wait_random(0, 1),
            sleep=self._pause,
        )
        while not self._closed:
            retrying(self._upload_all)
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)

    def _upload_all(self) -> None:
        while (upload := self._next()) is not None and not self._closed:
            with self._reading:
                outcome = self._attempt(upload)
                self._settle(upload, outcome)
            if outcome.problem is not None and outcome.again and not self._closed:
                raise _NotReachedError

    def _attempt(self, upload: Upload) -> Outcome:
        command = [sys.executable, "-P", str(attempt_script.__file__)]
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(
            command,
            env=os.environ | path | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            start_new_session=True,  # Ctrl-C is the run's
            text=True,
            **pipes,
        )
        self._process = process
        if self._closed:  # just before it could be ended
            process.kill()
        order = {"job": upload.job(self.run_dir), "token": self.token}
        output, errors = process.communicate(json.dumps(order))
        self._process = None
        if process.returncode < 0:
            return Outcome(problem=_INTERRUPTED)
        try:
            return Outcome(**json.loads(output.splitlines()[-1]))
        except (IndexError, TypeError, ValueError):
            last = (errors.splitlines() or ["it printed nothing"])[-1]
            return Outcome(problem=f"the upload's process failed: {last}", again=False)

    def _settle(self, upload: Upload, outcome: Outcome) -> None:
        """Note what became of an upload, which may have been replaced meanwhile."""
        told_before = self._trouble
        with self._changed:
            if outcome.problem != _INTERRUPTED:
                self._trouble = outcome.problem if outcome.again else None
            if outcome.problem is None:
                self._drop(upload, outcome.commit)
            elif upload.folder is not None and not (self.run_dir / upload.folder).is_dir():
                self._drop(upload)
            elif not outcome.again:
                self._refused[upload] = outcome.problem
                self._futures.pop(upload, Future()).set_result(None)
            self._note()
            self._changed.notify_all()
        if outcome.problem is None and outcome.repo_id is not None:
            self._created(upload, outcome)
        elif not outcome.again:
            logger.warning(f"Not uploaded: {upload}: {outcome.problem}.")
        elif told_before != self._trouble and not self._closed:
            logger.warning(f"The Hub does not take {upload}: {outcome.problem}. Trying again.")

    def _created(self, upload: Upload, outcome: Outcome) -> None:
        assert outcome.repo_id is not None
        with self._changed:
            named = {each: replace(each, repo_id=outcome.repo_id) for each in self._missing}
            for old, new in named.items():
                if old.repo == upload.repo and old != new:
                    self._missing[self._missing.index(old)] = new
                    if old in self._futures:
                        self._futures[new] = self._futures.pop(old)
            self._note()
        if upload.repo_type == "model":
            self._on_created(outcome.repo_id)
        if outcome.private is not None:
            kind = "private" if outcome.private else "PUBLIC"
            logger.warning(f"Uploads go to the {kind} repository {outcome.repo_id}.")

    def _next(self) -> Upload | None:
        with self._changed:
            return next((each for each in self._missing if each not in self._refused), None)

    def _drop(self, upload: Upload, commit: dict[str, str] | None = None) -> None:
        if upload in self._missing:
            self._missing.remove(upload)
        self._refused.pop(upload, None)
        future = self._futures.pop(upload, None)
        if future is not None:
            future.set_result(None if commit is None else CommitInfo(**commit))

    def _note(self) -> None:
        try:
            write_record(self.run_dir, self._missing)
        except OSError as error:
            logger.warning(f"What is not on the Hub could not be noted in {self.run_dir}: {error}")

    def _pause(self, seconds: float) -> None:
        """Wait before the next attempt; shortly where somebody waits for it."""
        with self._changed:
            limit, hurried = (_PAUSE_AT_END_S, True) if self._hurries else (seconds, False)
            self._changed.wait_for(
                lambda: self._closed or self._hurries > hurried, timeout=min(seconds, limit)
            )

    def _worth_waiting(self, waited_s: float) -> bool:
        works = self._thread is not None and self._thread.is_alive() and not self._closed
        if not works or self._next() is None or waited_s >= self.wait_s:
            return False
        return self._trouble is None or waited_s < FAILING_S

    def _end_attempt(self) -> None:
        process = self._process
        if process is not None:
            process.kill()


def _replaces(new: Upload, old: Upload) -> bool:
    return new.place == old.place or (old.folder is None and new.repo == old.repo)
