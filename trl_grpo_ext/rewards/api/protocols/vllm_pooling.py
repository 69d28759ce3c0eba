"""Process reward models behind vLLM's ``/pooling``: a score a step, reduced to one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from trl_grpo_ext.rewards.api.protocols.reading import (
    array,
    component,
    entry,
    indexed,
    number,
    total_tokens,
    unreadable,
)
from trl_grpo_ext.rewards.api.protocols.texts import PoolingModel
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireRequest

_REDUCTIONS: Mapping[str, Callable[[list[float]], float]] = {
    "last": lambda steps: steps[-1],
    "min": min,
    "mean": lambda steps: sum(steps) / len(steps),
    "product": math.prod,
}


@dataclass(frozen=True, kw_only=True)
class VLLMPooling(PoolingModel):
    """Score each completion by the steps that a process reward model scored.

    The reply has a vector of scores, or a row of class scores for each step or token; rows are
    reduced to one number.

    Args:
        model: As for ``vllm_classify``, and so are the options that are not named here.
        reduce: ``"min"`` (a chain is as good as its weakest step), ``"last"``, ``"mean"`` or
            ``"product"``.
        class_index: Which entry of a row is the score, such as 1 for "good" of two classes;
            ``None`` for rows of one.
        task: Sent if it is set, for servers that serve several, such as ``"token_classify"``.

    References:
        vLLM, ``vllm/entrypoints/pooling/pooling/protocol.py``: ``data[].data`` is a list of
        numbers or a list of such lists. Reductions: Lightman et al. 2023, arXiv:2305.20050
        (product, minimum); Snell et al. 2024, arXiv:2408.03314 (last).

    Example:
        >>> steps = VLLMPooling(model="prm", class_index=1)
        >>> [request] = steps.requests([Item("2 + 2 + 2?", "2 + 2 = 4. 4 + 2 = 7.")])
        >>> data = [{"index": 0, "data": [[0.1, 0.9], [0.8, 0.2]]}]
        >>> steps.parse(request, {"data": data}).scores
        [0.2]
    """

    name: ClassVar[str] = "vllm_pooling"

    reduce: Literal["min", "last", "mean", "product"] = "min"
    task: str | None = None

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return one request an item, or a batch of texts."""
        settings = {} if self.task is None else {"task": self.task}
        return self.pooling_requests(items, path="/pooling", settings=settings)

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the reduced scores in the order of the request."""
        data = indexed(entry(body, "data"), length=len(request.indices))
        return Reply([self._score(entry(one, "data")) for one in data], total_tokens(body))

    def _score(self, value: Any) -> float:
        rows = array(value)
        if not rows:
            unreadable("there are no steps")
        if isinstance(rows[0], list):
            width = len(rows[0])
            steps = [component(array(row, length=width), index=self.class_index) for row in rows]
        else:
            steps = [number(step) for step in rows]
        return number(_REDUCTIONS[self.reduce](steps))
