from __future__ import annotations

import json

import pytest

from trl_grpo_ext.rewards.code.cases import Asserts, Case, Tests, read_tests

TWO = [Case("1", "2"), Case("3", "6")]


@pytest.mark.parametrize(
    ("cell", "tests"),
    [
        ({"inputs": ["1", "3"], "outputs": ["2", "6"]}, TWO),
        (json.dumps({"inputs": ["1", "3"], "outputs": ["2", "6"]}), TWO),
        ([{"input": "1", "output": "2"}, {"input": "3", "output": "6", "type": "any"}], TWO),
        ({"inputs": [["1", "2"]], "outputs": [6]}, [Case("1\n2", "6")]),
        ({"input": "", "output": "2"}, [Case("", "2")]),
        ("assert f(1) == 2", Asserts(("assert f(1) == 2",))),
        (["assert f(1) == 2", "assert f(2)"], Asserts(("assert f(1) == 2", "assert f(2)"))),
        (
            {"fn_name": "f", "inputs": [[1, "a"]], "outputs": [[2]]},
            Asserts(("assert f(*[1, 'a']) == [2]",)),
        ),
        ('{"a": 1}\nassert f(1)', Asserts(('{"a": 1}\nassert f(1)',))),
        (None, None),
        ("", None),
        ([], None),
        ({}, None),
        (7, None),
        ("f(1)", None),  # nothing is asserted
        ("assert True", None),
        ("assert f(", None),
        (["assert f(1)", "assert f("], None),
        ({"inputs": ["1"], "outputs": []}, None),
        ({"inputs": [], "outputs": []}, None),
        ({"inputs": [{}], "outputs": ["1"]}, None),
        ([{"input": "1"}], None),
        (["assert f(1)", {"input": "1"}], None),
    ],
)  # fmt: skip
def test_read_tests_knows_the_forms_of_data_sets(cell: object, tests: Tests | None) -> None:
    assert read_tests(cell) == tests


def test_read_tests_keeps_given_code_and_entry_point() -> None:
    found = read_tests("assert f(1)", given="import math", entry_point="f")
    assert found == Asserts(("assert f(1)",), "import math", "f")


@pytest.mark.parametrize(
    ("output", "accepted"),
    [
        (b"1\n2\n", True),
        (b"1 \n2\t\n\n\n", True),
        (b"1\r\n2", True),
        (b"1\n\n2", False),
        (b" 1\n2", False),
        (b"1\n2\n3", False),
        (b"", False),
        (b"\xff", False),
    ],
)
def test_case_accepts_what_differs_in_trailing_white_space_only(
    output: bytes, *, accepted: bool
) -> None:
    assert Case("", "1\n2\n").accepts(output) is accepted
