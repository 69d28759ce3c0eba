"""Units of measure: which are the same, and how many of one make another."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

# name of the dimension: {how many of the base unit: the ways to write it}
_TABLE: dict[str, dict[str, str]] = {
    "length": {
        "1": "m meter metre",
        "1000": "km kilometer kilometre",
        "1/100": "cm centimeter centimetre",
        "1/1000": "mm millimeter millimetre",
        "254/10000": "inch inches",
        "3048/10000": "ft foot feet",
        "9144/10000": "yd yard",
        "1609344/1000": "mi mile",
    },
    "mass": {"1": "kg kilogram", "1/1000": "g gram", "1/1000000": "mg milligram"},
    "time": {
        "1": "s sec second",
        "60": "min minute",
        "3600": "h hr hour",
        "86400": "day",
        "604800": "week",
    },
    "month": {"1": "month", "12": "yr year"},
    "volume": {"1": "l liter litre", "1/1000": "ml milliliter millilitre"},
    "gallon": {"1": "gal gallon"},
    "pound": {"1": "lb pound", "1/16": "oz ounce"},
    "dollar": {"1": "$ dollar usd", "1/100": "¢ cent"},
    "euro": {"1": "€ euro eur"},
    "sterling": {"1": "£ gbp"},
    "yen": {"1": "¥ yen jpy"},
    "angle": {"1": "° degree deg"},
    "percent": {"1": "% percent pct"},
    "length unit": {"1": "unit"},
}

# Words that change what the number before them means, or take it back.
_CHANGING_WORDS = (
    "or and not nor either neither maybe perhaps possibly otherwise alternatively but versus vs "
    "if unless wrong incorrect false is was isn are be to than times plus minus over divided by "
    "squared cubed factorial choose mod modulo remainder dozen gross score pair point percentage "
    "permille half third quarter fourth fifth sixth seventh eighth ninth tenth twelfth twentieth "
    "hundredth thousandth millionth halve halved doubled tripled twice thrice ish "
    "no rather instead until through add added subtract subtracted with incorrectly mistaken "
    "mistake too aka slash alternately oder ou "
    "sin cos tan sec csc cot log exp sqrt pi infinity inf nan"
)
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "hundred thousand million billion trillion"
)

_CHANGING = frozenset(f"{_CHANGING_WORDS} {_NUMBER_WORDS}".split())
# What is counted, and behind a preposition where or when: "red clips", "clips in early May".
_WORDS = re.compile(
    r"[^\W\d_]+(?:[ '-][^\W\d_]+)?(?: (?:in|of|on|at|per|for|from|left)(?: [^\W\d_]+){0,3})?"
)
_POWER = re.compile(
    r"(?P<base>\D+?)\s*(?:\^\s*\{?\s*(?P<power>[23])\s*\}?|(?P<word>squared|cubed))"
)
_PREFIX = re.compile(r"(?P<word>square|sq\.?|cubic|cu\.?)\s+(?P<base>.+)")
_POWERS = {"squared": 2, "square": 2, "sq": 2, "sq.": 2, "cubed": 3, "cubic": 3, "cu": 3, "cu.": 3}


@dataclass(frozen=True)
class Unit:
    """What a number counts.

    Attributes:
        dimension: Units of one dimension can be converted; for a counted thing, its name.
        factor: How many of the base unit of the dimension make one.
        is_letter: Written as a single letter, which may be a variable instead.
    """

    dimension: str
    factor: Fraction = Fraction(1)
    is_letter: bool = False

    def times(self, other: Unit, *, power: int) -> Unit:
        """Return the product of this unit and a power of another one."""
        dimension = f"{self.dimension} {other.dimension}^{power}"
        return Unit(dimension, self.factor * other.factor**power)


def _known_units() -> dict[str, Unit]:
    known = {}
    for dimension, rows in _TABLE.items():
        for factor, names in rows.items():
            for name in names.split():
                known[name] = Unit(dimension, Fraction(factor), len(name) == 1 and name.isalpha())
                if len(name) > 2:
                    known.setdefault(name + "s", known[name])
    return known


_KNOWN = _known_units()
PERCENT = _KNOWN["%"]


@lru_cache(maxsize=4096)
def read_unit(phrase: str) -> Unit | None:
    """Return the unit that stands behind a number; ``None`` if the phrase is none.

    Words that are no known unit are taken for the things counted ("clips"), unless one of them
    changes the number ("72 thousand", "72 or more").

    Example:
        >>> read_unit("cm^2") == read_unit("square centimetres")
        True
        >>> read_unit("or 73") is None
        True
    """
    text = phrase.strip().rstrip(".").strip()
    return measure(text) or _counted(text.casefold())


def measure(text: str) -> Unit | None:
    """Return the unit of measure of that name, also as a power or a quotient, or ``None``."""
    parts = re.split(r"\s*/\s*|\s+per\s+|\s+an?\s+", text.casefold())
    units = [_power(part) for part in parts]
    first, *rest = units
    if first is None or len(rest) > 1:
        return None
    for unit in rest:
        if unit is None:
            return None
        first = first.times(unit, power=-1)
    return first


def _power(text: str) -> Unit | None:
    if text == "mph":
        return measure("mile/hour")
    if text in _KNOWN:
        return _KNOWN[text]
    match = _POWER.fullmatch(text) or _PREFIX.fullmatch(text)
    base = _KNOWN.get(match["base"].strip()) if match else None
    if match is None or base is None:
        return None
    power = int(match.groupdict().get("power") or _POWERS[match["word"]])
    return Unit(f"{base.dimension}^{power}", base.factor**power)


def changes_meaning(text: str) -> bool:
    """Return whether a word of the text hedges, negates, or changes the number beside it."""
    words = re.split(r"[^\w]+", text.casefold())
    return not _CHANGING.isdisjoint([*words, *(word.removesuffix("s") for word in words)])


def _counted(text: str) -> Unit | None:
    words = re.split(r"[ '-]", text)
    if not _WORDS.fullmatch(text) or changes_meaning(text):
        return None
    if max(map(len, words)) < 3 or any(len(word) == 1 and word != "a" for word in words):
        return None
    return Unit(f"counted {text.removesuffix('s')}")
