"""The reward for replies that keep to an asked format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.base import TextReward

# The tags of each structure, in their order.
STRUCTURES: Mapping[str, tuple[str, ...]] = {
    "think_answer": ("think", "answer"),
    "answer": ("answer",),
}
_TAG_NAME = re.compile(r"[A-Za-z_][\w.:|-]*")


class FormatReward(TextReward):
    r"""Return 1.0 for each reply that has the asked format, else 0.0.

    The format is a regular expression or a structure of tags; one of them is given. White space
    around the reply is ignored. The pattern is Python's and must match as a whole; ``(?s)`` at its
    start lets a dot match line breaks too. What a structure asks for, :func:`structure_score` says.

    Args:
        pattern: The regular expression.
        structure: A name in :data:`STRUCTURES`: ``"think_answer"`` is
            ``<think>...</think><answer>...</answer>``, ``"answer"`` is ``<answer>...</answer>``.
        tags: Other names for the tags of the structure, as many, such as
            ``["reasoning", "solution"]``.
        partial_credit: Whether a reply earns a share for each part of a structure that it keeps to.
        starts_in_thought: Whether the chat template opens the first tag at the end of the prompt,
            so that the reply begins inside it.
        max_characters: Longer replies are 0.0 without a look at the pattern, as one with
            repetitions next to or inside each other takes time that grows with a power of the
            length, or worse. A structure is read in linear time.
        log_as: The name under which the trainer logs this reward.

    Raises:
        ConfigurationError: Neither or both of pattern and structure are given, or one that cannot
            work, or ``max_characters`` is below 1.

    Example:
        >>> reward = FormatReward(pattern=r"The answer is -?\d+\.")
        >>> reward(completions=["The answer is 7.", "7"])
        [1.0, 0.0]
        >>> reward = FormatReward(structure="think_answer")
        >>> reward(completions=["<think>3 + 4</think> <answer>7</answer>", "<answer>7</answer>"])
        [1.0, 0.0]
    """

    def __init__(
        self,
        *,
        pattern: str | None = None,
        structure: str | None = None,
        tags: Sequence[str] | None = None,
        partial_credit: bool = False,
        starts_in_thought: bool = False,
        max_characters: int = 50_000,
        log_as: str = "format",
    ) -> None:
        if problems := list(_problems(log_as, pattern, structure, tags, max_characters)):
            raise ConfigurationError(problems)
        self.pattern = None if pattern is None else _compiled(pattern, name=log_as)
        self.tags = tuple(tags or (STRUCTURES[structure] if structure else ()))
        self.partial_credit, self.starts_in_thought = partial_credit, starts_in_thought
        self.max_characters = max_characters
        self.__name__ = log_as

    def score(self, reply: str) -> float:
        """Return the reward of one reply."""
        if self.pattern is not None:
            text = reply.strip()
            matches = len(text) <= self.max_characters and self.pattern.fullmatch(text)
            return 1.0 if matches else 0.0
        text = f"<{self.tags[0]}>{reply}" if self.starts_in_thought else reply
        score = structure_score(text, tags=self.tags)
        return score if self.partial_credit else float(score == 1.0)


def structure_score(text: str, *, tags: Sequence[str]) -> float:
    """Return the share of a structure that a text keeps to; 1.0 if it is exactly the structure.

    Each of these is a part, and all count the same:

    - for each tag: it opens once, then closes once, and what stands between them is not blank;
    - if all do: the tags stand in their order, each closed before the next one opens;
    - if so: nothing but white space is outside of them.

    Args:
        text: Untrusted text of any length; the time is linear in it.
        tags: Their names, at least one, in the order that is asked for.

    Example:
        >>> structure_score("<think>3 + 4</think> <answer>7</answer>", tags=["think", "answer"])
        1.0
        >>> structure_score("<think>3 + 4</think> <answer>7", tags=["think", "answer"])
        0.25
        >>> structure_score("<answer>7</answer><think>hm</think>", tags=["think", "answer"])
        0.5
    """
    spans = {name: span for name in tags if (span := _only_block(text, name))}
    num_kept = len(spans)
    if num_kept == len(tags):
        edges = [edge for name in tags for edge in spans[name]]
        if edges == sorted(edges):
            gaps = zip([0, *edges[1::2]], [*edges[::2], len(text)], strict=True)
            num_kept += 1 if any(text[start:end].strip() for start, end in gaps) else 2
    return num_kept / (len(tags) + 2)


def _only_block(text: str, name: str) -> tuple[int, int] | None:
    """Return where ``<name>`` begins and ``</name>`` ends if both are there once and hold text."""
    opening, closing = f"<{name}>", f"</{name}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening), text.index(closing)
    inside = text[start + len(opening) : end] if start < end else ""
    return (start, end + len(closing)) if inside.strip() else None


def _problems(
    name: str,
    pattern: str | None,
    structure: str | None,
    tags: Sequence[str] | None,
    max_characters: int,
) -> Iterator[str]:
    if (pattern is None) == (structure is None):
        yield _not_one_format(name, "neither" if pattern is None else "both")
    if structure is not None and structure not in STRUCTURES:
        yield _unknown_structure(name, structure)
    elif tags is not None:
        yield from _tag_problems(name, structure, tags)
    if max_characters < 1:
        yield _too_few_characters(name, max_characters)


def _tag_problems(name: str, structure: str | None, tags: Sequence[str]) -> Iterator[str]:
    if structure is None:
        yield (
            f"reward '{name}' has `tags` without a `structure`, so they would have no effect. Set "
            f"`structure` in the `arguments` of this reward to one of {', '.join(STRUCTURES)}."
        )
        return
    distinct = {tag for tag in tags if isinstance(tag, str) and _TAG_NAME.fullmatch(tag)}
    wanted = STRUCTURES[structure]
    if isinstance(tags, str) or not len(distinct) == len(tags) == len(wanted):
        yield (
            f"reward '{name}' has `tags`={tags!r}, which are not {len(wanted)} different names of "
            f"tags, so the structure '{structure}' cannot be found. Give a list of names without "
            f"brackets, such as {list(wanted)}."
        )


def _compiled(pattern: str, *, name: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, TypeError) as error:
        raise ConfigurationError(
            [
                f"reward '{name}' has `pattern`={pattern!r}, which is not a regular expression "
                f"({error}), so no reply can be checked. Correct `pattern` in the `arguments` of "
                "this reward; a literal bracket or dot needs a backslash."
            ]
        ) from error


def _not_one_format(name: str, given: str) -> str:
    return (
        f"reward '{name}' has {given} of `pattern` and `structure`, so it is open which format to "
        "ask for. Set one of them in the `arguments` of this reward."
    )


def _unknown_structure(name: str, structure: str) -> str:
    return (
        f"reward '{name}' has `structure`={structure!r}, which is not known, so no reply can be "
        f"checked. Set it to one of {', '.join(STRUCTURES)}, or give a `pattern` instead."
    )


def _too_few_characters(name: str, max_characters: int) -> str:
    return (
        f"reward '{name}' has `max_characters`={max_characters}, so every reply would be too long "
        "and score 0. Set `max_characters` in the `arguments` of this reward to at least 1."
    )
