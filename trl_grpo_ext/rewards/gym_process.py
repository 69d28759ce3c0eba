"""The process that scores answers of reasoning-gym's tasks, and is ended when it takes too long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from trl_grpo_ext.rewards.worker_process import (
    FEW_VARIABLES,
    OutOfTimeError,
    Work,
    WorkerDiedError,
    WorkerProcess,
)

SCORING = Work(
    module=Path(__file__).with_name("gym_scorer.py"),
    memory_bytes=4 * 2**30,
    does="scores answers of reasoning-gym",
    scores="answer",
    package="reasoning-gym",
    extra="quickstart",
    variables=FEW_VARIABLES,
)

Verdict = float | Literal["refused", "broken", "late", "died"]


class GymProcess(WorkerProcess[Verdict]):
    """One process, started when it is first asked, and again after it has ended.

    Args:
        command: What to start instead of it, for tests.
    """

    def __init__(self, command: Sequence[str] | None = None) -> None:
        super().__init__(SCORING, command=command)

    def ask(self, *job: str | None, limit_s: float) -> Verdict:
        """Return the score of an answer, or why there is none.

        Args:
            job: What the data set holds for the scorer, and the answer; untrusted, and ``None``
                for the row's own.
            limit_s: After that time the process is ended; starting it does not count.

        Returns:
            The score; ``"refused"`` if the scorer fails on this answer, but not on the row's own;
            ``"broken"`` if it fails on both; ``"late"`` or ``"died"`` if the process was ended.

        Raises:
            RewardError: the process does not start.
        """
        try:
            return super().ask(*job, limit_s=limit_s)
        except OutOfTimeError:
            return "late"
        except WorkerDiedError:
            return "died"
