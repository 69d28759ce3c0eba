"""Reward models behind SGLang: its own ``/classify``, or the OpenAI-like ``/v1/embeddings``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from trl_grpo_ext.rewards.api.protocols.reading import (
    array,
    component,
    entry,
    indexed,
    total_tokens,
)
from trl_grpo_ext.rewards.api.protocols.texts import ModelOnTexts
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireRequest


@dataclass(frozen=True, kw_only=True)
class SGLang(ModelOnTexts):
    """Score prompt and completion, joined to one text, in batches.

    The server applies no chat template, so write the model's own into ``turn``. For SGLang's
    ``/v1/classify``, which answers like vLLM's, take ``vllm_classify`` with ``send: texts``.

    Args:
        model: Name of the model, as the service knows it.
        turn: How a message of a conversation is written, with ``{role}`` and ``{content}``.
        endpoint: ``"classify"`` (texts under ``text``, the reply in their order) or
            ``"embeddings"`` (texts under ``input``, the reply with an ``index``).
        output_index: Which number of the output vector is the score; ``None`` for a model with a
            single one.
        batch_size: Texts a request.

    References:
        SGLang documentation, "SGLang Native APIs", Classify (reward model): ``{"model", "text"}``
        and a list of ``{"embedding"}``, and "OpenAI APIs - Embedding".

    Example:
        >>> reward = SGLang(model="reward")
        >>> [request] = reward.requests([Item("2 + 2 = ", "4"), Item("2 + 2 = ", "5")])
        >>> request.path, request.payload["text"]
        ('/classify', ['2 + 2 = 4', '2 + 2 = 5'])
        >>> reward.parse(request, [{"embedding": [1.5]}, {"embedding": [-2.0]}]).scores
        [1.5, -2.0]
    """

    name: ClassVar[str] = "sglang"

    endpoint: Literal["classify", "embeddings"] = "classify"
    output_index: int | None = None

    def problems(self) -> Iterator[str]:
        """Yield what cannot work."""
        yield from super().problems()
        if self.output_index is not None and self.output_index < 0:
            yield self.problem(
                "output_index", f"is {self.output_index}, which is no place", "Count from 0"
            )

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return a request a batch."""
        if self.endpoint == "classify":
            return self.batched(items, path="/classify", key="text", settings={})
        return self.batched(items, path="/v1/embeddings", key="input", settings={})

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the scores in the order of the request."""
        if self.endpoint == "classify":
            data = array(body, length=len(request.indices))
        else:
            data = indexed(entry(body, "data"), length=len(request.indices))
        scores = [component(entry(one, "embedding"), index=self.output_index) for one in data]
        return Reply(scores, total_tokens(body))
