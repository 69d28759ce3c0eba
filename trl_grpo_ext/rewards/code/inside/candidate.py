"""The process of a program that is to be judged."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType
from typing import Any

from trl_grpo_ext.rewards.code.inside.wire import Channel, decode, encode


def run(source: str) -> None:
    """Run a program as a script: it reads standard input and prints."""
    _execute(source, name="__main__")


class Servant:
    """Answers calls of what a program defines, one by one; the answers are plain values.

    What has no plain type stays here, and a number stands for it. Nothing here is trusted by the
    process that asks: the program may have replaced any of it, but all it can do is answer.
    """

    def __init__(self) -> None:
        self._namespace: dict[str, Any] = {}
        self._kept: list[object] = []

    def serve(self, source: str, channel: Channel) -> None:
        """Execute the program, then answer until the other side ends."""
        problem = None
        try:
            self._namespace = _execute(source, name="program")
        except BaseException as error:  # noqa: BLE001 whatever a program raises
            problem = _raised(error)
        while True:
            try:
                request = channel.receive()
            except EOFError:
                return
            channel.send(problem or self._answer(request))

    def _answer(self, request: Any) -> Any:
        try:
            operation, *operands = decode(request, find=self._kept.__getitem__)
            arguments = operands[1] if operation == "call" else []
            before = encode(arguments, keep=self._keep)
            value = getattr(self, f"_do_{operation}")(*operands)
            after = encode(arguments, keep=self._keep)
            changed = after if after != before else None
            return ["returned", encode(value, keep=self._keep), changed]
        except BaseException as error:  # noqa: BLE001 whatever a program raises
            return _raised(error)

    def _keep(self, value: object) -> int:
        for number, kept in enumerate(self._kept):
            if kept is value:
                return number
        self._kept.append(value)
        return len(self._kept) - 1

    def _do_name(self, name: str) -> object:
        if name not in self._namespace:
            raise NameError(f"name {name!r} is not defined")
        return self._namespace[name]

    def _do_call(self, function: Any, arguments: Any, keywords: Any) -> object:
        return function(*arguments, **keywords)

    def _do_attribute(self, owner: object, name: str) -> object:
        return getattr(owner, name)

    def _do_item(self, owner: Any, key: object) -> object:
        return owner[key]

    def _do_length(self, owner: Any) -> int:
        return len(owner)

    def _do_iterate(self, owner: Any) -> object:
        return iter(owner)

    def _do_take(self, iterator: Any, count: int) -> list[object]:
        return list(itertools.islice(iterator, count))


def _execute(source: str, *, name: str) -> dict[str, Any]:
    module = ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, f"<{name}>", "exec", dont_inherit=True), vars(module))
    return vars(module)


def _raised(error: BaseException) -> list[Any]:
    """Return an exception as the names of its class and of those above it, and its text."""
    names = [kind.__name__ for kind in type(error).__mro__]
    try:
        return ["raised", names, str(error)[:1000]]
    except BaseException:  # noqa: BLE001 of its own __str__
        return ["raised", names, ""]
