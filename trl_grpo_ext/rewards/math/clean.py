r"""One way to write an answer: LaTeX without what only changes its looks."""

from __future__ import annotations

import re
import unicodedata

from trl_grpo_ext.rewards.math.brackets import closing_brace

# The brackets of a set, so that they are not mistaken for those that group in LaTeX.
SET_OPEN, SET_CLOSE = "⦃", "⦄"

_CHARACTERS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "×": r"\times ",
        "÷": r"\div ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "π": r"\pi ",
        "∞": r"\infty ",
        "√": r"\sqrt",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "±": r"\pm ",
        "∪": r"\cup ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "°": r"^\circ ",
        "θ": r"\theta ",
        "½": r"\frac{1}{2}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "’": "'",
        "\N{NO-BREAK SPACE}": " ",
        "\N{NARROW NO-BREAK SPACE}": " ",
        "\N{THIN SPACE}": " ",
        "\N{ZERO WIDTH SPACE}": "",
        "\N{WORD JOINER}": "",
        "\N{ZERO WIDTH NO-BREAK SPACE}": "",
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width
    }
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")

_WRAPPERS = [
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("**", "**"),
    ("__", "__"),
    ("`", "`"),
    ('"', '"'),
    ("“", "”"),
    ("*", "*"),
]

_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname|bm|bold"
    r"(?:symbol)?)\s*\{([^{}]*)\}"
)

_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]]|\$\$")
_DOLLAR = re.compile(r"(?<!\\)\$")

# Applied in this order.
_RULES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:left|right|[Bb]igg?[lr]?)(?![A-Za-z])\s*\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits)(?![A-Za-z])", " "),
        (r"(?<=\d)\\[,!;: ](?=\d{3}(?!\d))", ","),
        (r"(?<!\\)\\[,;:> ]|(?<!\\)~|\\q?quad(?![A-Za-z])|\\mspace", " "),
        (r"(?<!\\)\\!", ""),
        (r"(?<=\d)\{,\}\s*(?=\d)", ","),
        (r"\\([%$&#])", r"\1"),
        (r"\\(?:\{|lbrace(?![A-Za-z]))", SET_OPEN),
        (r"\\(?:\}|rbrace(?![A-Za-z]))", SET_CLOSE),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"(?:\{\})?\^\s*\{?\s*\\circ(?![A-Za-z])\s*\}?\s*C?|\\degree(?![A-Za-z])", " degrees "),
        (r"\\(?:leq(?:slant)?)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:geq(?:slant)?)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"==", "="),
        (r"\\(?:varnothing)(?![A-Za-z])", r"\\emptyset "),
        (r"\*\*", "^"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*\{([^{}]*)\}\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(?<![A-Za-z])(?:\\)?sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s*(\d+|[a-z])", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])(pi|sin|cos|tan|ln|log)(?![A-Za-z])", r"\\\1 "),
        (r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
        (r"\s+", " "),
    ]
]


def clean(text: str) -> str:
    r"""Return the answer without fonts, spacing, delimiters and final punctuation.

    Full-width characters, digits of other scripts, superscripts and signs such as × become what
    they look like.

    Example:
        >>> clean(r"$\displaystyle \dfrac12 \text{ km}$.")
        '\\frac{1}{2} km'
        >>> clean("x² ≤ ９")
        'x^{2} \\le 9'
    """
    text = _plain_characters(text)
    text = _without_delimiters(_without_wrappers(text))
    while (unwrapped := _TEXT.sub(r" \1 ", text)) != text:
        text = unwrapped
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return _without_wrappers(text)


def _plain_characters(text: str) -> str:
    if text.isascii():
        return text
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda run: f"^{{{run[0].translate(_SUPERSCRIPTS)}}}", text)
    text = text.translate(_CHARACTERS)
    return re.sub(r"[^\W\D]", lambda digit: str(unicodedata.decimal(digit[0])), text)


def _without_delimiters(text: str) -> str:
    """Return the text without the signs between which mathematics stands, if it has several."""
    text = _DELIMITERS.sub(" ", text)
    return text if len(_DOLLAR.findall(text)) % 2 else _DOLLAR.sub(" ", text)


def _without_wrappers(text: str) -> str:
    while (inner := _unwrapped(text)) != text:
        text = inner
    return text


def _unwrapped(text: str) -> str:
    text = text.strip().rstrip(".,;:").strip()
    for opening, closing in _WRAPPERS:
        if len(text) > len(opening) + len(closing) and text.startswith(opening):
            inner = text[len(opening) : -len(closing)]
            if text.endswith(closing) and opening not in inner and closing not in inner:
                return inner
    for command in (r"\boxed", ""):
        start = len(command)
        if text.startswith(command + "{") and closing_brace(text, start) == len(text) - 1:
            inner = text[start + 1 : -1]
            return inner if command or "," not in inner else SET_OPEN + inner + SET_CLOSE
    return text
