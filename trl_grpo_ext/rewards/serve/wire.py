"""The two shapes of the server: requests to texts, scores to replies."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from trl_grpo_ext.rewards.scores import Score
from trl_grpo_ext.rewards.serve.settings import Limits


class RefusedError(ValueError):
    """A request that is not answered with scores.

    Args:
        message: For the client; it never repeats what the client sent.
        status: HTTP status, from 400 to 499.
    """

    def __init__(self, message: str, *, status: int = 400) -> None:
        self.status = status
        super().__init__(message)


@dataclass(frozen=True)
class RewardRequest:
    """A request of the ``openrlhf`` shape; the lists that are there have one length.

    Attributes:
        query: Prompt and response, one text each.
        prompts: The prompts alone, if the client sent them.
        labels: Whatever JSON stands for the right answer, if the client sent it.
    """

    query: list[str]
    prompts: list[str] | None = None
    labels: list[Any] | None = None


@dataclass(frozen=True)
class ClassifyRequest:
    """A request of the ``/classify`` shape.

    Attributes:
        texts: To be scored.
        model: Which the client takes the server for, if it says.
        use_activation: Whether probabilities are asked for, not raw logits.
    """

    texts: list[str]
    model: str | None = None
    use_activation: bool = True


@dataclass(frozen=True)
class Rewards:
    """One reward a query, ``None`` where there is none, and numbers to log."""

    rewards: Sequence[Score]
    extra_logs: Mapping[str, Score]


@dataclass(frozen=True)
class Classified:
    """The scores of one text, a value a label, and how many tokens it has."""

    values: Sequence[Score]
    num_tokens: int
    label: str | None = None


def read_reward_request(body: bytes, *, limits: Limits) -> RewardRequest:
    """Return what a body of the ``openrlhf`` shape asks for.

    Raises:
        RefusedError: It is not of that shape, or beyond the limits.

    Example:
        >>> body = b'{"query": ["1+1=2"], "prompts": ["1+1="], "labels": [2]}'
        >>> read_reward_request(body, limits=Limits())
        RewardRequest(query=['1+1=2'], prompts=['1+1='], labels=[2])
    """
    asked = _read_object(body)
    query = _texts(asked.get("query"), name="query", limits=limits)
    prompts, labels = asked.get("prompts"), asked.get("labels")
    if prompts is not None:
        prompts = _texts(prompts, name="prompts", limits=limits)
    if labels is not None and not isinstance(labels, list):
        _refuse("`labels` is no list. Send one label a query, or leave it out.")
    for name, values in (("prompts", prompts), ("labels", labels)):
        if values is not None and len(values) != len(query):
            _refuse(
                f"`{name}` has {len(values)} entries and `query` has {len(query)}, so they cannot "
                "be matched. Send one a query."
            )
    return RewardRequest(query, prompts, labels)


def read_classify_request(body: bytes, *, limits: Limits) -> ClassifyRequest:
    """Return what a body of the ``/classify`` shape asks for.

    Raises:
        RefusedError: It is not of that shape, or beyond the limits.

    Example:
        >>> read_classify_request(b'{"input": "fine", "use_activation": false}', limits=Limits())
        ClassifyRequest(texts=['fine'], model=None, use_activation=False)
    """
    asked = _read_object(body)
    texts, model = asked.get("input"), asked.get("model")
    activation = asked.get("use_activation", asked.get("activation"))  # the older name
    if model is not None and not isinstance(model, str):
        _refuse("`model` is no text. Send the name that /v1/models shows, or leave it out.")
    if activation is not None and not isinstance(activation, bool):
        _refuse("`use_activation` is neither true nor false. Send false for raw logits.")
    listed = [texts] if isinstance(texts, str) else texts
    texts = _texts(listed, name="input", limits=limits)
    return ClassifyRequest(texts, model, activation is not False)


def reward_reply(rewards: Rewards) -> dict[str, Any]:
    """Return the body of a reply of the ``openrlhf`` shape.

    Example:
        >>> reward_reply(Rewards([1.0, None], {}))
        {'rewards': [1.0, None], 'scores': [1.0, None], 'extra_logs': {}}
    """
    values = [_finite(reward) for reward in rewards.rewards]
    extra_logs = {name: _finite(value) for name, value in rewards.extra_logs.items()}
    return {"rewards": values, "scores": values, "extra_logs": extra_logs}


def classify_reply(classified: Sequence[Classified], *, model: str) -> dict[str, Any]:
    """Return the body of a reply of the ``/classify`` shape, in the order of the request."""
    num_tokens = sum(text.num_tokens for text in classified)
    data = [
        {
            "index": index,
            "label": text.label,
            "probs": [_finite(value) for value in text.values],
            "num_classes": len(text.values),
        }
        for index, text in enumerate(classified)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}
    return {"object": "list", "model": model, "data": data, "usage": usage}


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(body, parse_constant=_refuse_constant)
    except RefusedError:
        raise
    except (ValueError, RecursionError):  # not JSON, not UTF-8, huge numbers, deep nesting
        _refuse("The body is not JSON. Send an object in UTF-8.")
    if not isinstance(asked, dict):
        _refuse("The body is JSON, but no object. Send {...}.")
    return asked


def _texts(texts: object, *, name: str, limits: Limits) -> list[str]:
    if not isinstance(texts, list) or not texts:
        _refuse(f"`{name}` is no list with texts in it. Send one text or more.")
    if len(texts) > limits.texts:
        message = f"`{name}` has {len(texts)} texts, above the limit of {limits.texts} a request."
        _refuse(f"{message} Send several requests.", status=413)
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not _is_unicode(text):
            _refuse(f"`{name}`[{index}] is no Unicode text. Send texts, not token ids.")
        if len(text) > limits.characters:
            message = f"`{name}`[{index}] has {len(text)} characters, above the limit of"
            _refuse(f"{message} {limits.characters}. Send a shorter text.", status=413)
    return texts


def _is_unicode(text: str) -> bool:
    """Return whether the text has no lone surrogate, which JSON can write and no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _finite(value: Score) -> Score:
    """Return the value, or ``None`` for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def _refuse_constant(_: str) -> NoReturn:
    _refuse("The body holds NaN or Infinity, which JSON does not have. Send null.")


def _refuse(message: str, *, status: int = 400) -> NoReturn:
    raise RefusedError(message, status=status)
