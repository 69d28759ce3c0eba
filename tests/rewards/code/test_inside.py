from __future__ import annotations

import ast
import datetime
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.rewards.code.inside import seccomp
from trl_grpo_ext.rewards.code.inside.checks import Tally, free_names, has_asserts
from trl_grpo_ext.rewards.code.inside.syscalls import HARMLESS, NUMBERS, STARTING
from trl_grpo_ext.rewards.code.inside.wire import decode, encode, frame
from trl_grpo_ext.rewards.code.visible import INSIDE


def refuse(value: object) -> Any:
    raise AssertionError(f"{value!r} has a plain type")


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary()
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner),
        st.tuples(inner, inner),
        st.dictionaries(scalars, inner),
        st.sets(scalars),
        st.frozensets(scalars),
    ),
)


@given(values)
def test_plain_value_comes_back_with_its_types_when_encoded(value: object) -> None:
    import json

    back = decode(json.loads(json.dumps(encode(value, keep=refuse))), find=refuse)
    assert back == value
    assert repr(back) == repr(value) or isinstance(value, set | frozenset | dict | list | tuple)


@pytest.mark.parametrize(
    "value",
    [
        10**400,
        -(10**400),
        1j,
        range(1, 9, 2),
        bytearray(b"a"),
        Decimal("1.10"),
        Fraction(1, 3),
        datetime.date(2024, 2, 29),
        datetime.datetime(2024, 2, 29, 1, 2, 3),
        datetime.timedelta(days=1, microseconds=5),
        Counter("aab"),
        OrderedDict(a=1),
        deque([1, 2]),
        True,
        1,
        1.0,
        -0.0,
    ],
)
def test_value_of_a_standard_type_comes_back_exactly(value: object) -> None:
    back = decode(encode(value, keep=refuse), find=refuse)
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_defaultdict_and_nan_come_back() -> None:
    assert decode(encode(defaultdict(list, a=[1]), keep=refuse), find=refuse) == {"a": [1]}
    assert math.isnan(decode(encode(math.nan, keep=refuse), find=refuse))


def test_subclass_of_a_plain_type_is_not_plain() -> None:
    class Sly(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    assert encode(Sly(3), keep=lambda value: 5) == ["object", 5]
    assert encode([type("list", (list,), {})()], keep=lambda value: 5) == ["list", [["object", 5]]]


@pytest.mark.parametrize("data", [["no", 1], ["set", [["list", []]]], ["int", 3], [], [1, 2, 3]])
def test_what_encode_never_writes_is_an_error(data: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode(data, find=refuse)


def test_frame_is_eight_bytes_of_length_and_json() -> None:
    assert frame([1, "a"]) == b"\0\0\0\0\0\0\0\x08" + b'[1, "a"]'


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("assert f(g(1)) == abs(x)", {"f", "g", "x"}),
        ("import math\nassert math.pi > f(3)", {"f"}),
        ("def check(c):\n    y = 1\n    assert c(y) == z", {"z"}),
        ("xs = [f(i) for i in range(3)]\nassert xs", {"f"}),
        ("def g():\n    global h\n    h = 1\nassert g() == h", set()),
        ("class A: pass\nassert A() != f()", {"f"}),
        ("for i in range(3): assert f(i)", {"f"}),
    ],
)
def test_free_names_are_the_globals_that_code_does_not_bind(source: str, names: set[str]) -> None:
    assert free_names(source) == names


@pytest.mark.parametrize(
    ("source", "answer"),
    [("assert f()", True), ("assert True", False), ("assert False", True), ("f()", False)],
)
def test_has_asserts_looks_for_what_can_fail(source: str, *, answer: bool) -> None:
    assert has_asserts(source) is answer


def test_tally_lets_a_failed_assert_raise_inside_try_only() -> None:
    seen: list[str] = []
    tally = Tally(
        [
            "assert 1 == 2\nseen.append('after')",
            "try:\n    assert 1 == 2\nexcept AssertionError:\n    seen.append('handled')",
        ]
    )
    tally.run_all({"seen": seen})
    assert seen == ["after", "handled"]
    assert tally.counts() == {"passed": 0, "counted": 2}


def test_filter_answers_every_call_as_its_tables_say() -> None:
    """An interpreter of the filter's few instructions, against the tables it is made from."""
    numbers = NUMBERS["x86_64"]
    for may_fork in (False, True):
        allowed = {numbers[name] for name in HARMLESS | (STARTING if may_fork else set())
                   if name in numbers}  # fmt: skip
        for number in range(600):
            verdict = filtered(number, argument=0, may_fork=may_fork)
            if number == numbers["clone3"]:
                assert verdict == 0x00050000 | 38  # ENOSYS
            elif number == numbers["clone"]:
                assert verdict == (0x7FFF0000 if may_fork else 0x00050001)
            else:
                assert verdict == (0x7FFF0000 if number in allowed else 0x00050001), number
    assert filtered(numbers["clone"], argument=0x00010000, may_fork=False) == 0x7FFF0000
    assert filtered(numbers["clone"], argument=0x10000000, may_fork=True) == 0x00050001
    assert filtered(numbers["socketpair"], argument=1, may_fork=False) == 0x7FFF0000
    assert filtered(numbers["socketpair"], argument=2, may_fork=False) == 0x00050001
    assert filtered(0, argument=0, may_fork=False, architecture=0x40000003) == 0x80000000


def filtered(number: int, *, argument: int, may_fork: bool, architecture: int = 0xC000003E) -> int:
    """What the kernel would make of one call, by the definition of classic BPF."""
    data = struct.pack("<IIQQ", number, architecture, 0, argument)
    code = list(struct.iter_unpack("HBBI", seccomp.program(may_fork=may_fork, machine="x86_64")))
    position, loaded = 0, 0
    while True:
        kind, if_true, if_false, value = code[position]
        position += 1
        if kind == 0x20:
            (loaded,) = struct.unpack_from("<I", data, value)
        elif kind == 0x06:
            return int(value)
        else:
            holds = loaded == value if kind == 0x15 else loaded & value
            position += if_true if holds else if_false


def test_no_dangerous_call_is_on_the_list() -> None:
    dangerous = """bpf chroot delete_module init_module io_uring_enter io_uring_setup keyctl mount
    memfd_create open_by_handle_at perf_event_open personality pivot_root prctl process_vm_readv
    process_vm_writev ptrace reboot setns setpriority setuid shmget socket swapon unshare umount2
    userfaultfd clock_settime settimeofday mknod mknodat sched_setattr"""
    assert not set(dangerous.split()) & (HARMLESS | STARTING)


def test_modules_inside_import_the_standard_library_and_themselves_only() -> None:
    import sys

    for path in Path(INSIDE).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                ours = name.startswith("trl_grpo_ext.rewards.code.inside")
                assert ours or name.partition(".")[0] in sys.stdlib_module_names, (path, name)
