"""The reward for replies that keep to one script, against mixed languages."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.base import TextReward

# A script by the word with which Unicode's names of its letters begin.
SCRIPTS: Mapping[str, str] = {
    **{name.upper(): name for name in ("Arabic", "Armenian", "Bengali", "Cyrillic", "Devanagari")},
    **{name.upper(): name for name in ("Ethiopic", "Georgian", "Greek", "Gujarati", "Gurmukhi")},
    **{name.upper(): name for name in ("Hangul", "Hebrew", "Hiragana", "Kannada", "Katakana")},
    **{name.upper(): name for name in ("Khmer", "Lao", "Latin", "Malayalam", "Mongolian")},
    **{name.upper(): name for name in ("Myanmar", "Oriya", "Sinhala", "Syriac", "Tamil")},
    **{name.upper(): name for name in ("Telugu", "Thaana", "Thai", "Tibetan")},
    "CJK": "Han",
}
OTHER = "other"
# Written without spaces, so that each letter counts as a word.
UNSPACED = frozenset({"Han", "Hiragana", "Katakana", "Khmer", "Lao", "Myanmar", "Thai", "Tibetan"})
# Whose words of one letter may be variables.
OF_VARIABLES = frozenset({"Greek", "Latin"})

_CLOSING = {"```": "```", "$$": "$$", "$": "$", r"\[": r"\]", r"\(": r"\)"}
_DELIMITER = re.compile(r"(```|\$\$|\$|\\[\[\]()])")
_MARKUP = re.compile(r"\\[A-Za-z]+|</?[A-Za-z_]+>")
_ASCII_LETTERS = re.compile("[A-Za-z]+")


def script_counts(text: str) -> Counter[str]:
    r"""Return how many words of each script are in a text.

    A word is a run of letters of one script; where a script is written without spaces, each letter
    is one. What does not count: single Latin and Greek letters, which may be variables; tags; the
    names of LaTeX commands; ASCII letters in formulas and fenced code. Letters of another script
    count there too, so that nothing can hide in a formula.

    Args:
        text: Untrusted text of any length; the time is linear in it.

    Returns:
        Counts by the names of :data:`SCRIPTS`, and ``"other"`` for the letters of all else.

    Example:
        >>> sorted(script_counts(r"<think>Let $\alpha_{ij} = 2$, 所以 x is 3.</think>").items())
        [('Han', 2), ('Latin', 2)]
    """
    counts: Counter[str] = Counter()
    for script, num_letters in _runs(_prose(text)):
        if script in UNSPACED:
            counts[script] += num_letters
        elif num_letters > 1 or script not in OF_VARIABLES:
            counts[script] += 1
    return counts


class LanguageReward(TextReward):
    """Return for each reply the share of its words that are in the wanted scripts, 0.0 to 1.0.

    This stands against the mixing of languages that DeepSeek-R1-Zero showed, such as Chinese in the
    middle of an English thought; DeepSeek's reward for it is the share of words in the wanted
    language. A script is not a language: English and French are both Latin, and a reply in the
    wrong one of them scores 1. What a word is, :func:`script_counts` says.

    A reply without any word, such as a number, mixes nothing: 1.0.

    Args:
        scripts: The wanted ones, such as ``["Latin"]``, or ``["Han", "Hiragana", "Katakana"]`` for
            Japanese; names of :data:`SCRIPTS`.
        log_as: The name under which the trainer logs this reward.

    Raises:
        ConfigurationError: There is no script of a given name, or none is given.

    References:
        DeepSeek-R1, section 2.3.2, arXiv:2501.12948.

    Example:
        >>> reward = LanguageReward(scripts=["Latin"])
        >>> reward(completions=["The answer is 7.", "So the 答案 is 7.", "7"])
        [1.0, 0.6, 1.0]
    """

    def __init__(self, *, scripts: Sequence[str], log_as: str = "language") -> None:
        wanted = [scripts] if isinstance(scripts, str) else list(scripts)
        if problems := list(_problems(log_as, wanted)):
            raise ConfigurationError(problems)
        self.scripts = frozenset(wanted)
        self.__name__ = log_as

    def score(self, reply: str) -> float:
        """Return the reward of one reply."""
        counts = script_counts(reply)
        wanted = sum(count for script, count in counts.items() if script in self.scripts)
        return wanted / counts.total() if counts else 1.0


def _prose(text: str) -> str:
    """Return the text without tags, commands, and the ASCII letters of formulas and code."""
    return _MARKUP.sub(" ", "".join(_without_formulas(_DELIMITER.split(text))))


def _without_formulas(pieces: Sequence[str]) -> Iterator[str]:
    r"""Yield the pieces of a text, without the ASCII letters between ``$`` and ``$`` and such.

    Args:
        pieces: Text, delimiter, text, ..., text. What is opened and never closed is text.
    """
    last_at = {piece: at for at, piece in enumerate(pieces) if at % 2}
    closing = ""
    for at, piece in enumerate(pieces):
        if at % 2 == 0:
            yield _ASCII_LETTERS.sub(" ", piece) if closing else piece
        elif closing:
            closing = "" if piece == closing else closing
            yield " "
        elif last_at.get(_CLOSING.get(piece, ""), 0) > at:
            closing = _CLOSING[piece]
            yield " "


def _runs(text: str) -> Iterator[tuple[str, int]]:
    """Yield the script and the number of letters of each run of letters of one script."""
    current, num_letters = "", 0
    for character in text:
        script = _script(character)
        if script == current or script is None:
            num_letters += script is not None
            continue
        if current:
            yield current, num_letters
        current, num_letters = script, 1
    if current:
        yield current, num_letters


@lru_cache(maxsize=65536)
def _script(character: str) -> str | None:
    """Return the script of a letter, ``""`` for no letter, ``None`` for what goes on with a word.

    Letters of special form, as full-width ones, are those that they stand for.
    """
    category = unicodedata.category(character)
    if category[0] == "M" or category == "Lm":  # accents and vowel signs; long marks
        return None
    if category[0] != "L":
        return ""
    plain = unicodedata.normalize("NFKC", character)[0]
    return SCRIPTS.get(unicodedata.name(plain, "").partition(" ")[0], OTHER)


def _problems(name: str, scripts: Sequence[str]) -> Iterator[str]:
    known = sorted(SCRIPTS.values())
    if not scripts:
        yield (
            f"reward '{name}' has no `scripts`, so every reply would score 0. Set `scripts` in the "
            f"`arguments` of this reward to some of {', '.join(known)}."
        )
    for script in scripts:
        if script not in known:
            yield (
                f"reward '{name}' has {script!r} among its `scripts`, which is not known, so its "
                "letters could not be told. Use names of scripts, not of languages, in the "
                f"`arguments` of this reward: {', '.join(known)}."
            )
