"""The one answer in a sentence, if there is exactly one."""

from __future__ import annotations

import re
from itertools import pairwise

from trl_grpo_ext.rewards.math.answers import Answer
from trl_grpo_ext.rewards.math.parse import read_answer
from trl_grpo_ext.rewards.math.units import measure

MAX_CHARACTERS = 500

# With one of these a sentence does not commit itself to the number in it.
_UNCERTAIN = re.compile(
    r"\b(?:or|either|neither|maybe|perhaps|possibly|probably|might|could|not|never|wrong|incorrect|"
    r"unless|alternatively|otherwise|guess|unsure|between|(?:more|less|fewer|greater|other) than|"
    r"at (?:least|most)|minus|negative|twice|half|double|triple|thousand|million|billion|dozens?|"
    r"hundreds?|squared|cubed|except|instead|if|too|false|falsely|doubt\w*|nobody|refuse|reject|"
    r"ignore|rule out|lie|mistaken?|give up)\b|n't\b",
    re.IGNORECASE,
)
# With one of these before it, a number is not the answer itself.
_CHANGED = re.compile(
    r"\b(?:above|over|below|under|beyond|almost|nearly|among|times|plus|less|without|step|up to|"
    r"far from|(?:root|square|cube|sum|product|one|some|half|each) of)\s+[$€£¥]?[-+]?\.?\d",
    re.IGNORECASE,
)
_MATHEMATICS = re.compile(
    r"\$(?!\s)([^$\n]+)(?<!\s)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_BETWEEN = re.compile(r"\s*,?\s*(?:and)?\s*")
_EDGES = ".,;:!?*_`\"'"


def is_uncertain(text: str) -> bool:
    """Return whether the text hedges, negates or changes the number that it names."""
    return bool(_UNCERTAIN.search(text) or _CHANGED.search(text))


def read_prose(sentence: str) -> Answer | None:
    """Return the answer that a sentence gives; ``None`` if it gives none, or several.

    Read is what follows the last equals sign, else the only mathematics between dollar signs, else
    the only number.

    Example:
        >>> read_prose("So she sold 48 + 24 = 72 clips in all").value
        Fraction(72, 1)
        >>> read_prose("She sold 48 in April and 24 in May") is None
        True
    """
    if len(sentence) > MAX_CHARACTERS or is_uncertain(sentence):
        return None
    if spans := list(_MATHEMATICS.finditer(sentence)):
        return _read_spans(sentence, spans)
    first, *rest = sentence.split("=")
    if any(re.search("[A-Za-z]", part) for part in rest[:-1]):
        return None
    return _only_number(rest[-1] if rest else first)


def _read_spans(sentence: str, spans: list[re.Match[str]]) -> Answer | None:
    """Read mathematics between signs, one piece or a list of them."""
    outside = _MATHEMATICS.sub("", sentence)
    gaps = [sentence[a.end() : b.start()] for a, b in pairwise(spans)]
    if re.search(r"[\d=]", outside) or not all(_BETWEEN.fullmatch(gap) for gap in gaps):
        return None
    answers = [read_answer(sentence[spans[0].start() : spans[-1].end()])]
    after = sentence[spans[-1].end() :].split()
    if after and len(spans) == 1 and measure(after[0].strip(_EDGES)):
        answers.insert(0, read_answer(f"{spans[0][0]} {after[0].strip(_EDGES)}"))
    return next((answer for answer in answers if answer is not None), None)


def _only_number(text: str) -> Answer | None:
    """Read the numbers of a text if they stand together, with the unit that follows."""
    words = [word.strip(_EDGES[2:]) for word in text.split()]
    places = [place for place, word in enumerate(words) if any(map(str.isdigit, word))]
    if not places:
        return None
    first, last = places[0], places[-1]
    if any(words[place] != "and" for place in range(first, last + 1) if place not in places):
        return None
    unit = words[last + 1].strip(_EDGES) if last + 1 < len(words) else ""
    numbers = " ".join(words[first : last + 1])
    is_counted = last + 2 == len(words)  # "60 girls" ends the sentence
    found = read_answer(f"{numbers} {unit}") if measure(unit) or is_counted else None
    return found or read_answer(numbers)
