"""Rerankers behind text-embeddings-inference ``/rerank``: the completions of a prompt at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from trl_grpo_ext.rewards.api.protocols.options import ServiceProtocol
from trl_grpo_ext.rewards.api.protocols.reading import entry, indexed, number
from trl_grpo_ext.rewards.api.protocols.rendering import TURN, batches, prompt_text
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireRequest


@dataclass(frozen=True, kw_only=True)
class TEIRerank(ServiceProtocol):
    """Score each completion by its relevance to the prompt, those of one prompt in a request.

    The reply is sorted by score and put back in order by its indices. A conversation is joined to
    one text, which is the query.

    Args:
        turn: How a message of a conversation is written, with ``{role}`` and ``{content}``.
        raw_scores: Whether scores are logits; otherwise the server puts them through a sigmoid.
        truncate: Whether texts that are too long are cut instead of refused.
        batch_size: Completions a request; the server's ``--max-client-batch-size`` is 32 by
            default.

    References:
        text-embeddings-inference, ``router/src/http/types.rs`` (``RerankRequest``, ``Rank``).

    Example:
        >>> rerank = TEIRerank()
        >>> [request] = rerank.requests([Item("2 + 2?", "4"), Item("2 + 2?", "fish")])
        >>> request.payload["query"], request.payload["texts"]
        ('2 + 2?', ['4', 'fish'])
        >>> rerank.parse(request, [{"index": 1, "score": 3.0}, {"index": 0, "score": 0.5}]).scores
        [0.5, 3.0]
    """

    name: ClassVar[str] = "tei_rerank"

    turn: str = TURN
    raw_scores: bool = True
    truncate: bool = False
    batch_size: int = 32

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return a request for each prompt, or several for one with many completions."""
        by_query: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            by_query.setdefault(prompt_text(item.prompt, turn=self.turn), []).append(index)
        return [
            self._request(items, query, batch)
            for query, members in by_query.items()
            for batch in batches(members, self.batch_size)
        ]

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the scores in the order of the request."""
        ranks = indexed(body, length=len(request.indices))
        return Reply([number(entry(rank, "score")) for rank in ranks])

    def _request(self, items: Sequence[Item], query: str, batch: tuple[int, ...]) -> WireRequest:
        texts = [items[index].completion for index in batch]
        flags = {"raw_scores": self.raw_scores, "truncate": self.truncate}
        return WireRequest("/rerank", {"query": query, "texts": texts, **flags}, batch)
