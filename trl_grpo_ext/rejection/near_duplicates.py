"""Replies to one prompt that say the same in almost the same words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

Shingles = frozenset[tuple[str, ...]]

# Scripts without spaces between words: each character is one.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    r"\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"  # kana, Han
)
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+|[^\w\s.,;:!?\"'`*]")


def words(text: str) -> list[str]:
    """Return what a text says, whatever its case, white space, punctuation and emphasis.

    Operators and brackets are words of their own, so that spaces around them do not count.

    Args:
        text: Untrusted text of any length; the time is linear in it.

    Example:
        >>> words("So **2+3 = 5**.") == words("so 2 + 3 = 5")
        True
        >>> words("so 2 - 3 = 5")
        ['so', '2', '-', '3', '=', '5']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def shingles(text: str, *, ngram_size: int) -> Shingles:
    """Return the distinct word n-grams of a text; all its words as one if they are fewer.

    Args:
        text: Untrusted text.
        ngram_size: Words an n-gram, at least 1.

    Example:
        >>> sorted(shingles("a b a b", ngram_size=2))
        [('a', 'b'), ('b', 'a')]
        >>> shingles("a b", ngram_size=5)
        frozenset({('a', 'b')})
    """
    found = words(text)
    last = max(len(found) - ngram_size, 0)
    return frozenset(tuple(found[at : at + ngram_size]) for at in range(last + 1))


def similarity(left: Shingles, right: Shingles) -> float:
    """Return the Jaccard index ``|A & B| / |A | B|`` of two sets that are not empty.

    References:
        Broder, "On the resemblance and containment of documents", 1997. As a filter of training
        data: Lee et al., section 4.2, arXiv:2107.06499.

    Example:
        >>> abc, abd = (shingles(text, ngram_size=1) for text in ("a b c", "a b d"))
        >>> similarity(abc, abd)
        0.5
    """
    common = len(left & right)
    return common / (len(left) + len(right) - common)


def distinct(
    texts: Sequence[str], *, ngram_size: int = 5, max_similarity: float = 0.8
) -> list[int]:
    """Return the places of texts that are no near-duplicate of one kept before.

    Args:
        texts: The ones to prefer first.
        ngram_size: Words an n-gram, at least 1.
        max_similarity: From which Jaccard index on a text falls, above 0; above 1 none does.

    Returns:
        Places in ascending order; the first text is always kept. No two that are kept are as
        similar as that.

    Example:
        >>> distinct(["2 + 3 = 5", "2+3=5.", "3 + 2 = 5"])
        [0, 2]
    """
    kept: dict[int, Shingles] = {}
    for at, text in enumerate(texts):
        own = shingles(text, ngram_size=ngram_size)
        if all(similarity(own, other) < max_similarity for other in kept.values()):
            kept[at] = own
    return list(kept)
