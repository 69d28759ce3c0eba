"""One look at a reward service before a run: what is sent, what comes back, what is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.api.body import has_non_finite, read_reply
from trl_grpo_ext.rewards.api.client import RewardClient
from trl_grpo_ext.rewards.api.connection import Exchange
from trl_grpo_ext.rewards.api.retry import RetriableError
from trl_grpo_ext.rewards.api.reward import APIReward
from trl_grpo_ext.rewards.api.scorer import Scorer
from trl_grpo_ext.rewards.api.secret import excerpt
from trl_grpo_ext.rewards.api.wire import Item, UnreadableReplyError, WireProtocol, WireRequest
from trl_grpo_ext.rewards.scores import Score

SAMPLE_PROMPT = "What is 2 + 2?"
SAMPLE_COMPLETIONS = ("2 + 2 is 4.", "I would rather not say.")
MAX_SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class CheckedRequest:
    """One request of a check. Nothing in it is secret.

    Attributes:
        url: That was asked; empty if nothing could be sent.
        headers: That were sent, with the key masked.
        payload: The JSON that was sent.
        completions: That it asked about.
        status: Of HTTP; ``None`` if there was no whole reply.
        reply: The start of the reply as it came, with the key masked.
        scores: One for each of ``completions``; ``None`` where none was read.
        latency_s: Of the reply.
        problem: Why there are no scores; empty if there are.
    """

    url: str
    headers: Mapping[str, str]
    payload: Mapping[str, Any]
    completions: tuple[str, ...]
    status: int | None = None
    reply: str = ""
    scores: Sequence[Score] = ()
    latency_s: float | None = None
    problem: str = ""


def check_reward(
    reward: APIReward,
    *,
    prompt: str | Sequence[Mapping[str, Any]] = SAMPLE_PROMPT,
    completions: Sequence[str] = SAMPLE_COMPLETIONS,
    columns: Mapping[str, Any] | None = None,
) -> list[CheckedRequest]:
    """Return what the service is asked about two sample completions, and what it says.

    Each request is sent once, without cache and retries, and one after the other.

    Args:
        reward: To check.
        prompt: Of the samples, as in the data set.
        completions: Samples, a good and a bad one.
        columns: Of the sample's row, such as ``{"answer": "4"}``.

    Raises:
        RewardError: the protocol cannot make a request, such as without a column.
        ConfigurationError: the protocol has nothing to ask about these samples.
    """
    items = [Item(prompt, completion, dict(columns or {})) for completion in completions]
    requests = reward.protocol.requests(items)
    if not requests:
        raise ConfigurationError(
            [
                f"reward '{reward.__name__}' has nothing to ask about the samples, so the service "
                "cannot be checked. Give the columns of a row that the protocol uses, such as "
                "the reference answer."
            ]
        )
    return [_checked(reward, request, items) for request in requests]


def shown(checked: CheckedRequest, *, name: str) -> str:
    """Return the lines that show a request and its reply to a reader.

    Args:
        checked: What was asked and said.
        name: Of the reward.

    Example:
        >>> lost = CheckedRequest(
        ...     url="", headers={}, payload={"text": "4"}, completions=("4",), problem="no reply"
        ... )
        >>> print(shown(lost, name="judge"))
        reward judge
          asked: nothing could be sent
          headers: {}
          sent: {
          "text": "4"
        }
          reply: none
          latency: unknown
          problem: no reply
    """
    latency = "unknown" if checked.latency_s is None else f"{checked.latency_s:.2f} s"
    lines = {
        "asked": checked.url or "nothing could be sent",
        "headers": json.dumps(dict(checked.headers), ensure_ascii=False),
        "sent": json.dumps(checked.payload, indent=2, ensure_ascii=False),
        "reply": f"HTTP {checked.status}: {checked.reply}" if checked.status else "none",
        "latency": latency,
        "problem": checked.problem or "none",
    }
    scores = zip(checked.completions, checked.scores, strict=False)  # there may be no scores
    return "\n".join(
        [
            f"reward {name}",
            *(f"  {label}: {text}" for label, text in lines.items()),
            *(f"  score {score} for {completion!r}" for completion, score in scores),
        ]
    )


def _checked(reward: APIReward, request: WireRequest, items: Sequence[Item]) -> CheckedRequest:
    async def ask(scorer: Scorer) -> CheckedRequest:
        return await _ask(scorer.client, reward.protocol, request, items)

    return reward.session().wait(ask)


async def _ask(
    client: RewardClient, protocol: WireProtocol, request: WireRequest, items: Sequence[Item]
) -> CheckedRequest:
    sent: dict[str, Any] = {
        "headers": client.shown_headers(),
        "payload": request.payload,
        "completions": tuple(items[index].completion for index in request.indices),
    }
    try:
        exchange = await client.exchange(request)
    except RetriableError as error:
        return CheckedRequest(url="", problem=f"no reply: {client.shown(error.reason)}", **sent)
    scores, problem = _read(client, protocol, request, exchange)
    return CheckedRequest(
        url=exchange.url,
        status=exchange.status,
        reply=client.shown(exchange.body.decode("utf-8", "replace"))[:MAX_SHOWN_CHARACTERS],
        scores=scores,
        latency_s=exchange.latency_s,
        problem=problem,
        **sent,
    )


def _read(
    client: RewardClient, protocol: WireProtocol, request: WireRequest, exchange: Exchange
) -> tuple[Sequence[Score], str]:
    """Return the scores, and why there are none."""
    if not 200 <= exchange.status <= 299:
        return (), str(client.refusal(exchange))
    try:
        scores = read_reply(protocol, request, exchange.body).scores
    except UnreadableReplyError as error:
        return (), excerpt(client.shown(str(error)), key=None)
    if has_non_finite(scores):
        return (), "the reply has a score of NaN or infinity"
    return scores, "" if any(score is not None for score in scores) else "the service gave no score"
