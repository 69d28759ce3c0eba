"""Cross-encoders behind vLLM's ``/score``: how well a completion fits its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from trl_grpo_ext.rewards.api.protocols.options import ServiceProtocol
from trl_grpo_ext.rewards.api.protocols.reading import entry, indexed, number, total_tokens
from trl_grpo_ext.rewards.api.protocols.rendering import TURN, batches, prompt_text
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireRequest


@dataclass(frozen=True, kw_only=True)
class VLLMScore(ServiceProtocol):
    """Score pairs of prompt and completion, in batches.

    The prompt is the first text of a pair; a conversation is joined to one text.

    Args:
        model: Name of the model, as the service knows it.
        turn: How a message of a conversation is written, with ``{role}`` and ``{content}``.
        use_activation: False for raw scores; ``None`` leaves it to the model.
        batch_size: Pairs a request.

    References:
        vLLM, ``vllm/entrypoints/pooling/scoring/protocol.py``: ``text_1`` and ``text_2``, each a
        text or a list; the reply has ``data[].index`` and ``data[].score``.

    Example:
        >>> score = VLLMScore(model="cross-encoder")
        >>> [request] = score.requests([Item("2 + 2?", "4"), Item("3 + 3?", "6")])
        >>> request.payload["text_1"], request.payload["text_2"]
        (['2 + 2?', '3 + 3?'], ['4', '6'])
    """

    name: ClassVar[str] = "vllm_score"
    required: ClassVar[tuple[str, ...]] = ("model",)

    model: str = ""
    turn: str = TURN
    use_activation: bool | None = None
    batch_size: int = 32

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return a request a batch."""
        prompts = [prompt_text(item.prompt, turn=self.turn) for item in items]
        chosen = {} if self.use_activation is None else {"use_activation": self.use_activation}
        return [
            WireRequest(
                "/score",
                {
                    "model": self.model,
                    "text_1": [prompts[index] for index in batch],
                    "text_2": [items[index].completion for index in batch],
                    **chosen,
                },
                batch,
            )
            for batch in batches(range(len(items)), self.batch_size)
        ]

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the scores in the order of the request."""
        data = indexed(entry(body, "data"), length=len(request.indices))
        return Reply([number(entry(one, "score")) for one in data], total_tokens(body))
