"""What TRL hands to a reward as one completion, and the text in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

Message: TypeAlias = Mapping[str, object]
Completion: TypeAlias = str | Sequence[Message]


def completion_text(completion: Completion) -> str:
    """Return the text that the model replied.

    Args:
        completion: A plain string, or the messages of a conversational completion, where the
            last one is the reply and the earlier ones are tool calls and their results.

    Returns:
        The text of the reply; empty if there is no message or the message holds no text.

    Example:
        >>> completion_text([{"role": "assistant", "content": "It is 7."}])
        'It is 7.'
    """
    if isinstance(completion, str):
        return completion
    return _content_text(completion[-1].get("content")) if completion else ""


def _content_text(content: object) -> str:
    """Return the text of a message's content, which is a string, parts, or ``None``."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    return "".join(_part_text(part) for part in content)


def _part_text(part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) else None
    return text if isinstance(text, str) else ""
