"""Verdicts on many answers at once: what is quick here, what needs algebra in the workers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

from trl_grpo_ext.rewards.math.answers import Answer, Assigned, Expression, Group
from trl_grpo_ext.rewards.math.compare import SameExpression, same_answer
from trl_grpo_ext.rewards.math.workers import Worker, WorkerPool
from trl_grpo_ext.rewards.worker_process import OutOfTimeError, WorkerDiedError

Verdict: TypeAlias = Literal["right", "wrong", "unparsable_gold", "timeouts", "crashes"]
Row: TypeAlias = tuple[Answer | None, Answer | None]

MAX_REMEMBERED = 10_000


class Judge:
    """Compares answers with gold answers.

    Args:
        workers: What compares expressions.
        time_limit_s: Seconds that one comparison may take.
    """

    def __init__(self, workers: WorkerPool, *, time_limit_s: float) -> None:
        self.workers = workers
        self.time_limit_s = time_limit_s
        self._comparable: dict[Answer, bool] = {}

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """Return the verdict on each pair of a gold answer and an answer.

        ``None`` is what could not be read. A gold answer that computer algebra cannot take, not
        even in time, is ``unparsable_gold`` as well, but for an answer that is written the same.
        """
        known: dict[Row, Verdict] = {}
        hard: list[tuple[Answer, Answer]] = []
        for row in dict.fromkeys(rows):
            gold, answer = row
            if gold is None:
                known[row] = "unparsable_gold"
            elif answer == gold:
                known[row] = "right"
            elif next(expressions(gold), None) is None:
                known[row] = "right" if answer and same_answer(gold, answer) else "wrong"
            elif answer is None:
                known[row] = "wrong"
            else:
                hard.append((gold, answer))
        known.update(self._judge_hard(hard))
        return [known[row] for row in rows]

    def close(self) -> None:
        """End the worker processes."""
        self.workers.close()

    def _judge_hard(self, pairs: Sequence[tuple[Answer, Answer]]) -> dict[Row, Verdict]:
        """Return the verdicts on pairs whose gold answers have an expression in them."""
        self._try_golds({gold: None for gold, _ in pairs})
        ready = [pair for pair in pairs if self._comparable[pair[0]]]
        found = dict(zip(ready, self.workers.map(self._compare, ready), strict=True))
        return {pair: found.get(pair, "unparsable_gold") for pair in pairs}

    def _try_golds(self, golds: Iterable[Answer]) -> None:
        """Note which gold answers can be compared with themselves, in time."""
        if len(self._comparable) > MAX_REMEMBERED:
            self._comparable.clear()
        new = [gold for gold in golds if gold not in self._comparable]
        self._comparable.update(zip(new, self.workers.map(self._is_comparable, new), strict=True))

    def _is_comparable(self, worker: Worker, gold: Answer) -> bool:
        same = self._timed(worker)
        try:
            return all(same(part.latex, part.latex) for part in expressions(gold))
        except (OutOfTimeError, WorkerDiedError):
            return False

    def _compare(self, worker: Worker, pair: tuple[Answer, Answer]) -> Verdict:
        gold, answer = pair
        try:
            is_right = same_answer(gold, answer, same_expression=self._timed(worker))
        except OutOfTimeError:
            return "timeouts"
        except WorkerDiedError:
            return "crashes"
        return "right" if is_right else "wrong"

    def _timed(self, worker: Worker) -> SameExpression:
        """Return the comparison by a worker, with one time limit for all that it is asked."""
        worker.start()
        deadline = time.monotonic() + self.time_limit_s
        return lambda gold, answer: (
            worker.ask(gold, answer, limit_s=deadline - time.monotonic()) is True
        )


def expressions(answer: Answer) -> Iterator[Expression]:
    """Return the expressions in an answer, which only a worker can compare."""
    if isinstance(answer, Expression):
        yield answer
    elif isinstance(answer, Assigned):
        yield from expressions(answer.value)
    elif isinstance(answer, Group):
        for item in answer.items:
            yield from expressions(item)
