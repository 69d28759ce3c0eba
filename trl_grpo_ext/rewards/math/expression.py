r"""Expressions, equations and inequalities: what is handed to computer algebra, and what is not."""

from __future__ import annotations

import re
from fractions import Fraction

from trl_grpo_ext.rewards.math.answers import Expression
from trl_grpo_ext.rewards.math.brackets import is_balanced
from trl_grpo_ext.rewards.math.units import Unit, measure, read_unit

MAX_CHARACTERS = 300

_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi "
    "Omega"
)
# What an answer may be written with; what is only notation, or a constant.
PLAIN_COMMANDS = frozenset(
    f"frac sqrt cdot times div pi infty le ge ne in cup cap mathbb {_GREEK}".split()
)
# What is still to be done in an answer with it: allowed where the gold answer has it too.
_OPERATIONS = (
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp binom int sum prod "
    "lim to det gcd lcm max min mod pmod bmod lfloor rfloor lceil rceil overline vec partial bar "
    "hat prime circ ldots cdots dots"
)
OPERATIONS = frozenset(_OPERATIONS.split())

# Short words that are no product of two variables.
_WORDS = "am an as at be by do he if in is it me my no of on or so to up us we"

_TWO_NUMBERS = re.compile(r"\d\s+[\d.]")
_TOKEN = re.compile(r"\\[A-Za-z]+|\d+(?:\.\d+)?|\.\d+|[A-Za-z]+|[-+*/^_(){}\[\]|!=<>' ]")
_DECIMAL = re.compile(r"\d*\.\d+")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+")
_UNIT = re.compile(r"(?<=[\s}\)\dA-Za-z])\s(?P<unit>[A-Za-z][^\\=]*)$")
_NOUN = re.compile(r"[A-Za-z]{4,}")


def read_expression(text: str) -> Expression | None:
    r"""Return the cleaned text as an expression, or ``None`` if it is no mathematics.

    Only notation of a list gets through: no words, no names of Python, no unknown commands.

    Example:
        >>> read_expression(r"2\sqrt{3} cm").latex
        '2\\sqrt{3}'
        >>> read_expression("__import__('os')") is None
        True
    """
    latex, unit = _without_unit(text)
    if len(latex) > MAX_CHARACTERS or not is_balanced(latex) or not _is_mathematics(latex):
        return None
    latex = _DECIMAL.sub(_fraction, latex).replace("*", r"\cdot ")
    return Expression(latex.strip(), unit)


def operations(latex: str) -> set[str]:
    """Return the operations in an expression that an answer should not leave to be done."""
    found = {name for name in _COMMAND.findall(latex) if name in OPERATIONS}
    return found | {sign for sign in "!|'" if sign in latex}


def letters(latex: str) -> set[str]:
    """Return the single letters and Greek ones in an expression, in their case."""
    greek = set(_GREEK.split()).intersection(_COMMAND.findall(latex))
    return greek.union(*_LETTERS.findall(latex)) if _LETTERS.search(latex) else greek


def _without_unit(text: str) -> tuple[str, Unit | None]:
    match = _UNIT.search(text)
    phrase = match["unit"].strip() if match else ""
    unit = measure(phrase) or (read_unit(phrase) if _NOUN.fullmatch(phrase) else None)
    if match is None or unit is None or unit.is_letter:
        return text, None
    return text[: match.start()], unit


def _is_mathematics(latex: str) -> bool:
    if _TWO_NUMBERS.search(latex):
        return False
    position = 0
    for match in _TOKEN.finditer(latex):
        if match.start() != position or not _is_known(match[0]):
            return False
        position = match.end()
    return position == len(latex) and any(character.isalnum() for character in latex)


def _is_known(token: str) -> bool:
    if token.startswith("\\"):
        return token[1:] in PLAIN_COMMANDS | OPERATIONS
    return not token.isalpha() or (len(token) <= 2 and token.casefold() not in _WORDS.split())


def _fraction(match: re.Match[str]) -> str:
    value = Fraction(match[0])
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
