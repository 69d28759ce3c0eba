"""Where the steps of a completion end among its tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character decode to


def step_tokens(
    decode: Callable[[list[int]], str], ids: Sequence[int], *, text: str, ends: Sequence[int]
) -> list[int] | None:
    r"""Return the last token of each step.

    The last step also has what follows the text, such as the EOS token. A token that holds the end
    of one step and the whole next one counts as the end of the later one, and the earlier step ends
    before it; there must be a token a step for that.

    Args:
        decode: From tokens to text; called with parts of ``ids``.
        ids: Tokens of the completion, at least one.
        text: Of the completion: the last that the decoded tokens say, but for what follows it.
        ends: Where each step ends in the text, in characters, increasing.

    Returns:
        Increasing indices of tokens, one a step. ``None`` if the text is not what the tokens say,
        as of a chat template that parses a reply into parts, or if there are more steps than
        tokens.

    Example:
        >>> def decode(ids):
        ...     return "".join(["One.", "\n\n", "Two", ".", ""][i] for i in ids)
        >>> step_tokens(decode, [0, 1, 2, 3, 4], text="One.\n\nTwo.", ends=[6, 10])
        [1, 4]
    """
    start = decode(list(ids)).rfind(text)
    if start < 0 or len(ends) > len(ids):
        return None
    tokens, anchor, before = [], 0, 0  # a token to decode from, and the characters before it
    for end in ends[:-1]:

        def length(num: int, anchor: int = anchor, before: int = before) -> int:
            return before + len(decode(list(ids[anchor:num])).rstrip(_UNFINISHED))

        num = _first_at_least(start + end, length, low=anchor + 1, high=len(ids))
        before = length(num) - len(decode([ids[num - 1]]))
        anchor = num - 1
        tokens.append(anchor)
    return _apart([*tokens, len(ids) - 1])


def _first_at_least(wanted: int, length: Callable[[int], int], *, low: int, high: int) -> int:
    """Return the least number of tokens with that length, looking near ``low`` first."""
    width = 1
    while low + width < high and length(low + width) < wanted:
        width *= 2
    top = min(low + width, high)
    return min(bisect_left(range(top + 1), wanted, lo=low, hi=top, key=length), high)


def _apart(tokens: list[int]) -> list[int]:
    """Return the tokens, each before the next and none below 0."""
    for at in range(len(tokens) - 2, -1, -1):
        tokens[at] = min(tokens[at], tokens[at + 1] - 1)
    for at in range(len(tokens)):
        tokens[at] = max(tokens[at], at)
    return tokens
