"""What an answer is counted as when completions vote."""

from __future__ import annotations

from collections.abc import Hashable

from trl_grpo_ext.rewards.math.answers import Answer, Assigned, Expression, Group, Number


def vote(answer: Answer) -> Hashable:
    r"""Return something equal for equal answers: without names and units, sets without order.

    Expressions are compared as text, so :math:`\sqrt{12}` and :math:`2\sqrt{3}` are two votes.

    Example:
        >>> from trl_grpo_ext.rewards.math.parse import read_answer
        >>> vote(read_answer("x = 5 km")) == vote(read_answer("5"))
        True
    """
    if isinstance(answer, Assigned):
        return vote(answer.value)
    if isinstance(answer, Number):
        return answer.value
    if isinstance(answer, Expression):
        return answer.latex.replace(" ", "")
    if isinstance(answer, Group):
        kind = "list" if answer.kind == "{}" else answer.kind
        items = tuple(vote(item) for item in answer.items)
        return kind, items if answer.is_ordered else frozenset(items)
    return answer
