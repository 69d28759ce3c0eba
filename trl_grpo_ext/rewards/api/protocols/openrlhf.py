"""Reward servers that speak OpenRLHF's ``/get_reward``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from trl_grpo_ext.rewards.api.protocols.options import ServiceProtocol
from trl_grpo_ext.rewards.api.protocols.reading import array, entry, number
from trl_grpo_ext.rewards.api.protocols.rendering import (
    TURN,
    batches,
    cell,
    joined,
    prompt_text,
)
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireRequest


@dataclass(frozen=True, kw_only=True)
class OpenRLHF(ServiceProtocol):
    """Score prompt and completion, joined to one text, by a reward server of OpenRLHF, in batches.

    Args:
        turn: How a message of a conversation is written, with ``{role}`` and ``{content}``. The
            server applies no chat template.
        label_column: Column of the data set that is sent as ``labels``, such as the gold answers.
        score_key: Which list of the reply is the reward: ``"rewards"``, or ``"scores"``.
        batch_size: Texts a request.

    References:
        OpenRLHF, ``openrlhf/cli/serve_rm.py`` (``query`` in, ``rewards`` out) and
        ``openrlhf/utils/remote_rm_utils.py`` (the key of the rewards is configurable).

    Example:
        >>> server = OpenRLHF(label_column="answer")
        >>> [request] = server.requests([Item("2 + 2 = ", "4", columns={"answer": "4"})])
        >>> request.payload
        {'query': ['2 + 2 = 4'], 'prompts': ['2 + 2 = '], 'labels': ['4']}
        >>> server.parse(request, {"rewards": [1.0]}).scores
        [1.0]
    """

    name: ClassVar[str] = "openrlhf"
    required: ClassVar[tuple[str, ...]] = ("score_key",)

    turn: str = TURN
    label_column: str | None = None
    score_key: str = "rewards"
    batch_size: int = 32

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return a request a batch."""
        return [
            WireRequest("/get_reward", self._payload([items[index] for index in batch]), batch)
            for batch in batches(range(len(items)), self.batch_size)
        ]

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the rewards in the order of the request."""
        rewards = array(entry(body, self.score_key), length=len(request.indices))
        return Reply([number(reward) for reward in rewards])

    def _payload(self, items: Sequence[Item]) -> dict[str, Any]:
        payload = {
            "query": [joined(item, turn=self.turn) for item in items],
            "prompts": [prompt_text(item.prompt, turn=self.turn) for item in items],
        }
        if self.label_column is not None:
            payload["labels"] = [self._label(item, self.label_column) for item in items]
        return payload

    def _label(self, item: Item, name: str) -> Any:
        return cell(item, name, protocol=self.name, option="label_column")
