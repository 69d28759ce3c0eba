"""A judge that scores one completion a request, behind an OpenAI-compatible chat endpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from trl_grpo_ext.rewards.api.protocols.chat import Judge, judge_message
from trl_grpo_ext.rewards.api.protocols.fence import fence_mark, without_control_tokens
from trl_grpo_ext.rewards.api.protocols.reading import number, text
from trl_grpo_ext.rewards.api.protocols.verdict import (
    Scale,
    finished_content,
    label_or_number,
    marked,
    matched,
    scaled,
    schema_verdict,
)
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireRequest


@dataclass(frozen=True, kw_only=True)
class OpenAIChat(Judge):
    """Judge each completion by a rubric, perhaps beside a reference answer.

    Question, reference answer and completion are fenced: they stand between marks that they cannot
    contain. A conversation is one text in the fence, a message a line, ``role: content``.

    Args:
        model: Name of the judge, as the service knows it.
        rubric: What a good answer is.
        reference_column: Column of the data set with a reference answer to show to the judge.
        verdict: ``"mark"`` (between marks made for the request), ``"json_schema"`` (by
            ``response_format``, where the server supports it), or ``"pattern"``.
        verdict_pattern: For ``"pattern"``, of judges with a format of their own: a regular
            expression with one group. A completion that the judge quotes may match it too.
        labels: Verdicts in words and their scores, instead of a number: ``{"yes": 1, "no": 0}``.
        score_range: The lowest and the highest score; others are unreadable.
        scale: ``"unit"`` (scaled to 0 to 1), or ``"raw"``.
        temperature: 0 for the same verdict each time; above 0, scores are not cached. ``None``
            leaves it to the service, as some models demand.
        max_tokens: For reasoning and verdict. A verdict that was cut off is unreadable.
        seed: For services that take one.
        extra: More keys of the body, such as ``{"max_completion_tokens": 512}``.

    References:
        OpenAI API reference, "Create chat completion" and "Structured outputs": ``finish_reason``
        is ``length`` for a reply that was cut off; ``response_format`` of type ``json_schema`` has
        ``name``, ``strict`` and ``schema``, and strict schemas name each property as required and
        allow no others. Marking untrusted text: Hines et al. 2024, arXiv:2403.14720.

    Example:
        >>> judge = OpenAIChat(model="judge", score_range=(1, 5))
        >>> [request] = judge.requests([Item(prompt="2 + 2?", completion="4")])
        >>> request.path, request.indices
        ('/chat/completions', (0,))
        >>> verdict = "Right. <verdict-{mark}>5</verdict-{mark}>".format(**request.expected)
        >>> choice = {"message": {"content": verdict}, "finish_reason": "stop"}
        >>> judge.parse(request, {"choices": [choice]}).scores
        [1.0]
    """

    name: ClassVar[str] = "openai_chat"

    verdict: Literal["mark", "json_schema", "pattern"] = "mark"
    verdict_pattern: str | None = None
    labels: Mapping[str, float] | None = None
    score_range: tuple[float, float] = (0, 10)
    scale: Scale = "unit"

    def problems(self) -> Iterator[str]:
        """Yield what cannot work."""
        yield from super().problems()
        low, high = self.score_range
        if not 0 < high - low < math.inf:
            yield self.problem(
                "score_range", f"is {low} to {high}, so no score fits", "Write the lower first"
            )
        yield from self._label_problems()
        yield from self._pattern_problems()

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return one request an item."""
        return [
            self._request(item, index)
            for index, item in enumerate(items)
            if self.has_reference(item)
        ]

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the score of the verdict."""
        content, tokens = finished_content(body)
        score = self._score(content, request.expected["mark"])
        low, high = self.score_range
        return Reply([scaled(score, between=(low, high), scale=self.scale)], tokens)

    def _request(self, item: Item, index: int) -> WireRequest:
        parts = {**self.data(item), "response": without_control_tokens(item.completion)}
        mark = fence_mark(list(parts.values()))
        question = judge_message(
            parts, mark=mark, ask=self._ask(), verdict="VERDICT" if self.verdict == "mark" else None
        )
        schema = {"score": self._schema()} if self.verdict == "json_schema" else None
        payload = self.payload(question, schema)
        return WireRequest("/chat/completions", payload, (index,), expected={"mark": mark})

    def _ask(self) -> str:
        low, high = self.score_range
        choices = ", ".join(self.labels or ())
        wanted = f"one of: {choices}" if choices else f"a number from {low:g} to {high:g}"
        return (
            "Judge the response by the rubric. You may reason first. "
            f"Your verdict is {wanted}; nothing else."
        )

    def _schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.labels)} if self.labels else {"type": "number"}

    def _score(self, content: str, mark: str) -> float:
        if self.verdict == "json_schema":
            score = schema_verdict(content, key="score")
            return (
                label_or_number(text(score), labels=self.labels) if self.labels else number(score)
            )
        if self.verdict == "pattern":
            written = matched(content, pattern=self.verdict_pattern or "")
        else:
            written = marked(content, mark=mark)
        return label_or_number(written, labels=self.labels)

    def _label_problems(self) -> Iterator[str]:
        labels = {} if self.labels is None else self.labels
        low, high = self.score_range
        if self.labels is not None and len({label.casefold() for label in labels}) < 2:
            yield self.problem("labels", "has fewer than two words", "Name two verdicts or more")
        if outside := [label for label, score in labels.items() if not low <= score <= high]:
            yield self.problem(
                "labels",
                f"gives {', '.join(outside)} a score outside `score_range` ({low} to {high}), so "
                "such a verdict could not be read",
                "Set `score_range` to the lowest and the highest of `labels`",
            )

    def _pattern_problems(self) -> Iterator[str]:
        if (self.verdict == "pattern") != (self.verdict_pattern is not None):
            yield self.problem(
                "verdict_pattern",
                f"and `verdict`={self.verdict!r} do not go together, so it is open where the "
                "verdict stands",
                "Set both, with `verdict: pattern`, or neither",
            )
        if self.verdict_pattern is not None and _num_groups(self.verdict_pattern) != 1:
            yield self.problem(
                "verdict_pattern",
                f"is {self.verdict_pattern!r}, not a regular expression with one group, so no "
                "verdict could be read",
                r"Write one such as '\[\[(\d+)\]\]'",
            )


def _num_groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except (re.error, OverflowError):
        return -1
