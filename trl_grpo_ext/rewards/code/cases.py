"""The tests of a row, in the forms that data sets have them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_grpo_ext.rewards.code.inside.checks import has_asserts


@dataclass(frozen=True)
class Case:
    r"""What a program reads, and what it should print.

    White space at the end of lines and of the output does not count.

    Example:
        >>> Case("21", "42").accepts(b"42 \n\n")
        True
    """

    stdin: str
    expected: str

    def accepts(self, output: bytes) -> bool:
        """Return whether an output is the expected one."""
        return _comparable(output.decode(errors="replace")) == _comparable(self.expected)


@dataclass(frozen=True)
class Asserts:
    """Code whose asserts are the tests.

    Args:
        tests: Python code.
        given: Trusted code that the tests may use.
        entry_point: The only name that the program defines for the tests, as in HumanEval;
            ``None`` if it may be any.
    """

    tests: tuple[str, ...]
    given: str = ""
    entry_point: str | None = None

    def for_judge(self) -> dict[str, Any]:
        """Return what the judge is told."""
        return {"tests": self.tests, "given": self.given, "entry_point": self.entry_point}


Tests = list[Case] | Asserts


def read_tests(cell: object, *, given: str = "", entry_point: str | None = None) -> Tests | None:
    """Return the tests in a cell of the data set.

    Args:
        cell: Code with asserts, or a list of such codes (MBPP); a mapping with ``inputs`` and
            ``outputs``, and ``fn_name`` where a function is called (APPS); a list of mappings with
            ``input`` and ``output``; or the JSON of one of these.
        given: As for :class:`Asserts`.
        entry_point: As for :class:`Asserts`.

    Returns:
        The tests; ``None`` if the cell has none that can be read.

    Example:
        >>> read_tests('{"inputs": ["21"], "outputs": ["42"]}')
        [Case(stdin='21', expected='42')]
        >>> read_tests(["assert double(21) == 42"]).tests
        ('assert double(21) == 42',)
    """
    value = _decoded(cell)
    if isinstance(value, Mapping):
        return _from_mapping(value, given)
    if isinstance(value, str):
        return _asserts([value], given, entry_point)
    if not isinstance(value, Sequence) or not value:
        return None
    if all(isinstance(item, str) for item in value):
        return _asserts(value, given, entry_point)
    if all(isinstance(item, Mapping) for item in value):
        pairs = [(item.get("input"), item.get("output")) for item in value]
        return _cases(pairs)
    return None


def _from_mapping(value: Mapping[str, Any], given: str) -> Tests | None:
    if "input" in value:
        return _cases([(value["input"], value.get("output"))])
    inputs, outputs = value.get("inputs"), value.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        return None
    function = value.get("fn_name")
    if not function:
        return _cases(list(zip(inputs, outputs, strict=True)))
    calls = [
        f"assert {function}(*{arguments!r}) == {expected!r}"
        for arguments, expected in zip(inputs, outputs, strict=True)
    ]
    return _asserts(calls, given, None)


def _cases(pairs: Sequence[tuple[object, object]]) -> list[Case] | None:
    texts = [(_text(stdin), _text(expected)) for stdin, expected in pairs]
    if not texts or any(stdin is None or expected is None for stdin, expected in texts):
        return None
    return [Case(stdin or "", expected or "") for stdin, expected in texts]


def _asserts(tests: Sequence[str], given: str, entry_point: str | None) -> Asserts | None:
    try:
        checks = [has_asserts(test) for test in tests]
    except (SyntaxError, ValueError):
        return None
    return Asserts(tuple(tests), given, entry_point) if any(checks) else None


def _decoded(cell: object) -> Any:
    if isinstance(cell, str) and cell.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    return cell


def _text(value: object) -> str | None:
    """Return a text, or the lines of one, or a number as it is printed."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _comparable(output: str) -> str:
    return "\n".join(line.rstrip() for line in output.split("\n")).rstrip()
