"""Classification and reward models behind vLLM's ``/classify``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from trl_grpo_ext.rewards.api.protocols.reading import (
    array,
    component,
    entry,
    indexed,
    total_tokens,
    whole,
)
from trl_grpo_ext.rewards.api.protocols.texts import PoolingModel
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireRequest


@dataclass(frozen=True, kw_only=True)
class VLLMClassify(PoolingModel):
    r"""Score each completion by the output of a classification or reward model.

    Args:
        model: Name of the model, as the service knows it.
        send: ``"messages"`` (passed on; the server applies the model's chat template, one request a
            completion) or ``"texts"`` (prompt and completion joined to one text, in batches).
        turn: For texts of conversations: how a message is written, with ``{role}`` and
            ``{content}``, such as ``"<|im_start|>{role}\n{content}<|im_end|>\n"``. Without a BOS,
            which the server adds.
        add_special_tokens: False for texts that begin with a BOS of their own: two would change
            the scores.
        class_index: Which class is the score; ``None`` for a model with a single output.
        use_activation: False for raw scores instead of probabilities; ``None`` leaves it to the
            model.
        activation_key: ``"activation"`` for servers that know ``use_activation`` by this name.
        batch_size: Texts a request.

    References:
        vLLM, ``vllm/entrypoints/pooling/classify/protocol.py`` and ``base/protocol.py``: ``input``
        or ``messages``, ``use_activation``, ``add_special_tokens`` (true for texts, false for
        messages); the reply has ``data[].index``,
        ``data[].probs`` and ``data[].num_classes``.

    Example:
        >>> reward = VLLMClassify(model="reward", send="texts", class_index=1)
        >>> [request] = reward.requests([Item("2 + 2 = ", "4"), Item("2 + 2 = ", "5")])
        >>> request.payload
        {'model': 'reward', 'input': ['2 + 2 = 4', '2 + 2 = 5']}
        >>> data = [{"index": 1, "probs": [0.9, 0.1]}, {"index": 0, "probs": [0.25, 0.75]}]
        >>> reward.parse(request, {"data": data}).scores
        [0.75, 0.1]
    """

    name: ClassVar[str] = "vllm_classify"

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return one request an item, or a batch of texts."""
        return self.pooling_requests(items, path="/classify", settings={})

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the scores in the order of the request."""
        data = indexed(entry(body, "data"), length=len(request.indices))
        return Reply([self._score(one) for one in data], total_tokens(body))

    def _score(self, one: Any) -> float:
        probs = entry(one, "probs")
        if "num_classes" in one:
            array(probs, length=whole(one["num_classes"]))
        return component(probs, index=self.class_index)
