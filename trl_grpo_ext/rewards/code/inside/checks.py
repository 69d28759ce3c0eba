"""Counting the asserts of a test, each on its own."""

from __future__ import annotations

import ast
import builtins
import symtable
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

_PASSED, _FAILED, _EXCEPTION = "__passed__", "__failed__", "__exception__"


@dataclass(frozen=True)
class CountedTest:
    """Code whose asserts are noted, and their numbers."""

    code: CodeType
    numbers: range


class Tally:
    """What became of the asserts of tests; one that runs often must hold each time.

    A failed assert is noted and the rest of its test goes on. Asserts inside `try` are noted and
    raise as they always do, since the test may expect it. An assert of a constant that is true is
    no test. Whatever else a test raises ends it: its asserts that did not run count as failed.

    Args:
        tests: Python code that is trusted.

    Raises:
        SyntaxError: A test is no Python.

    Example:
        >>> tally = Tally(["for n in (1, 2): assert n < 2", "assert 1 == n - 1"])
        >>> tally.run_all({})
        >>> tally.counts()
        {'passed': 1, 'counted': 2}
    """

    def __init__(self, tests: Sequence[str]) -> None:
        self._results: dict[int, bool] = {}
        self._num_asserts = 0
        self._first_open = 0
        self._tests = [self._compiled(test) for test in tests]

    def run_all(self, namespace: dict[str, Any]) -> None:
        """Execute the tests in these globals."""
        namespace |= {_PASSED: self._note, _FAILED: self._note_failure, _EXCEPTION: Exception}
        for test in self._tests:
            self._first_open = test.numbers.start
            try:
                exec(test.code, namespace)
            except Exception:  # noqa: BLE001 whatever a test raises
                self._fail(test.numbers or range(-1, 0))
            self._first_open = test.numbers.stop

    def fail_open(self) -> None:
        """Count as failed what has not run in the test under way, and all later tests."""
        self._fail(range(self._first_open, self._num_asserts))

    def counts(self) -> dict[str, int]:
        """Return how many asserts were ``counted``, and how many of them ``passed``."""
        return {"passed": sum(self._results.values()), "counted": len(self._results)}

    def _compiled(self, source: str) -> CountedTest:
        first = self._num_asserts
        counter = _Counter(first)
        tree = ast.fix_missing_locations(counter.visit(ast.parse(source)))
        self._num_asserts = counter.next_number
        code = compile(tree, "<tests>", "exec", dont_inherit=True)
        return CountedTest(code, range(first, self._num_asserts))

    def _note(self, number: int, holds: object) -> bool:
        passed = bool(holds)
        self._results[number] = passed and self._results.get(number, True)
        return passed

    def _note_failure(self, number: int) -> None:
        self._results[number] = False

    def _fail(self, numbers: range) -> None:
        for number in numbers:
            self._results.setdefault(number, False)


def has_asserts(source: str) -> bool:
    """Return whether any assert of the code can fail or hold.

    Example:
        >>> has_asserts("assert f(1) == 2"), has_asserts("assert True")
        (True, False)
    """
    return any(
        isinstance(node, ast.Assert) and not _is_constant_truth(node)
        for node in ast.walk(ast.parse(source))
    )


def free_names(source: str) -> set[str]:
    """Return the global names that code reads and neither binds nor finds among the builtins.

    Example:
        >>> sorted(free_names("def check(f): assert f(g(1)) == abs(x)"))
        ['g', 'x']
    """
    table = symtable.symtable(source, "<tests>", "exec")
    scopes = list(_scopes(table))
    bound = {
        name.get_name()
        for scope in scopes
        for name in scope.get_symbols()
        if (scope is table or name.is_declared_global()) and _is_bound(name)
    }
    read = {
        name.get_name()
        for scope in scopes
        for name in scope.get_symbols()
        if name.is_referenced() and (scope is table or name.is_global())
    }
    return read - bound - vars(builtins).keys() - {"__name__"}


def _is_bound(name: symtable.Symbol) -> bool:
    return name.is_assigned() or name.is_imported() or name.is_namespace()


def _scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _scopes(child)


def _is_constant_truth(node: ast.Assert) -> bool:
    return isinstance(node.test, ast.Constant) and bool(node.test.value)


class _Counter(ast.NodeTransformer):
    """Replaces each assert by one that notes its result."""

    def __init__(self, first: int) -> None:
        self.next_number = first
        self._num_tries = 0

    def visit_Try(self, node: ast.Try) -> ast.AST:
        self._num_tries += 1
        self.generic_visit(node)
        self._num_tries -= 1
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        if _is_constant_truth(node):
            return ast.Pass()
        number = self._number(node)
        noted = _call(_PASSED, ast.Constant(number), node.test)
        if self._num_tries:
            return ast.Assert(test=noted, msg=node.msg)
        handler = ast.ExceptHandler(
            type=ast.Name(_EXCEPTION, ast.Load()),
            body=[ast.Expr(_call(_FAILED, ast.Constant(number)))],
        )
        return ast.Try(body=[ast.Expr(noted)], handlers=[handler], orelse=[], finalbody=[])

    def _number(self, node: ast.Assert) -> int:
        if isinstance(node.test, ast.Constant):  # reached only where the test has failed
            return -1
        self.next_number += 1
        return self.next_number - 1


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])
