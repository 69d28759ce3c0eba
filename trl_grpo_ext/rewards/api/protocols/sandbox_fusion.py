"""Running the program in a completion in SandboxFusion, and looking at what it did."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.api.protocols.options import ServiceProtocol, shown
from trl_grpo_ext.rewards.api.protocols.reading import entry, text, unreadable, whole
from trl_grpo_ext.rewards.api.protocols.rendering import cell
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireRequest

# How a program prints a line of its own, to prove that it reached the end of its tests.
_PRINT = {
    "bash": "echo; echo '{line}'",
    "lua": "print(); print('{line}')",
    "nodejs": "console.log(); console.log('{line}')",
    "python": "print(); print('{line}')",
    "ruby": "puts; puts '{line}'",
}


@dataclass(frozen=True, kw_only=True)
class SandboxFusion(ServiceProtocol):
    """Score 1 for each completion whose program does what it should, else 0.

    The program is the last fenced block of the completion. A completion without one, or whose last
    block is not closed, scores 0; so does a program that fails or runs out of time. An error of the
    sandbox itself is no score.

    Args:
        check: ``"stdout"`` (what the program prints is compared) or ``"tests"`` (the row's tests
            are put behind the program, and must run to their end).
        column: Column of the data set with the expected output, or with the code of the tests: a
            text, or a list of lines. A row without it stays unscored.
        stdin_column: Column with what the program reads.
        exact: Whether white space at the end of lines and of the output counts.
        language: As SandboxFusion names it. For bash, lua, nodejs, python and ruby a line is
            printed after the tests, whose text a program cannot know without reading its own
            source; so ``exit(0)`` is no success. In other languages the exit code alone decides.
        compile_timeout_s: For compiled languages.
        run_timeout_s: For the program with its tests.
        memory_limit_mb: -1 for none.

    References:
        SandboxFusion, ``sandbox/server/sandbox_api.py`` and ``sandbox/runners/types.py``: the reply
        has HTTP status 200 also for errors; ``Failed`` is a return code other than 0 or a time
        limit that was exceeded, ``SandboxError`` is an error on the side of the sandbox.

    Example:
        >>> sandbox = SandboxFusion(column="output")
        >>> answer = "So:" + chr(10) + "```python" + chr(10) + "print(4)" + chr(10) + "```"
        >>> [request] = sandbox.requests([Item("Print 2 + 2.", answer, columns={"output": "4"})])
        >>> request.payload["code"]
        'print(4)'
        >>> run = {"status": "Finished", "return_code": 0, "stdout": "4" + chr(10)}
        >>> sandbox.parse(request, {"status": "Success", "run_result": run}).scores
        [1.0]
        >>> sandbox.parse(request, {"status": "SandboxError"}).scores
        [None]
    """

    name: ClassVar[str] = "sandbox_fusion"
    required: ClassVar[tuple[str, ...]] = ("column", "language")

    check: Literal["stdout", "tests"] = "stdout"
    column: str = ""
    stdin_column: str | None = None
    exact: bool = False
    language: str = "python"
    compile_timeout_s: float = 10.0
    run_timeout_s: float = 10.0
    memory_limit_mb: int = -1

    def problems(self) -> Iterator[str]:
        """Yield what cannot work."""
        yield from super().problems()
        for option in ("compile_timeout_s", "run_timeout_s"):
            if getattr(self, option) <= 0:
                yield self.problem(
                    option, f"is {getattr(self, option)}, so no program could run", "Use seconds"
                )

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return one request an item whose row says what is expected."""
        wanted = [self._wanted(item) for item in items]
        return [
            self._request(item, index, expected)
            for index, (item, expected) in enumerate(zip(items, wanted, strict=True))
            if expected is not None
        ]

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return 1 or 0, or ``None`` for an error of the sandbox."""
        status = entry(body, "status")
        if status == "SandboxError":
            return Reply([None])
        if status == "Failed":
            return Reply([0.0])
        if status != "Success":
            unreadable("the status is none of Success, Failed and SandboxError")
        run = entry(body, "run_result")
        stdout = text(entry(run, "stdout"))
        if entry(run, "status") != "Finished" or whole(entry(run, "return_code")) != 0:
            unreadable("a success did not finish with the return code 0")
        return Reply([float(self._is_right(stdout, request))])

    def _wanted(self, item: Item) -> str | None:
        """Return the expected output or the tests; ``None`` if the row has none."""
        value = self._cell(item, self.column, "column")
        if isinstance(value, list | tuple) and all(isinstance(line, str) for line in value):
            value = "\n".join(value)
        if self.check == "stdout" and isinstance(value, int | float):
            return str(value)
        if self.check == "tests" and isinstance(value, str) and not value.strip():
            return None  # any program would pass
        if value is None or isinstance(value, str):
            return value
        raise RewardError(
            f"protocol '{self.name}' found {shown(value)} in the column '{self.column}', which is "
            f"neither {'an output' if self.check == 'stdout' else 'code'} nor a list of its lines, "
            "so no program could be judged. Set `column` to a column of texts."
        )

    def _request(self, item: Item, index: int, wanted: str) -> WireRequest:
        program = last_block(item.completion)
        expected: dict[str, Any] = {"has_program": program is not None}
        code = program or ""
        if self.check == "stdout":
            expected["stdout"] = wanted
        elif self.language in _PRINT:
            expected["proof"] = _digest(code, wanted)
            ending = _PRINT[self.language].format(line=expected["proof"])
            code = f"{code}\n\n{wanted}\n\n{ending}\n"
        else:
            code = f"{code}\n\n{wanted}\n"
        return WireRequest("/run_code", self._payload(item, code), (index,), expected=expected)

    def _payload(self, item: Item, code: str) -> dict[str, Any]:
        payload = {
            "code": code,
            "language": self.language,
            "compile_timeout": self.compile_timeout_s,
            "run_timeout": self.run_timeout_s,
            "memory_limit_MB": self.memory_limit_mb,
        }
        stdin = self._cell(item, self.stdin_column, "stdin_column") if self.stdin_column else None
        return payload if stdin is None else {**payload, "stdin": str(stdin)}

    def _is_right(self, stdout: str, request: WireRequest) -> bool:
        wanted = request.expected
        if not wanted["has_program"]:
            return False
        if "stdout" in wanted:
            return self._comparable(stdout) == self._comparable(wanted["stdout"])
        lines = (line.rstrip() for line in stdout.split("\n"))
        return "proof" not in wanted or wanted["proof"] in lines

    def _comparable(self, output: str) -> str:
        if self.exact:
            return output
        return "\n".join(line.rstrip() for line in output.split("\n")).rstrip()

    def _cell(self, item: Item, name: str, option: str) -> Any:
        return cell(item, name, protocol=self.name, option=option)


def last_block(completion: str) -> str | None:
    r"""Return the code in the last fenced block, ``None`` if there is none or it is not closed.

    Example:
        >>> last_block("First:\n```\na\n```\nBetter:\n```python\nb\n```\nDone.")
        'b'
        >>> last_block("```\na\n```\n```\nb") is None
        True
    """
    fence, start, block = "", 0, None
    lines = completion.split("\n")
    for position, line in enumerate(lines):
        ticks = re.match(r" {0,3}(`{3,})([^`]*)$", line)
        if ticks and not fence:
            fence, start, block = ticks[1], position + 1, None
        elif ticks and len(ticks[1]) >= len(fence) and not ticks[2].strip():
            fence, block = "", "\n".join(lines[start:position])
    return block


def _digest(code: str, tests: str) -> str:
    return "passed " + hashlib.sha256(json.dumps([code, tests]).encode()).hexdigest()
