"""The wire protocol of a process reward model behind vLLM's ``/pooling``: a score a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from trl_grpo_ext.rewards.api.protocols.fence import without_control_tokens
from trl_grpo_ext.rewards.api.protocols.options import ServiceProtocol
from trl_grpo_ext.rewards.api.protocols.reading import (
    array,
    entry,
    indexed,
    number,
    total_tokens,
    unreadable,
)
from trl_grpo_ext.rewards.api.protocols.rendering import messages, prompt_messages
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireRequest
from trl_grpo_ext.rewards.completion import Message
from trl_grpo_ext.rewards.models.reading import changed
from trl_grpo_ext.rewards.models.step_reading import ReadSteps, Solution
from trl_grpo_ext.rewards.models.steps import score_label

_ROUNDING = 1e-3  # that a probability in half precision may be off


@dataclass(frozen=True, kw_only=True)
class StepPooling(ServiceProtocol):
    """Ask about completions, one request each, and read a score for each step.

    The items of a group are the steps of one solution. What is sent of it stands in their
    columns, as :func:`step_items` writes it. The reply has a row of class probabilities a step, or
    a row a token if token ids were sent; any other number of rows cannot be assigned to steps, so
    these have no score then.

    Args:
        model: Name of the model, as the service knows it.
        step_separator: What steps were split by; as all below, a part of the key of the cache.
        step_tag: What stands after each step.
        tokenizer: That made the token ids; ``None`` if texts are sent.
        label: Which probability of a row is the score; ``None`` for rows of one or two.
        task: Of the service, for servers that serve several; ``None`` for its default.

    References:
        vLLM, ``vllm/entrypoints/pooling/pooling/protocol.py``, and ``StepPool`` (rows at the step
        tag) and ``AllPool`` (a row a token) in ``vllm/model_executor/layers/pooler``.

    Example:
        >>> steps = StepPooling(model="prm", step_separator=" ", step_tag="<s>")
        >>> solution = Solution("2 + 2?", "2+2=4 2+2=5", ["2+2=4", "2+2=5"])
        >>> items = step_items(solution, tag="<s>")
        >>> [request] = steps.requests(items)
        >>> request.payload["input"]
        '2 + 2?2+2=4<s>2+2=5<s>'
        >>> data = [{"index": 0, "data": [[0.1, 0.9], [0.8, 0.2]]}]
        >>> steps.parse(request, {"data": data}).scores
        [0.9, 0.2]
    """

    name: ClassVar[str] = "process_model"
    is_relative: ClassVar[bool] = True  # the steps of a completion are asked about together

    model: str
    step_separator: str
    step_tag: str
    tokenizer: str | None = None
    label: int | None = None
    task: str | None = "token_classify"

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return one request a group."""
        groups: dict[int, list[int]] = {}
        for position, item in enumerate(items):
            groups.setdefault(item.group, []).append(position)
        return [self._request(items[steps[0]], tuple(steps)) for steps in groups.values()]

    def _request(self, item: Item, indices: tuple[int, ...]) -> WireRequest:
        payload = {
            "model": self.model,
            **item.columns["sent"],
            "use_activation": True,
            "truncate_prompt_tokens": -1,  # to what the model takes, instead of a refusal
            **({} if self.task is None else {"task": self.task}),
        }
        return WireRequest("/pooling", payload, indices, {"ends": item.columns["ends"]})

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the scores of the steps, in their order; ``None`` for all if rows are missing."""
        [reply] = indexed(entry(body, "data"), length=1)
        rows = _rows_of_steps(array(entry(reply, "data")), request)
        scores = [None] * len(request.indices) if rows is None else [self._score(r) for r in rows]
        return Reply(scores, total_tokens(body))

    def _score(self, row: Any) -> float:
        classes = array(row) if isinstance(row, list) else [row]
        label = score_label(self.label, num_labels=len(classes))
        if label is None:
            unreadable(f"a row has {len(classes)} classes, and `label` is {self.label}")
        score = number(classes[label])
        if not -_ROUNDING <= score <= 1 + _ROUNDING:
            unreadable("a score is not between 0 and 1, as probabilities are")
        return min(max(score, 0.0), 1.0)


def _rows_of_steps(rows: Sequence[Any], request: WireRequest) -> Sequence[Any] | None:
    """Return the row of each step; ``None`` if it is not clear which that is."""
    if len(rows) == len(request.indices):
        return rows
    if not (ends := request.expected["ends"]):
        return None
    ids = request.payload["input"]
    tag = ids[ends[0]]
    places = [place for place, index in enumerate(ids) if index == tag]  # of the prompt as well
    if len(rows) == len(places):
        return [row for place, row in zip(places, rows, strict=True) if place in ends]
    return [rows[end] for end in ends] if len(rows) == len(ids) else None


def step_items(
    solution: Solution, *, tag: str, read: ReadSteps | None = None, group: int = 0
) -> list[Item]:
    """Return an item for each step of a solution, with what is sent of it in the columns.

    That is token ids if there is a tokenizer to read with. Else it is text, a conversation as
    messages; the service may read special tokens in it, so a step cannot hold the tag, nor what
    chat templates write between messages, and neither can earlier messages of the completion.

    Args:
        solution: With its steps.
        tag: Written after each step.
        read: ``None`` to send text.
        group: The solution's number.

    Returns:
        No items if the solution is longer than the model takes.
    """
    reading = None
    if read is not None and (reading := read(solution)) is None:
        return []
    columns = {
        "sent": {"input": reading.ids} if reading else _sent_text(solution, tag),
        "ends": reading.ends if reading else [],
        "is_cut": bool(reading and reading.num_cut),
    }
    return [Item(solution.prompt, step, columns, group) for step in solution.steps]


def _sent_text(solution: Solution, tag: str) -> dict[str, Any]:
    answer = "".join(_untagged(step, tag) + tag for step in solution.steps)
    if isinstance(solution.prompt, str):
        return {"input": solution.prompt + answer}
    said = solution.completion
    earlier = [] if isinstance(said, str) else [_untagged_message(one, tag) for one in said[:-1]]
    if not earlier:
        return {"messages": messages(Item(solution.prompt, answer))}
    before = prompt_messages([*solution.prompt, *earlier])
    return {"messages": [*before, {"role": "assistant", "content": answer}]}


def _untagged_message(message: Message, tag: str) -> Message:
    return cast(Message, changed(message, lambda text: _untagged(text, tag)))


def _untagged(step: str, tag: str) -> str:
    return without_control_tokens(step.replace(tag.strip(), "\N{REPLACEMENT CHARACTER}"))
