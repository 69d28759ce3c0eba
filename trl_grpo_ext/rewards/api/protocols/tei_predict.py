"""Classification and reward models behind text-embeddings-inference ``/predict``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from trl_grpo_ext.rewards.api.protocols.options import ServiceProtocol
from trl_grpo_ext.rewards.api.protocols.reading import array, entry, number, text, unreadable
from trl_grpo_ext.rewards.api.protocols.rendering import TURN, batches, joined, prompt_text
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireRequest


@dataclass(frozen=True, kw_only=True)
class TEIPredict(ServiceProtocol):
    """Score texts by the output for one label, in batches.

    A batch is a list of lists: a flat list of two texts would be taken as one pair. The reply
    sorts the labels of each text by their score, so the score is found by its label.

    Args:
        label: Whose score it is; ``None`` for a model with a single label.
        send: ``"joined"`` (prompt and completion as one text) or ``"pairs"``, for cross-encoders. A
            conversation is joined to one text.
        turn: How a message of a conversation is written, with ``{role}`` and ``{content}``.
        raw_scores: Whether scores are logits; otherwise the server puts them through softmax or
            sigmoid, and a single label through softmax would always be 1.
        truncate: Whether texts that are too long are cut instead of refused. A cut text is
            scored without its end.
        batch_size: Texts a request; the server's ``--max-client-batch-size`` is 32 by default.

    References:
        text-embeddings-inference, ``router/src/http/types.rs`` (``PredictRequest``,
        ``PredictInput``, ``PredictResponse``).

    Example:
        >>> reward = TEIPredict()
        >>> [request] = reward.requests([Item("2 + 2 = ", "4"), Item("2 + 2 = ", "5")])
        >>> request.payload["inputs"]
        [['2 + 2 = 4'], ['2 + 2 = 5']]
        >>> body = [[{"label": "LABEL_0", "score": 1.5}], [{"label": "LABEL_0", "score": -2.0}]]
        >>> reward.parse(request, body).scores
        [1.5, -2.0]
    """

    name: ClassVar[str] = "tei_predict"

    label: str | None = None
    send: Literal["joined", "pairs"] = "joined"
    turn: str = TURN
    raw_scores: bool = True
    truncate: bool = False
    batch_size: int = 32

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return a request a batch."""
        inputs = [self._input(item) for item in items]
        flags = {"raw_scores": self.raw_scores, "truncate": self.truncate}
        return [
            WireRequest("/predict", {"inputs": [inputs[index] for index in batch], **flags}, batch)
            for batch in batches(range(len(items)), self.batch_size)
        ]

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the scores of the label."""
        return Reply([self._score(one) for one in array(body, length=len(request.indices))])

    def _input(self, item: Item) -> list[str]:
        if self.send == "pairs":
            return [prompt_text(item.prompt, turn=self.turn), item.completion]
        return [joined(item, turn=self.turn)]

    def _score(self, value: Any) -> float:
        scores = [(text(entry(one, "label")), number(entry(one, "score"))) for one in array(value)]
        found = [score for label, score in scores if self.label in (None, label)]
        if len(found) != 1:
            unreadable(f"{len(found)} labels of {len(scores)} are the score, not one")
        return found[0]
