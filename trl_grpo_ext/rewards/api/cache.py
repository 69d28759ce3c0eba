"""Scores on disk, shared by processes and runs."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diskcache

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.api.wire import WireRequest

CACHE_VARIABLE = "TRL_GRPO_EXT_CACHE"
KEY_VERSION = 1  # of what the keys are made of
LOCK_TIMEOUT_S = 5.0  # that a write waits for another process

logger = logging.getLogger(__name__)

_FAILURES = (sqlite3.Error, diskcache.Timeout, OSError)


def request_key(request: WireRequest, *, identity: object) -> str:
    """Return a hash of everything that determines the scores that a request brings.

    Args:
        request: With what is sent (model, rubric, prompt, completions, columns) and ``expected``.
        identity: The addresses, and the protocol with its version and options. JSON.

    Raises:
        TypeError: the request is not JSON.
    """
    determining = [KEY_VERSION, identity, request.path, request.payload, request.expected]
    text = json.dumps(determining, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class ScoreCache:
    """Scores by the hash of their request: a SQLite database, so a dead process leaves it whole.

    Only texts are kept and only texts are read, so that a foreign database runs no code. A
    database that fails is reported once in the log; the scores are asked for instead.

    Args:
        folder: Made if there is none. On a disk of this machine, not on NFS.

    Raises:
        ConfigurationError: the folder cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self._has_failed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._disk = diskcache.Cache(folder, disk=_TextDisk, timeout=LOCK_TIMEOUT_S)
        except _FAILURES as error:
            raise ConfigurationError([_unusable(folder, error)]) from error

    def get(self, key: str, *, num_scores: int) -> list[float] | None:
        """Return the scores of a request, ``None`` if they are not there."""
        try:
            return _finite_scores(self._disk.get(key), num_scores=num_scores)
        except _FAILURES as error:
            self._report(error)
            return None

    def put(self, key: str, scores: Sequence[float | None]) -> None:
        """Keep the scores of a request if each is a finite number."""
        if not all(score is not None and math.isfinite(score) for score in scores):
            return
        try:
            self._disk.set(key, json.dumps(list(scores)))
        except _FAILURES as error:
            self._report(error)

    def close(self) -> None:
        """Close the database, for the thread that used it."""
        self._disk.close()

    def _report(self, error: Exception) -> None:
        if not self._has_failed:
            logger.warning(
                "The cache of scores in %s failed (%s: %s). Scores are asked for instead. Check "
                "the disk, or set `cache_dir` to another folder.",
                self._disk.directory,
                type(error).__name__,
                error,
            )
        self._has_failed = True


class _TextDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache ships no types
    """Reads short texts only: anything else in the database could be a pickle."""

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> str | None:  # noqa: FBT001  # the signature of diskcache
        return value if isinstance(value, str) and filename is None else None


def default_folder() -> Path:
    """Return where scores are kept: ``rewards`` in the cache folder of the package."""
    root = os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "trl_grpo_ext"
    return Path(root) / "rewards"


def _finite_scores(text: str | None, *, num_scores: int) -> list[float] | None:
    if text is None:
        return None
    try:
        scores: Any = json.loads(text)
    except ValueError:
        return None
    is_whole = isinstance(scores, list) and len(scores) == num_scores
    if is_whole and all(isinstance(score, float) and math.isfinite(score) for score in scores):
        return list(scores)
    return None


def _unusable(folder: Path, error: Exception) -> str:
    return (
        f"`cache_dir`={folder} cannot hold scores ({type(error).__name__}: {error}), so they would "
        "be asked for again and again. Set `cache_dir` to a folder that can be written, or "
        "`cache` to false."
    )
