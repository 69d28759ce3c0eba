"""What writes the solution of a question: for tasks that come without one."""

from __future__ import annotations

from collections.abc import Callable

from trl_grpo_ext.rewards.models.sums import Sum, solve

Solver = Callable[[str], str | None]
"""From the text of a question to its solution, or ``None`` where it has none."""


def sums(question: str) -> str | None:
    """Return the solution of the last sum in a text, a line a step.

    Example:
        >>> print(sums("How much is 3 + 4 - 9 ="))
        3 + 4 = 7
        7 - 9 = -2
    """
    found = Sum.in_text(question)
    return None if found is None else "\n".join(solve(found))


SOLVERS = {"sums": sums}
