"""What a protocol of a reward service is: items to requests, replies to scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trl_grpo_ext.rewards.scores import Score


@dataclass(frozen=True)
class Item:
    """A completion to be scored.

    Attributes:
        prompt: A text, or a conversation (messages with ``role`` and ``content``).
        completion: The text of the completion alone.
        columns: The row's other columns, such as ``answer``.
        group: Items of the same number are completions of the same prompt.
    """

    prompt: str | Sequence[Mapping[str, Any]]
    completion: str
    columns: Mapping[str, Any] = field(default_factory=dict)
    group: int = 0


@dataclass(frozen=True)
class WireRequest:
    """One HTTP request (always ``POST`` with JSON) for one or several items.

    Attributes:
        path: Appended to the base URL, such as ``/chat/completions``.
        payload: The JSON body. It holds no secret.
        indices: Which of the items given to :meth:`WireProtocol.requests` it asks about.
        expected: What :meth:`WireProtocol.parse` needs beside the reply, such as the output that
            a program should print. JSON, never sent; part of the key under which scores are cached.
    """

    path: str
    payload: Mapping[str, Any]
    indices: tuple[int, ...]
    expected: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What was read off one reply.

    Attributes:
        scores: One for each of the request's ``indices``, in their order; ``None`` where the
            service said that it could not score.
        tokens: That the service counted for the request; 0 if it does not say.
    """

    scores: Sequence[Score]
    tokens: int = 0


class UnreadableReplyError(ValueError):
    """A reply that is no score: cut off, malformed, of another length, out of range.

    The client asks again, and leaves the completions unscored if that does not help.
    """


class WireProtocol(Protocol):
    """One service's way of asking and answering; without state, and without network."""

    @property
    def version(self) -> str:
        """What changes when the same items would be asked or read differently.

        Part of the key under which scores are cached.
        """

    @property
    def is_sampled(self) -> bool:
        """Whether the same request may give another score, so that it is not cached."""

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return the requests that score these items.

        An item in several of them has several votes, whose mean counts (:func:`mean_scores`). An
        item in none of them cannot be scored, such as one whose row has no reference answer.
        """

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the scores in a decoded JSON body.

        Raises:
            UnreadableReplyError: there are none in it.
        """


def mean_scores(answers: Iterable[tuple[WireRequest, Reply]], *, num_items: int) -> list[Score]:
    """Return the score of each item: the mean of its votes, ``None`` if it has none.

    Args:
        answers: The requests that were answered, each with what was read off its reply.
        num_items: How many items the requests were made for.

    Example:
        >>> first = WireRequest("/", {}, indices=(0, 1)), Reply([1.0, 0.0])
        >>> second = WireRequest("/", {}, indices=(1, 0)), Reply([1.0, None])
        >>> mean_scores([first, second], num_items=3)
        [1.0, 0.5, None]
    """
    votes: list[list[float]] = [[] for _ in range(num_items)]
    for request, reply in answers:
        for index, score in zip(request.indices, reply.scores, strict=True):
            if score is not None:
                votes[index].append(score)
    return [sum(vote / len(given) for vote in given) if given else None for given in votes]
