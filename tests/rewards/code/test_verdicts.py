from __future__ import annotations

from collections.abc import Iterator

import pytest
from rewards.code.levels_here import LEVELS, sandbox_of

from trl_grpo_ext.rewards.code.cases import Asserts, Case
from trl_grpo_ext.rewards.code.jail import Sandbox
from trl_grpo_ext.rewards.code.levels import Level
from trl_grpo_ext.rewards.code.limits import MEBIBYTE, Limits
from trl_grpo_ext.rewards.code.verdicts import Verdict, run_asserts, run_cases

LIMITS = Limits(time_limit_s=2.0)

STACK = """
class Stack:
    def __init__(self, *items): self.items = list(items)
    def push(self, item): self.items.append(item)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __getitem__(self, index): return self.items[index]
    def __iter__(self): return iter(self.items)
"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    found = sandbox_of("namespaces")
    yield found
    found.close()


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def f(x): return x", "assert f([1, (2, {3}), {'a': 4}]) == [1, (2, {3}), {'a': 4}]"),
        ("def f(x): return x", "assert f(2 ** 5000) == 2 ** 5000"),
        ("def f(x): return x", "assert f('\\ud800 é') == '\\ud800 é'"),
        ("def f(x): return x", "assert f(float('inf')) == float('inf') and f(1.5) == 1.5"),
        ("def f(x): return x", "assert type(f(True)) is bool and type(f(1)) is int"),
        ("def f(x, *, y=1): return x + y", "assert f(1) == 2\nassert f(1, y=4) == 5"),
        ("def f(x): x.sort()", "x = [3, 1]\nf(x)\nassert x == [1, 3]"),
        ("def f(x): x['b'] = 2", "x = {'a': 1}\nf(x)\nassert x == {'a': 1, 'b': 2}"),
        ("def f(x): raise ValueError('no')", "try:\n    f(1)\n    assert False\n"
         "except ValueError as e:\n    assert str(e) == 'no'"),
        ("class Odd(KeyError): pass\ndef f(x): raise Odd", "try: f(1)\nexcept LookupError: pass\n"
         "else: assert False\nassert 1 + 1 == 2"),
        ("from collections import Counter\ndef f(x): return Counter(x)",
         "assert f('aab') == {'a': 2, 'b': 1}"),
        ("from collections import defaultdict\ndef f(x):\n    d = defaultdict(list)\n"
         "    d[x].append(1)\n    return d", "assert f(5) == {5: [1]}"),
        ("def f(n):\n    for i in range(n): yield i", "assert list(f(250)) == list(range(250))"),
        ("def f():\n    i = 0\n    while True:\n        yield i\n        i += 1",
         "g = f()\nassert [next(g), next(g), next(g)] == [0, 1, 2]"),
        (STACK, "s = Stack(1, 2)\ns.push(3)\nassert s.pop() == 3\nassert len(s) == 2\n"
         "assert s[0] == 1\nassert list(s) == [1, 2]"),
        ("LIMIT = 7", "assert LIMIT == 7"),
        ("def f(): return f\ndef g(h): return h is f", "assert g(f())"),
        ("def f(x): return print(x)", "assert f('noise') is None"),
        ("def f(n): return n if n < 2 else f(n - 1) + f(n - 2)", "import math\n"
         "assert math.sqrt(f(12)) == 12.0"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int",
         "assert P(3).x == 3"),
    ],
)  # fmt: skip
def test_right_program_passes(sandbox: Sandbox, program: str, test: str) -> None:
    verdict = run_asserts(sandbox, program, Asserts((test,)), LIMITS)
    assert (verdict.fraction, verdict.end) == (1.0, "done")


@pytest.mark.parametrize(
    ("tests", "passed", "counted"),
    [
        (["assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 0"], 2, 3),
        (["assert f(1) == 1\nassert f(2) == 0\nassert f(3) == 9"], 2, 3),
        (["for n in range(4):\n    assert f(n) == n"], 0, 1),  # 2 * 2 is not 2
        (["for n in range(2):\n    assert f(n) == n"], 1, 1),
        (["assert f(1) == 1\nf('x')\nassert f(2) == 4"], 1, 2),  # the second is not reached
        (["assert f(1) == 1", "f('x')", "assert f(2) == 4"], 2, 3),
        (["assert f('x') == 1", "assert f(2) == 4"], 1, 2),
        (["assert True", "assert f(1) == 1"], 1, 1),
        (["if f(1) == 1:\n    assert f(2) == 4\nelse:\n    assert f(2) == 5"], 1, 1),
        (["def check(g): assert g(1) == 1", "check(f)"], 1, 1),
        (["def check(g): assert g(1) == 1"], 0, 0),  # never called
    ],
)
def test_asserts_are_counted_one_by_one(
    sandbox: Sandbox, tests: list[str], passed: int, counted: int
) -> None:
    verdict = run_asserts(sandbox, "def f(x): return x * x", Asserts(tuple(tests)), LIMITS)
    assert (verdict.passed, verdict.counted) == (passed, counted)


def test_asserts_before_the_time_is_over_count(sandbox: Sandbox) -> None:
    program = "def f(x):\n    while x == 2: pass\n    return x"
    asserts = Asserts(("assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3"))
    assert run_asserts(sandbox, program, asserts, LIMITS) == Verdict(1, 3, "time")


def test_asserts_before_the_program_ends_count(sandbox: Sandbox) -> None:
    program = "import os\ndef f(x):\n    if x == 2: os._exit(0)\n    return x"
    asserts = Asserts(("assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3"))
    assert run_asserts(sandbox, program, asserts, LIMITS) == Verdict(1, 3, "program")


@pytest.mark.parametrize(
    "asserts",
    [
        Asserts(("assert f(lambda x: x) == 1",)),
        Asserts(("def check(g): assert helper(g(1)) == 1",), entry_point="f"),
        Asserts(("assert f(1) == 1",), given="import no_such_module"),
    ],
)
def test_tests_that_cannot_be_run_apart_are_unjudgeable(sandbox: Sandbox, asserts: Asserts) -> None:
    assert run_asserts(sandbox, "def f(x): return 1", asserts, LIMITS).end == "unjudgeable"


def test_cases_count_what_is_printed_and_stop_at_the_first_that_runs_out_of_time(
    sandbox: Sandbox,
) -> None:
    program = "n = int(input())\nwhile n == 3: pass\nprint(2 * n)"
    cases = [Case("1\n", "2"), Case("2\n", "5"), Case("3\n", "6"), Case("4\n", "8")]
    assert run_cases(sandbox, program, cases[:2], LIMITS) == Verdict(1, 2)
    assert run_cases(sandbox, program, cases, LIMITS) == Verdict(1, 4, "time")


def test_program_runs_as_main_for_cases_and_not_for_asserts(sandbox: Sandbox) -> None:
    program = "def f(): return __name__\nif __name__ == '__main__':\n    print('main')"
    assert run_cases(sandbox, program, [Case("", "main")], LIMITS).fraction == 1
    asserts = Asserts(("assert f() == 'program'",))
    assert run_asserts(sandbox, program, asserts, LIMITS).fraction == 1


@pytest.mark.parametrize("level", LEVELS)
def test_least_memory_is_enough_for_python(level: Level) -> None:
    limits = Limits(memory_bytes=64 * MEBIBYTE)
    sandbox = sandbox_of(level, limits)
    try:
        program = "import json, re\nprint(len(bytearray(1 << 20)))"
        assert run_cases(sandbox, program, [Case("", "1048576")], limits).fraction == 1
        asserts = Asserts(("assert f(1) == 2",))
        assert run_asserts(sandbox, "def f(x): return x + 1", asserts, limits).fraction == 1
    finally:
        sandbox.close()
