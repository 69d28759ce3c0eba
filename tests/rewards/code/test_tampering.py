"""Programs that want a score without solving the task; none may get any."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from rewards.code.levels_here import FULL, sandbox_of

from trl_grpo_ext.rewards.code.cases import Asserts, Case
from trl_grpo_ext.rewards.code.jail import Sandbox
from trl_grpo_ext.rewards.code.levels import LEVELS, Level
from trl_grpo_ext.rewards.code.limits import Limits
from trl_grpo_ext.rewards.code.verdicts import run_asserts, run_cases

LIMITS = Limits(time_limit_s=3.0)

# One that solves it: def f(x): return x * 7 + 11
TESTS = Asserts(("assert f(3) == 32", "assert f(5) == 46", "assert f(9) in (74,)"))

VERDICT = json.dumps({"passed": 3, "counted": 3, "end": "done"})

ALWAYS_EQUAL = """
class Same{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 74
    def __bool__(self): return True
    def __contains__(self, other): return True
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __instancecheck__ = __lt__
    def __getattr__(self, name): return self
    def __call__(self, *_): return self
def f(x): return Same()
"""

SEARCHING = """
import gc, re, sys
def f(x):
    texts, frame = [], sys._getframe()
    while frame:
        texts += [repr(value) for value in {**frame.f_globals, **frame.f_locals}.values()]
        frame = frame.f_back
    texts += [value for value in gc.get_objects() if isinstance(value, str)]
    texts += [repr(value) for value in gc.get_objects() if isinstance(value, (dict, list, tuple))]
    for text in texts:
        found = re.search(r"f[(]%d[)] (?:==|in) [(]?([0-9]+)" % x, text)
        if found:
            return int(found[1])
"""

WRITING_EVERYWHERE = f"""
import json, os, threading, time
verdict = {VERDICT!r}.encode()
def framed(data): return len(data).to_bytes(8, "big") + data
def flood():
    for _ in range(50):
        for fd in range(256):
            try:
                os.write(fd, verdict)
                os.write(fd, framed(verdict))
            except OSError:
                pass
"""

TRICKS = {
    "exit": "import sys; sys.exit(0)",
    "hard exit": "import os; os._exit(0)",
    "exit in the call": "import sys\ndef f(x): sys.exit(0)",
    "hard exit in the call": "import os\ndef f(x): os._exit(0)",
    "exit as an exception": "def f(x): raise SystemExit(0)",
    "prints the verdict": f"print({VERDICT!r})\ndef f(x): print({VERDICT!r})",
    "writes the verdict to every descriptor": WRITING_EVERYWHERE + "flood()\ndef f(x): flood()",
    "writes while it is asked": WRITING_EVERYWHERE
    + "threading.Thread(target=flood, daemon=True).start()\ndef f(x): time.sleep(1)",
    "writes at the exit": WRITING_EVERYWHERE + "import atexit; atexit.register(flood)",
    "equal to everything": ALWAYS_EQUAL.format(base=""),
    "an int equal to everything": ALWAYS_EQUAL.format(base="(int)"),
    "a string equal to everything": ALWAYS_EQUAL.format(base="(str)"),
    "a list equal to everything": ALWAYS_EQUAL.format(base="(list)"),
    "a class equal to everything": ALWAYS_EQUAL.format(base="(type)") + "f = Same('f', (), {})",
    "searches frames and objects": SEARCHING,
    "no assertion errors": (
        "import builtins\nbuiltins.AssertionError = builtins.Exception = type(None)\n"
        "def f(x): return 0"
    ),
    "replaces what answers": """
import sys
for name, module in list(sys.modules.items()):
    if name.startswith("trl_grpo_ext"):
        for member in ("encode", "decode", "judge", "Tally", "write_all"):
            if hasattr(module, member):
                setattr(module, member, lambda *a, **k: ["returned", True, None])
def f(x): return True
""",
    "answers of no such kind": """
import trl_grpo_ext.rewards.code.inside.candidate as inside
inside.encode = lambda value, *, keep: ["unknown", 1]
def f(x): return 1
""",
    "answers with a number that stands for nothing": """
import trl_grpo_ext.rewards.code.inside.candidate as inside
inside.encode = lambda value, *, keep: ["object", "x"]
def f(x): return 1
""",
    "raises what ends the judge": """
class ProgramEndedError(Exception): pass
class UnjudgeableError(ProgramEndedError): pass
class SystemExit(UnjudgeableError): pass
def f(x): raise SystemExit("0")
""",
    "an answer nested without end": """
def f(x):
    value = []
    for _ in range(900):
        value = [value]
    return value
""",
    "an answer too long": "def f(x): return 'x' * 100_000_000",
    "not a number": "def f(x): return float('nan')",
    "kills what it can": "import os\ndef f(x):\n    os.kill(os.getppid(), 9)\n    os.kill(-1, 9)",
    "traces": "import sys\nsys.settrace(lambda *_: None)\ndef f(x): return True",
    "answers nothing": "import time\ndef f(x): time.sleep(100)",
    "closes everything": "import os\ndef f(x): os.closerange(0, 256)",
    "no such name": "def g(x): return x * 7 + 11",
    "no program": "def f(x:",
    "a null": "x = chr(0)\x00",
}


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    level: Level = request.param
    found = sandbox_of(level)
    yield found
    found.close()


def test_asserts_hold_for_a_solution(sandbox: Sandbox) -> None:
    verdict = run_asserts(sandbox, "def f(x): return x * 7 + 11", TESTS, LIMITS)
    assert (verdict.passed, verdict.counted, verdict.end) == (3, 3, "done")


@pytest.mark.parametrize("trick", TRICKS)
def test_trick_earns_nothing(trick: str, sandbox: Sandbox) -> None:
    if trick == "kills what it can" and sandbox.name not in FULL:
        pytest.skip(f"{sandbox.name} does not stop it, and it would do harm")
    verdict = run_asserts(sandbox, TRICKS[trick], TESTS, LIMITS)
    assert verdict.fraction == 0
    assert verdict.end in ("done", "time", "program")  # never unscored, which could be an escape


@pytest.mark.parametrize(
    "test",
    [
        "assert f(1) != 3",
        "assert not f(1)",
        "assert f(1)",
        "assert 3 in f(1)",
        "assert f(1) > 3",
        "assert not f(1) < 3",
        "assert [f(1)] == [3]",
        "assert {'a': f(1)} == {'a': 3}",
        "assert f(1) in {3: 4}",
        "assert bool(f(1))",
        "assert abs(f(1) - 3) < 0.1",
        "assert isinstance(f(1), int)",
        "assert str(f(1)) == '3'",
        "assert all(x == 3 for x in [f(1)])",
        "assert f(1).value == 3",
        "assert f(1)() == 3",
        "assert f(1)[0] == 3",
    ],
)
def test_object_that_agrees_to_everything_earns_nothing(test: str) -> None:
    sandbox = sandbox_of("namespaces")
    try:
        program = ALWAYS_EQUAL.format(base="") + "    __getitem__ = __call__\n"
        assert run_asserts(sandbox, program, Asserts((test,)), LIMITS).fraction == 0
    finally:
        sandbox.close()


def test_helper_of_the_prompt_is_not_taken_from_the_program() -> None:
    asserts = Asserts(
        ("def check(candidate): assert double(candidate(3)) == 14",),
        given="def double(x): return 2 * x\ndef f(x): 'Return 7.'",
        entry_point="f",
    )
    sandbox = sandbox_of("namespaces")
    try:
        lie = "def double(x): return 14\ndef f(x): return 0"
        assert run_asserts(sandbox, lie, asserts, LIMITS).fraction == 0
        assert run_asserts(sandbox, "def f(x): return 7", asserts, LIMITS).fraction == 1
    finally:
        sandbox.close()


def test_standard_module_is_not_taken_from_the_program() -> None:
    program = "class math:\n    isclose = lambda *_: True\ndef f(x): return 0"
    sandbox = sandbox_of("namespaces")
    try:
        asserts = Asserts(("assert math.isclose(f(1), 3.0)",))
        assert run_asserts(sandbox, program, asserts, LIMITS).fraction == 0
        assert run_asserts(sandbox, "def f(x): return 3", asserts, LIMITS).fraction == 1
    finally:
        sandbox.close()


@pytest.mark.parametrize(
    "program",
    [
        "print('42', flush=True); import os; os._exit(1)",
        "print('42'); 1 / 0",
        "import sys; sys.exit(0)",
        "print('41')",
        "print('42 43')",
        "",
    ],
)
def test_case_is_failed_by(program: str) -> None:
    sandbox = sandbox_of("namespaces")
    try:
        assert run_cases(sandbox, program, [Case("", "42")], LIMITS).fraction == 0
    finally:
        sandbox.close()
