"""Each attempt of ``escapes.py`` against each level, and the table of the guide."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rewards.code.escapes import ESCAPES, Escape
from rewards.code.levels_here import FULL, LEVELS, TIGHT, sandbox_of

from trl_grpo_ext.rewards.code.inside.syscalls import NUMBERS
from trl_grpo_ext.rewards.code.inside.wire import frame
from trl_grpo_ext.rewards.code.jail import Heard, Sandbox, Talk
from trl_grpo_ext.rewards.code.levels import Level
from trl_grpo_ext.rewards.code.limits import Limits
from trl_grpo_ext.rewards.code.verdicts import job

ROOT = Path(__file__).parents[3]
SECRET = "canary-4711-secret"


def printed(sandbox: Sandbox, program: str, limits: Limits = TIGHT, stdin: bytes = b"") -> Heard:
    with sandbox.start() as jail:
        message = frame(job("run", sandbox, jail, limits, source=program)) + stdin
        talk = Talk(jail, message, max_output_bytes=limits.max_output_bytes)
        return talk.start().finish(limits.time_limit_s)


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """What an attempt is about; at the end the victim must still be alive and nothing written."""
    canary = tmp_path / ".ssh" / "canary_key"
    canary.parent.mkdir()
    canary.write_text(SECRET)
    monkeypatch.setenv("API_KEY", SECRET)
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    address = str(tmp_path / "socket")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as by_path,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        by_path.bind(address)
        by_path.listen()
        abstract.bind("\0" + address)
        abstract.listen()
        yield {
            "canary": str(canary),
            "repository": str(ROOT),
            "outside": str(tmp_path),
            "victim": victim.pid,
            "port": server.getsockname()[1],
            "socket": address,
            "trainer": os.getpid(),
            "clone": NUMBERS[platform.machine()]["clone"],
        }
    status = psutil.Process(victim.pid).status()
    victim.kill()
    victim.wait()
    assert status not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("escape", ESCAPES, ids=lambda escape: escape.name)
def test_escape_is_stopped_by_the_levels_that_say_so(
    escape: Escape, level: Level, surroundings: dict[str, object]
) -> None:
    is_stopped = level in escape.stopped_by
    if not is_stopped and not escape.is_harmless:
        pytest.skip(f"{level} does not stop it, and it would do harm")
    limits = replace(TIGHT, max_processes=escape.max_processes)
    sandbox = sandbox_of(level, limits)
    try:
        heard = printed(sandbox, escape.program.format(**surroundings), limits)
        left = processes_of(sandbox)
    finally:
        sandbox.close()
    told = b"ESCAPED" in heard.output or SECRET.encode() in heard.output
    assert told != is_stopped, heard
    assert left == []


def processes_of(sandbox: Sandbox) -> list[psutil.Process]:
    """What runs for sandboxes below this process, but for the template of quick starts."""
    below = psutil.Process().children(recursive=True)
    template = getattr(getattr(sandbox, "_template", None), "_process", None)
    spared = {template.pid} if template else set()
    return [
        process
        for process in below
        if process.pid not in spared and "code.inside" in " ".join(cmdline(process))
    ]


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def test_full_isolation_stops_every_escape() -> None:
    assert all(set(FULL) <= set(escape.stopped_by) for escape in ESCAPES)


def test_guide_has_the_table_of_escapes() -> None:
    guide = (ROOT / "docs" / "code_reward.md").read_text(encoding="utf-8")
    for escape in ESCAPES:
        cells = ["stopped" if level in escape.stopped_by else "**not**" for level in LEVELS]
        assert f"| {escape.name} | {' | '.join(cells)} |" in guide


@pytest.mark.parametrize("level", LEVELS)
def test_sandbox_keeps_nothing_of_a_program_for_the_next(level: Level) -> None:
    sandbox = sandbox_of(level)
    try:
        printed(sandbox, "open('left', 'w').write('x'); print('done')")
        heard = printed(sandbox, "import os; print(os.listdir('.'))")
    finally:
        sandbox.close()
    assert heard.output == b"[]\n"


@pytest.mark.parametrize("level", LEVELS)
def test_sandbox_gives_all_of_a_long_input_and_does_not_wait_for_who_ignores_it(
    level: Level,
) -> None:
    sandbox, text = sandbox_of(level), b"x" * 5_000_000
    try:
        reader = printed(sandbox, "import sys; print(len(sys.stdin.read()))", stdin=text)
        deaf = printed(sandbox, "print('done')", stdin=text)
    finally:
        sandbox.close()
    assert (reader.output, deaf.output) == (b"5000000\n", b"done\n")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("program", "exit_code"),
    [
        ("raise SystemExit(3)", 3),
        ("1 / 0", 1),
        ("import os; os._exit(0)", 0),
        ("import atexit; atexit.register(print, 'late')", 0),
        ("import threading; threading.Thread(target=print, args=('late',)).start()", 0),
    ],
)
def test_sandbox_tells_how_a_program_ended(level: Level, program: str, exit_code: int) -> None:
    sandbox = sandbox_of(level)
    try:
        heard = printed(sandbox, program)
    finally:
        sandbox.close()
    assert (heard.end, heard.exit_code) == ("exit", exit_code)
    assert heard.output == (b"late\n" if "late" in program else b"")


@pytest.mark.parametrize("level", LEVELS)
def test_sandbox_ends_a_program_that_kills_itself_with_a_code_that_is_not_0(level: Level) -> None:
    sandbox = sandbox_of(level)
    try:
        heard = printed(sandbox, "import os; os.kill(os.getpid(), 9)")
    finally:
        sandbox.close()
    assert (heard.end, heard.exit_code == 0) == ("exit", False)


def test_sandbox_serves_many_threads_at_once() -> None:
    sandbox, outputs = sandbox_of("namespaces"), dict[int, bytes]()

    def work(number: int) -> None:
        outputs[number] = printed(sandbox, f"print({number})").output

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sandbox.close()
    assert outputs == {number: f"{number}\n".encode() for number in range(12)}
