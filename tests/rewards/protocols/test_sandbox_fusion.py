import subprocess
import sys
from typing import Any

import pytest

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.api.protocols import make_protocol
from trl_grpo_ext.rewards.api.protocols.sandbox_fusion import last_block
from trl_grpo_ext.rewards.api.wire import Item, UnreadableReplyError, WireRequest

TESTS = "assert double(2) == 4\nassert double(0) == 0"
RIGHT = "```python\ndef double(x):\n    return 2 * x\n```"


def block(code: str) -> str:
    return f"Here:\n```python\n{code}\n```\n"


def finished(stdout: str) -> dict[str, Any]:
    run = {"status": "Finished", "execution_time": 0.1, "return_code": 0, "stdout": stdout}
    return {"status": "Success", "message": "", "run_result": {**run, "stderr": ""}}


def ask(completion: str, wanted: object, **options: Any) -> tuple[Any, WireRequest]:
    sandbox = make_protocol("sandbox_fusion", column="wanted", **options)
    columns = {"wanted": wanted, "input": "3\n"}
    [request] = sandbox.requests([Item("?", completion, columns=columns)])
    return sandbox, request


def run_here(code: str) -> dict[str, Any]:
    """The reply of a sandbox that runs the program of a test as a process of its own."""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    run = {"status": "Finished", "return_code": done.returncode, "stdout": done.stdout}
    return {"status": "Failed" if done.returncode else "Success", "run_result": run}


def test_the_program_and_its_limits_are_sent() -> None:
    _, request = ask(block("print(6)"), "6", stdin_column="input", run_timeout_s=3)
    assert request.path == "/run_code"
    assert request.payload == {
        "code": "print(6)",
        "language": "python",
        "compile_timeout": 10.0,
        "run_timeout": 3,
        "memory_limit_MB": -1,
        "stdin": "3\n",
    }
    assert "6" not in request.payload["stdin"]  # what is expected is not sent
    assert make_protocol(
        "sandbox_fusion", column="wanted", stdin_column="input"
    ).required_columns == {"wanted", "input"}


@pytest.mark.parametrize(
    ("stdout", "score"), [("6", 1.0), ("6 \r\n\n", 1.0), ("16", 0.0), ("", 0.0), ("6\n6", 0.0)]
)
def test_what_a_program_prints_is_compared(stdout: str, score: float) -> None:
    sandbox, request = ask(block("print(6)"), 6)
    assert sandbox.parse(request, finished(stdout)).scores == [score]


def test_white_space_counts_if_it_should() -> None:
    sandbox, request = ask(block("print(6)"), "6\n", exact=True)
    assert sandbox.parse(request, finished("6\n")).scores == [1.0]
    assert sandbox.parse(request, finished("6")).scores == [0.0]


def test_an_error_of_the_sandbox_is_no_score_and_a_failure_is_zero() -> None:
    sandbox, request = ask(block("print(6)"), "6")
    error = {"status": "SandboxError", "message": "no pod", "run_result": None}
    assert sandbox.parse(request, error).scores == [None]
    late = {"status": "Failed", "run_result": {"status": "TimeLimitExceeded", "stdout": "6"}}
    assert sandbox.parse(request, late).scores == [0.0]


@pytest.mark.parametrize(
    "change",
    [
        {"status": "Finished"},
        {"status": None},
        {"run_result": None},
        {"run_result": {}},
        {"run_result": {"status": "Finished", "return_code": 1, "stdout": "6"}},
        {"run_result": {"status": "Error", "return_code": 0, "stdout": "6"}},
        {"run_result": {"status": "Finished", "return_code": 0, "stdout": None}},
        {"run_result": {"status": "Finished", "return_code": False, "stdout": "6"}},
    ],
)
def test_a_success_that_contradicts_itself_is_unreadable(change: dict[str, Any]) -> None:
    sandbox, request = ask(block("print(6)"), "6")
    with pytest.raises(UnreadableReplyError):
        sandbox.parse(request, finished("6") | change)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (RIGHT, 1.0),
        (block("def double(x):\n    return 2 * x\nprint('on the way', end='')"), 1.0),
        (block("def double(x):\n    return x + 1"), 0.0),
        (block("import sys\nsys.exit(0)"), 0.0),
        (block("import os\nos._exit(0)"), 0.0),
        (block("print('passed')\nraise SystemExit"), 0.0),
        (block("def double(x)"), 0.0),
        ("It is 2 * x.", 0.0),
    ],
)
def test_tests_must_run_to_their_end(completion: str, score: float) -> None:
    sandbox, request = ask(completion, TESTS, check="tests")
    assert sandbox.parse(request, run_here(request.payload["code"])).scores == [score]


def test_a_completion_without_a_program_is_zero_even_if_nothing_is_asked_of_it() -> None:
    sandbox, request = ask("No program.", "pass", check="tests")
    assert sandbox.parse(request, run_here(request.payload["code"])).scores == [0.0]
    sandbox, request = ask("No program.", "")
    assert sandbox.parse(request, finished("")).scores == [0.0]


def test_the_exit_code_decides_where_no_line_can_be_printed() -> None:
    sandbox, request = ask(
        "```go\nfunc f() {}\n```", "func Test() {}", language="go_test", check="tests"
    )
    assert request.payload["code"] == "func f() {}\n\nfunc Test() {}\n"
    assert sandbox.parse(request, finished("ok")).scores == [1.0]


def test_a_list_is_one_text_with_its_lines() -> None:
    tests = ["assert double(2) == 4", "assert double(3) == 7"]
    sandbox, request = ask(RIGHT, tests, check="tests")
    assert sandbox.parse(request, run_here(request.payload["code"])).scores == [0.0]
    sandbox, request = ask(block("..."), ("1", "2"))
    assert sandbox.parse(request, finished("1\n2\n")).scores == [1.0]


@pytest.mark.parametrize(("check", "value"), [("tests", 4), ("tests", [["a"]]), ("stdout", {})])
def test_what_is_neither_a_text_nor_lines_is_an_error(check: str, value: object) -> None:
    with pytest.raises(RewardError, match="in the column 'wanted', which is neither"):
        ask(RIGHT, value, check=check)


def test_a_row_without_what_is_expected_is_not_asked_about() -> None:
    sandbox = make_protocol("sandbox_fusion", column="wanted")
    assert sandbox.requests([Item("?", RIGHT, columns={"wanted": None})]) == []
    untested = make_protocol("sandbox_fusion", column="wanted", check="tests")
    assert untested.requests([Item("?", RIGHT, columns={"wanted": " \n"})]) == []
    with pytest.raises(RewardError, match="got no column 'wanted'"):
        sandbox.requests([Item("?", RIGHT)])


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("", None),
        ("`a`", None),
        ("```\na\n```", "a"),
        ("```python\na\nb\n```\ntext", "a\nb"),
        ("```\na\n```\n```\nb\n```", "b"),
        ("````\n```\na\n```\n````", "```\na\n```"),
        ("```\na\n```\n```\nb", None),
        ("```\na ``` b\n```", "a ``` b"),
        ("```\r\na\r\n```\r\n", "a\r"),
        ("```\n```", ""),
        ("    ```\na\n    ```", None),
    ],
)
def test_last_block_is_the_code_in_the_last_closed_fence(completion: str, code: str) -> None:
    assert last_block(completion) == code
