"""Rendering an item for a service: as messages, or as one text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.api.wire import Item
from trl_grpo_ext.rewards.completion import completion_text

# How a message of a conversation is written in a text, unless an option says otherwise.
TURN = "{role}: {content}\n"


def prompt_messages(prompt: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the prompt as messages: passed on as they are, or a text as one of the user.

    Keys whose value is ``None`` are left out: data sets add them where only some messages have
    such a key.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [{key: value for key, value in m.items() if value is not None} for m in prompt]


def messages(item: Item) -> list[dict[str, Any]]:
    """Return the prompt and the completion as messages.

    A completion continues a conversation that ends with the assistant's text, as TRL generates it.

    Example:
        >>> messages(Item(prompt="2 + 2?", completion="4"))
        [{'role': 'user', 'content': '2 + 2?'}, {'role': 'assistant', 'content': '4'}]
    """
    before = prompt_messages(item.prompt)
    if before and before[-1].get("role") == "assistant":
        start = completion_text([before.pop()])
        return [*before, {"role": "assistant", "content": start + item.completion}]
    return [*before, {"role": "assistant", "content": item.completion}]


def joined(item: Item, *, turn: str = TURN) -> str:
    r"""Return prompt and completion as one text.

    Args:
        item: With a text as its prompt they are concatenated, and ``turn`` is not used.
        turn: How each message of a conversation is written, with ``{role}`` and ``{content}``.

    Example:
        >>> joined(Item(prompt="2 + 2 = ", completion="4"))
        '2 + 2 = 4'
        >>> joined(Item(prompt=[{"role": "user", "content": "2 + 2?"}], completion="4"))
        'user: 2 + 2?\nassistant: 4\n'
    """
    if isinstance(item.prompt, str):
        return item.prompt + item.completion
    return _written(messages(item), turn)


def prompt_text(prompt: str | Sequence[Mapping[str, Any]], *, turn: str = TURN) -> str:
    """Return the prompt as one text; a conversation is written as :func:`joined` does."""
    return prompt if isinstance(prompt, str) else _written(prompt_messages(prompt), turn)


def batches(indices: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """Yield the indices in runs of ``size``, the last one shorter.

    Example:
        >>> list(batches([4, 5, 6], 2))
        [(4, 5), (6,)]
    """
    for start in range(0, len(indices), size):
        yield tuple(indices[start : start + size])


def cell(item: Item, name: str, *, protocol: str, option: str) -> Any:
    """Return the value of a column of the item's row, ``None`` if the row has none in it.

    Raises:
        RewardError: the data set has no such column.
    """
    if name not in item.columns:
        raise RewardError(
            f"protocol '{protocol}' got no column '{name}' (columns: "
            f"{', '.join(sorted(item.columns))}), so no completion can be scored. Set `{option}` "
            "to a column of the data set."
        )
    return item.columns[name]


def filled(template: str, values: Mapping[str, str]) -> str:
    """Return the template with each ``{name}`` that is in the values replaced, in one pass.

    Example:
        >>> filled("{role}: {content} {other}", {"role": "user", "content": "{role}"})
        'user: {role} {other}'
    """
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def _written(conversation: Sequence[Mapping[str, Any]], turn: str) -> str:
    return "".join(
        filled(turn, {"role": str(message.get("role", "")), "content": completion_text([message])})
        for message in conversation
    )
