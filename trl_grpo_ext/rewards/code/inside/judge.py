"""The process that runs the tests, apart from the program that they test.

The tests, and with them the expected values, never enter the process of the program. What the
tests call there is a stand-in: arguments and answers cross as plain values, and the tests compare
what arrived. A program can therefore answer, and do nothing else.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import signal
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

from trl_grpo_ext.rewards.code.inside.checks import Tally, free_names
from trl_grpo_ext.rewards.code.inside.wire import Channel, decode, encode

_ITEMS_AT_ONCE = 100


class ProgramEndedError(BaseException):
    """The program ended, broke the protocol or ran out of time: no more answers will come."""


class NotPlainError(TypeError):
    """A value has no plain type, and the program would decide how it compares."""


class OutOfTimeError(BaseException):
    """The time for the tests is over."""


class UnjudgeableError(BaseException):
    """The tests hand the program what has no plain type, such as a function."""


class Line:
    """Asks the program, over a channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._is_up = True

    def ask(self, operation: str, *operands: Any) -> Any:
        """Return the program's answer as a plain value, or a stand-in for one that is not.

        Lists and other containers among the arguments of a call are changed as the program changed
        its copy of them.

        Raises:
            Exception: What the program raised, as the nearest standard exception.
            ProgramEndedError: There is no answer.
        """
        kind, *content = self._exchange(encode([operation, *operands], keep=_number))
        if kind == "raised":
            raise _exception(*content)
        value, changed = content
        if changed is not None:  # of the arguments of a call
            for argument, after in zip(operands[1], self._decoded(changed), strict=True):
                _replace(argument, after)
        return self._decoded(value)

    def _exchange(self, message: Any) -> Any:
        if not self._is_up:
            raise ProgramEndedError
        try:
            self._channel.send(message)
            return self._channel.receive()
        except (EOFError, OSError, ValueError, RecursionError) as error:
            self._is_up = False
            raise ProgramEndedError from error

    def _decoded(self, data: Any) -> Any:
        return decode(data, find=lambda number: StandIn(self, number))


class StandIn:
    """Stands for a value of the program that has no plain type: a function, an object.

    It can be called and read. It cannot be compared, ordered, hashed or taken as a truth value, as
    then the program would say whether the test holds.
    """

    __hash__: ClassVar[None]  # type: ignore[assignment]

    def __init__(self, line: Line, number: int) -> None:
        self._line, self._number = line, number

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call it there."""
        return self._line.ask("call", self, list(arguments), keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._line.ask("attribute", self, name)

    def __getitem__(self, key: Any) -> Any:
        return self._line.ask("item", self, key)

    def __len__(self) -> int:
        return int(self._line.ask("length", self))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._line.ask("iterate", self)
        while items := self._line.ask("take", iterator, _ITEMS_AT_ONCE):
            yield from items

    def _refuse(self, *_: object) -> NoReturn:
        raise NotPlainError("the program's value is of none of the plain types")

    def __next__(self) -> Any:
        items = self._line.ask("take", self, 1)
        if not items:
            raise StopIteration
        return items[0]

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __bool__ = __contains__ = _refuse


def judge(
    tests: list[str],
    *,
    given: str,
    entry_point: str | None,
    channel: Channel,
    time_limit_s: float,
) -> dict[str, Any]:
    """Return how many asserts hold.

    Args:
        tests: Code with asserts, executed one after the other in one namespace.
        given: Trusted code that the tests may use; empty if there is none.
        entry_point: The one name that the program defines for the tests; ``check`` is called with
            it if the tests define that. ``None``: each name that the tests do not bind is asked
            of the program.
        channel: To the program.
        time_limit_s: Seconds for all.

    Returns:
        ``passed`` and ``counted`` asserts, and the ``end``: ``"done"``, ``"time"``, ``"program"``
        where the program ended, or ``"unjudgeable"``.
    """
    tests = _with_call(tests, entry_point)
    tally, end = Tally(tests), "done"
    _start_clock(time_limit_s)
    try:
        tally.run_all(_namespace(tests, given, entry_point, Line(channel)))
    except ProgramEndedError:
        end = "program"
    except OutOfTimeError:
        end = "time"
    except UnjudgeableError:
        end = "unjudgeable"
    signal.setitimer(signal.ITIMER_REAL, 0)
    if end != "done":
        tally.fail_open()
    return {**tally.counts(), "end": end}


def _namespace(tests: list[str], given: str, entry_point: str | None, line: Line) -> dict[str, Any]:
    """Return the globals of the tests: what was given, and stand-ins for what is tested."""
    namespace = _given_names(given)
    namespace.pop(entry_point or "", None)
    for name in sorted(free_names("\n".join(tests)) - namespace.keys()):
        if name in sys.stdlib_module_names:  # never the program's, which may be another
            namespace[name] = importlib.import_module(name)
        elif name == entry_point or entry_point is None:
            with contextlib.suppress(Exception):  # a test that needs it will raise NameError
                namespace[name] = line.ask("name", name)
        else:
            raise UnjudgeableError
    return namespace


def _given_names(given: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(given, "<given>", "exec", dont_inherit=True), namespace)
    except Exception as error:
        raise UnjudgeableError from error
    return namespace


def _with_call(tests: list[str], entry_point: str | None) -> list[str]:
    """Return the tests with HumanEval's call of `check` behind them."""
    source = "\n".join(tests)
    if entry_point is None:
        return tests
    has_check = any(
        isinstance(node, ast.FunctionDef) and node.name == "check"
        for node in ast.parse(source).body
    )
    return [f"{source}\ncheck({entry_point})" if has_check else source]


def _start_clock(time_limit_s: float) -> None:
    def ring(*_: object) -> NoReturn:
        raise OutOfTimeError

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, time_limit_s, 0.1)  # again, if a test swallowed it


def _number(value: object) -> int:
    if isinstance(value, StandIn):
        return value._number
    raise UnjudgeableError


def _exception(names: list[str], text: str) -> Exception:
    """Return the nearest standard exception, which a test may expect."""
    for name in names:
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(text)
            except TypeError:  # such as UnicodeDecodeError, which takes five arguments
                continue
    return Exception(text)


def _replace(original: Any, after: Any) -> None:
    """Fill a container with what the program left in its copy."""
    if type(original) is not type(after):
        return
    if isinstance(original, list | bytearray):
        original[:] = after
    elif isinstance(original, dict | set | deque):
        original.clear()
        fill = original.extend if isinstance(original, deque) else original.update
        fill(after)
