"""What the reward models on vLLM and SGLang share: how prompt and completion are sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from trl_grpo_ext.rewards.api.protocols.options import ServiceProtocol
from trl_grpo_ext.rewards.api.protocols.rendering import TURN, batches, joined, messages
from trl_grpo_ext.rewards.api.wire import Item, WireRequest


@dataclass(frozen=True, kw_only=True)
class ModelOnTexts(ServiceProtocol):
    """Options of a model that scores a text, which prompt and completion are joined to."""

    required: ClassVar[tuple[str, ...]] = ("model",)

    model: str = ""
    turn: str = TURN
    batch_size: int = 32

    def batched(
        self, items: Sequence[Item], *, path: str, key: str, settings: Mapping[str, Any]
    ) -> list[WireRequest]:
        """Return requests with a list of texts under ``key`` in the body."""
        texts = [joined(item, turn=self.turn) for item in items]
        return [
            WireRequest(
                path, {"model": self.model, key: [texts[i] for i in batch], **settings}, batch
            )
            for batch in batches(range(len(items)), self.batch_size)
        ]


@dataclass(frozen=True, kw_only=True)
class PoolingModel(ModelOnTexts):
    """Options of a pooling model of vLLM, which takes messages or a list of texts."""

    send: Literal["messages", "texts"] = "messages"
    class_index: int | None = None
    use_activation: bool | None = None
    activation_key: Literal["use_activation", "activation"] = "use_activation"
    add_special_tokens: bool = True

    def problems(self) -> Iterator[str]:
        """Yield what cannot work."""
        yield from super().problems()
        if self.class_index is not None and self.class_index < 0:
            yield self.problem(
                "class_index", f"is {self.class_index}, which is no class", "Count from 0"
            )

    def pooling_requests(
        self, items: Sequence[Item], *, path: str, settings: Mapping[str, Any]
    ) -> list[WireRequest]:
        """Return one request an item with its messages, or requests with lists of texts."""
        chosen = dict(settings)
        if self.use_activation is not None:
            chosen[self.activation_key] = self.use_activation
        if self.send == "texts":
            if not self.add_special_tokens:
                chosen["add_special_tokens"] = False
            return self.batched(items, path=path, key="input", settings=chosen)
        return [
            WireRequest(path, {"model": self.model, "messages": messages(item), **chosen}, (index,))
            for index, item in enumerate(items)
        ]
