"""A service of your own: a template for the body, and a path to the score in the reply."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from trl_grpo_ext.rewards.api.protocols.json_path import follow, path_steps
from trl_grpo_ext.rewards.api.protocols.options import ServiceProtocol
from trl_grpo_ext.rewards.api.protocols.reading import array, in_order, number
from trl_grpo_ext.rewards.api.protocols.rendering import (
    TURN,
    batches,
    cell,
    filled,
    prompt_messages,
    prompt_text,
)
from trl_grpo_ext.rewards.api.protocols.verdict import Scale, scaled
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireRequest
from trl_grpo_ext.rewards.scores import Score

_WHOLE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class GenericJSON(ServiceProtocol):
    """Ask any service that takes and returns JSON.

    A text of the template that is ``{name}`` as a whole is replaced by the value as it is: a number
    stays a number, a list a list. Inside a longer text the value is written out. ``prompt`` is the
    prompt as a text (a conversation is joined), ``messages`` the prompt as messages,
    ``completion`` the completion, and any other name a column of the data set.

    In batches, each placeholder stands for the list of the items' values.

    Args:
        template: The body, with placeholders.
        score_path: Where the score stands: keys with dots between them, ``[0]`` for a place in a
            list, and in batches one ``[*]`` for each entry. ``null`` there means that the service
            could not score.
        path: Appended to the base URL.
        index_path: In batches, where the index of each score stands, for services that sort.
        score_range: The lowest and the highest score; others are unreadable.
        scale: ``"raw"``, or ``"unit"`` (``score_range`` scaled to 0 to 1).
        turn: How a message of a conversation is written in ``{prompt}``.
        batch_size: Items a request.
        is_random: Whether the service may answer the same request differently, so that scores are
            not cached.

    Example:
        >>> mine = GenericJSON(
        ...     template={"question": "{prompt}", "reply": "{completion}", "gold": "{answer}"},
        ...     score_path="result.score",
        ... )
        >>> [request] = mine.requests([Item("2 + 2?", "4", columns={"answer": 4})])
        >>> request.payload
        {'question': '2 + 2?', 'reply': '4', 'gold': 4}
        >>> mine.parse(request, {"result": {"score": 0.5}}).scores
        [0.5]
    """

    name: ClassVar[str] = "generic_json"
    required: ClassVar[tuple[str, ...]] = ("template", "score_path")

    template: Mapping[str, Any] = field(default_factory=dict)
    score_path: str = ""
    path: str = ""
    index_path: str | None = None
    score_range: tuple[float, float] | None = None
    scale: Scale = "raw"
    turn: str = TURN
    batch_size: int = 1
    is_random: bool = False

    @property
    def is_sampled(self) -> bool:
        """Whether the service may answer the same request differently."""
        return self.is_random

    @property
    def required_columns(self) -> frozenset[str]:
        """The columns of the data set that the template names."""
        names = (name for text in _texts(self.template) for name in _WHOLE.findall(text))
        return frozenset(names) - {"prompt", "messages", "completion"}

    def problems(self) -> Iterator[str]:
        """Yield what cannot work."""
        yield from super().problems()
        yield from self._path_problems()
        if self.batch_size > 1 and any(_in_longer_text(text) for text in _texts(self.template)):
            yield self.problem(
                "template",
                "has a placeholder inside a longer text, which cannot stand for a list of values",
                "Let the text be the placeholder alone, or set `batch_size` to 1",
            )
        low, high = self.score_range or (0, 1)
        if not 0 < high - low < math.inf or (self.scale == "unit" and self.score_range is None):
            yield self.problem(
                "score_range",
                f"is {self.score_range}, by which no score can be checked or scaled",
                "Write the lowest and the highest score",
            )

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return a request an item, or a batch."""
        return [
            WireRequest(self.path, self._body([items[index] for index in batch]), batch)
            for batch in batches(range(len(items)), self.batch_size)
        ]

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the scores in the order of the request."""
        found = follow(path_steps(self.score_path), body)
        if self.batch_size == 1:
            return Reply([self._score(found)])
        values = array(found, length=len(request.indices))
        if self.index_path is not None:
            places = follow(path_steps(self.index_path), body)
            values = in_order(values, array(places, length=len(values)))
        return Reply([self._score(value) for value in values])

    def _score(self, value: Any) -> Score:
        if value is None:
            return None
        low, high = self.score_range or (-math.inf, math.inf)
        return scaled(number(value), between=(low, high), scale=self.scale)

    def _body(self, items: Sequence[Item]) -> Any:
        if self.batch_size == 1:
            return _replaced(self.template, lambda name: self._value(items[0], name))
        return _replaced(self.template, lambda name: [self._value(item, name) for item in items])

    def _value(self, item: Item, name: str) -> Any:
        if name == "prompt":
            return prompt_text(item.prompt, turn=self.turn)
        if name == "messages":
            return prompt_messages(item.prompt)
        if name == "completion":
            return item.completion
        return cell(item, name, protocol=self.name, option="template")

    def _path_problems(self) -> Iterator[str]:
        for option in ("score_path", "index_path"):
            path = getattr(self, option)
            if not path:
                continue
            try:
                has_each = None in path_steps(path)
            except ValueError as error:
                yield self.problem(
                    option,
                    f"cannot be followed ({error})",
                    "Write keys with dots between them, [0] and [*]",
                )
                continue
            if has_each != (self.batch_size > 1):
                yield self.problem(
                    option,
                    f"is {path!r} with `batch_size`={self.batch_size}, so it does not lead to one "
                    "value an item",
                    "Use one [*] in batches, and none without",
                )


def _replaced(template: Any, value: Any) -> Any:
    if isinstance(template, Mapping):
        return {key: _replaced(part, value) for key, part in template.items()}
    if isinstance(template, list | tuple):
        return [_replaced(part, value) for part in template]
    if not isinstance(template, str):
        return template
    if whole := _WHOLE.fullmatch(template):
        return value(whole[1])
    return filled(template, {name: _written(value(name)) for name in _WHOLE.findall(template)})


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _texts(template: Any) -> Iterator[str]:
    if isinstance(template, str):
        yield template
    elif isinstance(template, Mapping | list | tuple):
        parts = template.values() if isinstance(template, Mapping) else template
        for part in parts:
            yield from _texts(part)


def _in_longer_text(text: str) -> bool:
    return bool(_WHOLE.search(text)) and not _WHOLE.fullmatch(text)
