"""A judge that ranks all completions of a prompt in one request."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from trl_grpo_ext.rewards.api.protocols.chat import Judge, judge_message
from trl_grpo_ext.rewards.api.protocols.fence import fence_mark, without_control_tokens
from trl_grpo_ext.rewards.api.protocols.reading import (
    array,
    number,
    unreadable,
    whole,
    written_number,
)
from trl_grpo_ext.rewards.api.protocols.rendering import prompt_text
from trl_grpo_ext.rewards.api.protocols.verdict import (
    finished_content,
    marked,
    scaled,
    schema_verdict,
)
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireRequest

SCORE_RANGE = (0.0, 10.0)  # of the scores that a judge gives before they become ranks


@dataclass(frozen=True, kw_only=True)
class OpenAIRanking(Judge):
    r"""Rank the completions of each prompt against each other, by a rubric.

    The score of rank :math:`k` of :math:`n` different completions is :math:`(n - k) / (n - 1)`: 1
    for the best, 0 for the worst; completions with the same text share it. A prompt with a single
    text cannot be ranked and stays unscored, which costs nothing: equal scores are no advantage.

    Judges prefer some places in a list. So each completion is shown at several places: the order is
    shuffled by a digest of the texts, each second vote has the reverse order of the one before, and
    the mean of the votes counts. With an even number of votes, every completion stands in the
    middle on average.

    Args:
        model: As for ``openai_chat``, and so are the options that are not named here.
        rubric: What makes one answer better than another.
        judge_by: ``"ranking"`` (the numbers of the answers from best to worst, which must be a
            permutation), or ``"scores"`` (a score from 0 to 10 each, turned into ranks).
        ties: For equal scores: ``"mean"`` of the ranks that they share, or ``"refuse"``
            (unreadable, so that the judge is asked again).
        votes: How often each group is ranked; an even number cancels the judge's taste for places.
        verdict: ``"mark"`` or ``"json_schema"``, as for ``openai_chat``.

    References:
        OpenAI's endpoint: see ``openai_chat``. Preference for places and swapping them: Zheng et
        al. 2023, section 3.3, arXiv:2306.05685.

    Example:
        >>> judge = OpenAIRanking(model="judge", votes=2)
        >>> items = [Item(prompt="2 + 2?", completion=answer) for answer in ("4", "5", "four")]
        >>> first, second = judge.requests(items)
        >>> first.indices == second.indices[::-1]
        True
    """

    name: ClassVar[str] = "openai_ranking"
    is_relative: ClassVar[bool] = True

    judge_by: Literal["ranking", "scores"] = "ranking"
    ties: Literal["mean", "refuse"] = "mean"
    votes: int = 2
    verdict: Literal["mark", "json_schema"] = "mark"

    def problems(self) -> Iterator[str]:
        """Yield what cannot work."""
        yield from super().problems()
        if self.votes < 1:
            yield self.problem("votes", f"is {self.votes}, so nothing is ranked", "Use 2, or 1")

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return one request a vote for each group with at least two different completions."""
        groups: dict[int, list[int]] = {}
        for index, item in enumerate(items):
            if self.has_reference(item):
                groups.setdefault(item.group, []).append(index)
        return [
            self._request(items, members, vote)
            for members in groups.values()
            if len({items[index].completion for index in members}) > 1
            for vote in range(self.votes)
        ]

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the scores by rank, one for each index of the request."""
        content, tokens = finished_content(body)
        places = request.expected["places"]
        num_texts = max(places) + 1
        if self.judge_by == "ranking":
            ranks = permutation_ranks(self._verdict(content, request), num_texts)
        else:
            ranks = score_ranks(self._verdict(content, request), num_texts, ties=self.ties)
        return Reply([(num_texts - ranks[place]) / (num_texts - 1) for place in places], tokens)

    def _request(self, items: Sequence[Item], members: Sequence[int], vote: int) -> WireRequest:
        order = shuffled(items, members, vote=vote)
        texts = list(dict.fromkeys(items[index].completion for index in order))
        answers = {
            f"response_{place}": without_control_tokens(text)
            for place, text in enumerate(texts, start=1)
        }
        parts = {**self.data(items[order[0]]), **answers}
        mark = fence_mark(list(parts.values()))
        question = judge_message(parts, mark=mark, ask=self._ask(len(texts)), verdict=self._form())
        places = [texts.index(items[index].completion) for index in order]
        return WireRequest(
            "/chat/completions",
            self.payload(question, self._schema()),
            tuple(order),
            expected={"mark": mark, "places": places},
        )

    def _ask(self, num_texts: int) -> str:
        if self.judge_by == "ranking":
            wanted = f"the numbers 1 to {num_texts} of the responses, each once, the best first"
        else:
            low, high = SCORE_RANGE
            wanted = (
                f"{num_texts} numbers from {low:g} to {high:g}: the score of response 1, 2, ..."
            )
        return (
            f"Compare the {num_texts} responses by the rubric; their order here means nothing. You "
            f"may reason first. Your verdict is {wanted}."
        )

    def _form(self) -> str | None:
        if self.verdict == "json_schema":
            return None
        return "NUMBERS, SEPARATED BY COMMAS"

    def _schema(self) -> dict[str, Any] | None:
        if self.verdict == "mark":
            return None
        kind = "integer" if self.judge_by == "ranking" else "number"
        return {self.judge_by: {"type": "array", "items": {"type": kind}}}

    def _verdict(self, content: str, request: WireRequest) -> list[Any]:
        if self.verdict == "json_schema":
            return list(array(schema_verdict(content, key=self.judge_by)))
        written = marked(content, mark=request.expected["mark"]).split(",")
        if self.judge_by == "scores":
            return [written_number(part) for part in written]
        return [_place(part) for part in written]


def shuffled(items: Sequence[Item], members: Sequence[int], *, vote: int) -> list[int]:
    """Return the members in an order that depends on their texts; odd votes reverse even ones."""

    def digest(index: int) -> str:
        content = [vote // 2, prompt_text(items[index].prompt), items[index].completion]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    order = sorted(members, key=lambda index: (digest(index), index))
    return order[::-1] if vote % 2 else order


def permutation_ranks(numbers: Sequence[Any], num_texts: int) -> list[float]:
    """Return the rank of each text, 1 for the best, from their numbers in order of merit.

    Raises:
        UnreadableReplyError: the numbers are not 1 to ``num_texts``, once each.

    Example:
        >>> permutation_ranks([3, 1, 2], 3)
        [2.0, 3.0, 1.0]
    """
    best_first = [whole(value) for value in numbers]
    if sorted(best_first) != list(range(1, num_texts + 1)):
        unreadable(f"the ranking is not a permutation of 1 to {num_texts}")
    return [float(best_first.index(value) + 1) for value in range(1, num_texts + 1)]


def score_ranks(
    values: Sequence[Any], num_texts: int, *, ties: Literal["mean", "refuse"]
) -> list[float]:
    """Return the rank of each text, 1 for the best, from their scores in order of place.

    Raises:
        UnreadableReplyError: another number of scores, one out of range, or a refused tie.

    Example:
        >>> score_ranks([7, 9, 7], 3, ties="mean")
        [2.5, 1.0, 2.5]
    """
    scores = [
        scaled(number(value), between=SCORE_RANGE, scale="raw")
        for value in array(list(values), length=num_texts)
    ]
    if ties == "refuse" and len(set(scores)) < num_texts:
        unreadable("the judge gave equal scores")
    better = [sum(other > score for other in scores) for score in scores]
    return [1 + count + (scores.count(s) - 1) / 2 for count, s in zip(better, scores, strict=True)]


def _place(part: str) -> int:
    if not re.fullmatch(r"\s*[1-9][0-9]{0,5}\s*", part, re.ASCII):
        unreadable(f"{part.strip()[:40]!r} is not the number of a response")
    return int(part)
