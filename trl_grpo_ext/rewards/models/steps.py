"""The steps of an answer: where they end, and what their scores come to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Aggregate = Literal["min", "mean", "product", "last"]

AGGREGATES: Mapping[Aggregate, Callable[[Sequence[float]], float]] = {
    "min": min,
    "mean": lambda scores: math.fsum(scores) / len(scores),
    "product": math.prod,
    "last": lambda scores: scores[-1],
}


@dataclass(frozen=True)
class StepScores:
    """The scores of an answer's steps.

    Attributes:
        ends: Where each step ends: the number of characters of the answer's text up to there, its
            separator included. They increase, and the last one is the length of the text.
        scores: One a step.
    """

    ends: tuple[int, ...]
    scores: tuple[float, ...]


def split_steps(text: str, separator: str) -> list[str]:
    r"""Return the steps of a text, each with the separator after it.

    A piece of white space alone is no step: it belongs to the step before it, or to the first one.

    Args:
        text: Of the answer.
        separator: What ends a step; not empty.

    Returns:
        At least one step; joined they are the text. A text of white space is one step.

    Example:
        >>> split_steps("2 + 2 = 4.\n\n\n\n4 + 3 = 7.\n\n", "\n\n")
        ['2 + 2 = 4.\n\n\n\n', '4 + 3 = 7.\n\n']
        >>> split_steps("", "\n\n")
        ['']
    """
    offset, starts = 0, []
    for piece in text.split(separator):
        if piece.strip():
            starts.append(offset)
        offset += len(piece) + len(separator)
    cuts = [0, *starts[1:], len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


def step_text(step: str, separator: str) -> str:
    r"""Return what a step of :func:`split_steps` says, without separators around it.

    Example:
        >>> step_text("2 + 2 = 4.\n\n\n\n", "\n\n")
        '2 + 2 = 4.'
    """
    return next((piece for piece in step.split(separator) if piece.strip()), "")


def step_ends(steps: Sequence[str]) -> tuple[int, ...]:
    """Return where each step ends, as in :class:`StepScores`.

    Example:
        >>> step_ends(["one ", "two"])
        (4, 7)
    """
    return tuple(itertools.accumulate(map(len, steps)))


def score_label(label: int | None, *, num_labels: int) -> int | None:
    """Return which of a model's labels says that a step is right.

    Args:
        label: As it was chosen; ``None`` for the only label of a model with one, and the second of
            a model with two.
        num_labels: Of the model.

    Returns:
        ``None`` if there is no such label, or if none was chosen among more than two.

    Example:
        >>> score_label(None, num_labels=2), score_label(2, num_labels=2)
        (1, None)
    """
    if label is None:
        return {1: 0, 2: 1}.get(num_labels)
    return label if label < num_labels else None


def aggregate(scores: Sequence[float], how: Aggregate) -> float:
    """Return one number for the scores of an answer's steps.

    Args:
        scores: One a step, at least one; from 0 to 1 for the product to mean anything.
        how: ``"min"`` (an answer is as good as its worst step), ``"mean"``, ``"product"`` (the
            chance that all steps are right, were they independent) or ``"last"`` (of a model whose
            score of a step judges all that came before it).

    References:
        Lightman et al. 2023, arXiv:2305.20050, section 2.6 (product, minimum); Snell et al. 2024,
        arXiv:2408.03314 (last).

    Example:
        >>> aggregate([0.5, 0.25], "product")
        0.125
    """
    return AGGREGATES[how](scores)
