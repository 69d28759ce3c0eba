"""Reading the verdict of a judge: one marked place, or JSON; anything else is unreadable."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from trl_grpo_ext.rewards.api.protocols.reading import (
    array,
    decoded,
    entry,
    text,
    total_tokens,
    unreadable,
    written_number,
)

Scale = Literal["unit", "raw"]

# A finished reply, in the words of OpenAI, vLLM, SGLang, llama.cpp and TGI. "length" is cut off.
_FINISHED = frozenset({"stop", "eos", "eos_token", "stop_sequence"})


def finished_content(body: Any) -> tuple[str, int]:
    """Return the text of the one choice of a chat completion, and the tokens that were counted.

    Thoughts in ``<think>`` at the start of the text are left out.

    Raises:
        UnreadableReplyError: no such reply, or one that was cut off or filtered.
    """
    choice = array(entry(body, "choices"), length=1)[0]
    reason = entry(choice, "finish_reason")
    if not isinstance(reason, str) or reason not in _FINISHED:
        remedy = ": raise `max_tokens`" if reason == "length" else ""
        unreadable(f"the judge did not finish{remedy}")
    return without_thoughts(text(entry(entry(choice, "message"), "content"))), total_tokens(body)


def without_thoughts(content: str) -> str:
    """Return the text after a leading block of thoughts, if there is exactly one such block.

    Example:
        >>> without_thoughts("<think>a 5? no</think>7")
        '7'
    """
    if content.lstrip().startswith("<think>") and content.count("</think>") == 1:
        return content.partition("</think>")[2]
    return content


def marked(content: str, *, mark: str) -> str:
    """Return what stands between the marks of the verdict.

    The same verdict may stand there several times.

    Raises:
        UnreadableReplyError: there is no verdict, several that differ, or one that was not closed.

    Example:
        >>> marked("Correct. <verdict-3f9a>7</verdict-3f9a>", mark="3f9a")
        '7'
    """
    opening, closing = f"<verdict-{mark}>", f"</verdict-{mark}>"
    _, *parts = content.split(opening)
    verdicts = {part.partition(closing)[0].strip() for part in parts}
    if any(part.count(closing) != 1 for part in parts) or content.count(closing) != len(parts):
        unreadable("a verdict is not closed")
    return _only(verdicts)


def matched(content: str, *, pattern: str) -> str:
    """Return what the only group of a pattern holds, the same at every match."""
    return _only({match[1] or "" for match in re.finditer(pattern, content)})


def schema_verdict(content: str, *, key: str) -> Any:
    """Return the value under the key of a JSON object that holds nothing else but reasoning.

    Example:
        >>> schema_verdict('{"reasoning": "It is right.", "score": 7}', key="score")
        7
    """
    verdict = decoded(content)
    value = entry(verdict, key)
    if set(verdict) - {"reasoning", key}:
        unreadable("the verdict holds keys that were not asked for")
    return value


def label_or_number(verdict: str, *, labels: Mapping[str, float] | None) -> float:
    """Return the number of a verdict in words, or the number that it is.

    Example:
        >>> label_or_number("Yes", labels={"yes": 1.0, "no": 0.0})
        1.0
    """
    if labels is None:
        return written_number(verdict)
    scores = {label.casefold(): score for label, score in labels.items()}
    if verdict.strip().casefold() not in scores:
        unreadable(f"{verdict.strip()[:40]!r} is none of the labels")
    return float(scores[verdict.strip().casefold()])


def scaled(score: float, *, between: tuple[float, float], scale: Scale) -> float:
    """Return the score as it is, or as its place in its range: 0 for the lowest, 1 for the highest.

    Raises:
        UnreadableReplyError: the score is out of range.

    Example:
        >>> scaled(7, between=(0, 10), scale="unit")
        0.7
    """
    low, high = between
    if not low <= score <= high:
        unreadable(f"{score} is not from {low} to {high}")
    return (score - low) / (high - low) if scale == "unit" else score


def _only(verdicts: set[str]) -> str:
    if len(verdicts) != 1:
        unreadable(f"there are {len(verdicts)} verdicts instead of one")
    return verdicts.pop()
