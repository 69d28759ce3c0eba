"""Reward models behind NVIDIA NIM: attributes and their scores as the text of a chat reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from trl_grpo_ext.rewards.api.protocols.options import ServiceProtocol
from trl_grpo_ext.rewards.api.protocols.reading import (
    array,
    entry,
    number,
    text,
    total_tokens,
    unreadable,
    written_number,
)
from trl_grpo_ext.rewards.api.protocols.rendering import messages
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireRequest


@dataclass(frozen=True, kw_only=True)
class NIM(ServiceProtocol):
    """Score each completion by a NIM reward model, one request a completion.

    A conversation is passed on as messages, with the completion as the last one. The scores of
    such models compare answers to one prompt, which is all that GRPO does with them.

    Args:
        model: Name of the model, as the service knows it.
        weights: What each attribute is multiplied by before they are added, such as
            ``{"helpfulness": 0.3, "correctness": 0.74}``. Attributes without a weight do not
            count. ``None`` for models with a single score.

    References:
        NVIDIA NIM for LLMs, "Use Reward Models": the prompt goes into a user message and the answer
        into an assistant message, the reply is ``attribute:score`` pairs, separated by commas, in
        ``choices[0].message.content``.

    Example:
        >>> nim = NIM(model="reward", weights={"helpfulness": 1.0, "verbosity": -0.5})
        >>> [request] = nim.requests([Item(prompt="2 + 2?", completion="4")])
        >>> content = "helpfulness:1.5,correctness:2.0,verbosity:1.0"
        >>> nim.parse(request, {"choices": [{"message": {"content": content}}]}).scores
        [1.0]
    """

    name: ClassVar[str] = "nim"
    required: ClassVar[tuple[str, ...]] = ("model",)

    model: str = ""
    weights: Mapping[str, float] | None = None

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return one request an item."""
        return [
            WireRequest(
                "/chat/completions", {"model": self.model, "messages": messages(item)}, (index,)
            )
            for index, item in enumerate(items)
        ]

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the weighted score."""
        choice = array(entry(body, "choices"), length=1)[0]
        scores = attributes(text(entry(entry(choice, "message"), "content")))
        if self.weights is None:
            if len(scores) != 1:
                unreadable(f"there are {len(scores)} attributes and no `weights`")
            return Reply(list(scores.values()), total_tokens(body))
        weighted = (weight * entry(scores, name) for name, weight in self.weights.items())
        return Reply([number(sum(weighted))], total_tokens(body))


def attributes(content: str) -> dict[str, float]:
    """Return the scores by attribute; a score alone has the name ``reward``.

    Raises:
        UnreadableReplyError: something else stands in the text, or an attribute twice.

    Example:
        >>> attributes("helpfulness:1.5,verbosity:-0.25"), attributes("-7.5")
        ({'helpfulness': 1.5, 'verbosity': -0.25}, {'reward': -7.5})
    """
    if ":" not in content:
        return {"reward": written_number(content)}
    pairs = [part.partition(":") for part in content.split(",")]
    scores = {name.strip(): written_number(score) for name, _, score in pairs}
    if len(scores) != len(pairs) or "" in scores:
        unreadable("an attribute stands there twice, or has no name")
    return scores
