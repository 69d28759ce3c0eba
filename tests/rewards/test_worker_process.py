"""What the worker processes of rewards have in common; more in math/test_workers.py."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
from pathlib import Path

import pytest

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.worker_process import (
    OutOfTimeError,
    Work,
    WorkerDiedError,
    WorkerProcess,
)

JOBS = """
import os, signal, time

def prepare():
    print("this is no reply")

def verdict(word, number):
    if word == "interrupt":
        os.kill(os.getppid(), signal.SIGUSR1)
        time.sleep(0.5)
    if word == "crash": os._exit(1)
    if word == "hang": time.sleep(600)
    if word == "memory": bytearray(2**31)
    if word == "print": print("nor is this")
    return os.environ.get(word, number)
"""


def work(tmp_path: Path, **changes: object) -> Work:
    (tmp_path / "jobs.py").write_text(JOBS)
    names = {"does": "counts", "scores": "sum", "package": "abacus", "extra": "sums"}
    return Work(module=tmp_path / "jobs.py", memory_bytes=2**30, **names, **changes)  # type: ignore[arg-type]


def test_a_job_gets_the_reply_of_the_module(tmp_path: Path) -> None:
    process = WorkerProcess[object](work(tmp_path))
    assert process.ask("add", "\n\ud800", limit_s=60) == "\n\ud800"
    assert process.ask("print", None, limit_s=60) is None
    process.close()


@pytest.mark.parametrize(
    ("word", "limit_s", "error"),
    [
        ("hang", 0.3, OutOfTimeError),
        ("add", 0.0, OutOfTimeError),
        ("crash", 60.0, WorkerDiedError),
        ("memory", 60.0, WorkerDiedError),
    ],
)
def test_a_job_that_fails_says_how_and_the_next_one_is_done(
    tmp_path: Path, word: str, limit_s: float, error: type[Exception]
) -> None:
    process = WorkerProcess[object](work(tmp_path))
    process.start()
    with pytest.raises(error):
        process.ask(word, "1", limit_s=limit_s)
    assert process.ask("add", "2", limit_s=60) == "2"
    process.close()


def test_the_reply_to_an_interrupted_job_is_not_taken_for_the_next_one(tmp_path: Path) -> None:
    process = WorkerProcess[object](work(tmp_path))
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        process.ask("interrupt", "1", limit_s=60)
    signal.signal(signal.SIGUSR1, before)
    assert process.ask("add", "2", limit_s=60) == "2"
    process.close()


def test_a_process_sees_the_variables_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "secret")
    few, all_of_them = work(tmp_path, variables=("PATH",)), work(tmp_path)
    for given, seen in ((few, "1"), (all_of_them, "secret")):
        process = WorkerProcess[object](given)
        assert process.ask("KEY", "1", limit_s=60) == seen
        process.close()


def _ask_in_child(process: WorkerProcess[object], found: multiprocessing.SimpleQueue[int]) -> None:
    assert process.ask("add", "2", limit_s=60) == "2"
    found.put(process.start().pid)
    process.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_fork_starts_a_process_of_its_own_and_leaves_ours_alone(tmp_path: Path) -> None:
    """Also where a thread was just asking whether ours still runs, so that the fork cannot ask."""
    process = WorkerProcess[object](work(tmp_path))
    ours = process.start()
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    with ours._waitpid_lock:  # type: ignore[attr-defined]
        child = context.Process(target=_ask_in_child, args=(process, found))
        child.start()
    child.join(60)
    assert child.exitcode == 0
    assert found.get() != ours.pid
    assert process.ask("add", "1", limit_s=60) == "1"
    assert process.start() is ours
    process.close()


def test_a_process_that_does_not_start_says_how_to_see_why(tmp_path: Path) -> None:
    broken = WorkerProcess[object](work(tmp_path))
    (tmp_path / "jobs.py").write_text("import no_such_module")
    with pytest.raises(RewardError) as error:
        broken.start()
    assert str(error.value) == (
        "the process that counts ended or hung at its start within 120 s, so no sum can be "
        f"scored. Run `{' '.join(broken.command)} < /dev/null` to see why; abacus comes with "
        "pip install 'trl-grpo-ext[sums]'."
    )
    seen = subprocess.run(
        broken.command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert "No module named 'no_such_module'" in seen.stderr


def test_a_process_ends_itself_when_nobody_is_there_to_end_it(tmp_path: Path) -> None:
    """After its seconds and one more, as the trainer that was killed cannot."""
    with subprocess.Popen(
        work(tmp_path).command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write(json.dumps(["hang", "1", 0.2]) + "\n")
        process.stdin.flush()
        assert process.wait(60) < 0
