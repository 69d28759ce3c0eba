"""Numbers as people write them, read exactly."""

from __future__ import annotations

import re
from fractions import Fraction

from trl_grpo_ext.rewards.math.answers import Number
from trl_grpo_ext.rewards.math.units import Unit, measure, read_unit

MAX_EXPONENT = 999

_CURRENCY = {"$": "dollar", "€": "euro", "£": "gbp", "¥": "yen"}
_WHOLE = r"(?: \d{1,3} (?: ,\d{3} )+ | \d{1,3} (?: \ \d{3} )+ | \d+ ) (?!\d)"
_DECIMAL = rf"(?: {_WHOLE} (?: \.\d+ )? (?!\.?\d) | \.\d+ )"

# Each alternative starts with what no other one matches as a whole, so nothing is read twice.
_NUMBER = re.compile(
    rf"""
    (?: (?:\\approx|approximately|about) \s* )?
    (?P<sign> [-+] \s? )?
    (?P<currency> [$€£¥] \s? )?
    (?P<sign2> (?<![-+]) - )?
    (?:
        (?P<mixed> \d+ \s* )? \\frac \s* \{{ \s* (?P<sign3> -? ) \s* (?P<top> {_DECIMAL} ) \s* \}}
            \s* \{{ \s* (?P<bottom> {_DECIMAL} ) \s* \}}
      | (?: (?P<mixed2> \d+ ) (?: \s+ | \s* and \s+ | - ) )?
            (?P<top2> \d+ ) \s* / \s* (?P<bottom2> \d+ ) (?! [\d.,] )
      | (?P<fixed> \d* \. \d* ) \\overline \s* \{{ (?P<cycle> \d+ ) \}}
      | (?P<decimal> {_DECIMAL} )
            (?: \s* (?: \\times | \\cdot | \* | x ) \s* 10 \s* \^ \s* (?P<brace> \{{ )? \s*
                    (?P<power> [-+]? \d+ ) \s* (?(brace) \}} )
              | [eE] (?P<exponent> [-+]? \d+ ) )?
    )
    """,
    re.VERBOSE,
)


def read_number(text: str) -> Number | None:
    r"""Return the number, with its unit, that the cleaned text is as a whole, or ``None``.

    Read are thousands separators, decimals, fractions, mixed numbers, repeating decimals, powers
    of ten, currency signs, percent and units. Anything left to compute is no number.

    Example:
        >>> read_number(r"1\frac{1}{2} km").value
        Fraction(3, 2)
        >>> read_number("70 + 2") is None
        True
    """
    match = _NUMBER.match(text)
    value = _value(match) if match else None
    if match is None or value is None:
        return None
    rest = text[match.end() :].strip()
    prefix = match["currency"]
    if prefix and rest in ("", _CURRENCY[prefix.strip()], _CURRENCY[prefix.strip()] + "s"):
        return Number(value, measure(_CURRENCY[prefix.strip()]))
    if not rest:
        return Number(value)
    unit = None if prefix else _unit_behind(text[match.end() :])
    return Number(value, unit) if unit else None


def _unit_behind(rest: str) -> Unit | None:
    unit = read_unit(rest.strip().removeprefix("-"))
    if unit and unit.is_letter and not rest.startswith(" "):
        return None  # "5m" is a product
    return unit


def _value(match: re.Match[str]) -> Fraction | None:
    magnitude = _magnitude(match)
    signs = (match["sign"] or "") + (match["sign2"] or "") + (match["sign3"] or "")
    return magnitude if magnitude is None or signs.count("-") % 2 == 0 else -magnitude


def _magnitude(match: re.Match[str]) -> Fraction | None:
    if match["cycle"]:
        return _repeating(match["fixed"], match["cycle"])
    if top := match["top"] or match["top2"]:
        bottom = _plain(match["bottom"] or match["bottom2"])
        whole = match["mixed"] or match["mixed2"]
        if bottom == 0 or (whole and match["sign3"]):
            return None
        return _plain(whole or "0") + _plain(top) / bottom
    power = int(match["power"] or match["exponent"] or "0")
    return _plain(match["decimal"]) * Fraction(10) ** power if abs(power) <= MAX_EXPONENT else None


def _plain(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", ""))


def _repeating(fixed: str, cycle: str) -> Fraction | None:
    whole, _, digits = fixed.partition(".")
    ending = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(digits))
    return Fraction(f"{whole or 0}.{digits or 0}") + ending
