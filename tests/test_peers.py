"""A process that fails ends all of them: soon, cleanly, and with its cause told once.

The first part forks pairs of processes that only know ``torch.distributed``, without an agent that
would end the other one. All pairs run at once: they mostly wait. The second part is a run of the
trainer under torchrun.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trl_grpo_ext.peers import PEER_FAILED_EXIT_CODE, ending_together, peer_failed

PAIRS = '''
import json, os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from trl_grpo_ext.peers import ending_together, is_told_elsewhere, peer_failed

folder = Path(sys.argv[1])

class Agreed(SystemExit):
    pass

def wait_for_others():
    dist.all_reduce(torch.ones(1))

def train(rank, *, wrong, does=None, raises=None):
    """Process ``wrong`` does something else than the others, which wait for it."""
    with ending_together(grace_s=2.0):
        wait_for_others()
        if rank == wrong and raises is not None:
            raise raises
        if rank == wrong and does is not None:
            does()
        wait_for_others()

scenarios = []

def scenario(function):
    scenarios.append(function)
    return function

@scenario
def error_in_0(rank):
    train(rank, wrong=0, raises=ValueError("no such luck\\nat all"))

@scenario
def error_in_1(rank):
    train(rank, wrong=1, raises=ValueError("no such luck\\nat all"))

@scenario
def exit_of_1(rank):
    train(rank, wrong=1, does=lambda: os._exit(3))

@scenario
def kill_of_0(rank):
    train(rank, wrong=0, does=lambda: os.kill(os.getpid(), signal.SIGKILL))

@scenario
def kill_of_1(rank):
    train(rank, wrong=1, does=lambda: os.kill(os.getpid(), signal.SIGKILL))

@scenario
def kill_of_1_that_leaves_a_child(rank):
    def leave_a_child():
        if os.fork() == 0:
            assert not peer_failed()
            time.sleep(40)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    train(rank, wrong=1, does=leave_a_child)

@scenario
def sys_exit_in_1(rank):
    train(rank, wrong=1, does=lambda: sys.exit(5))

@scenario
def interrupt_of_1(rank):
    train(rank, wrong=1, raises=KeyboardInterrupt())

@scenario
def error_in_1_which_stays(rank):
    """As with NCCL, nothing breaks the collective of the other."""
    try:
        train(rank, wrong=1, raises=ValueError("no such luck"))
    finally:
        time.sleep(100)

@scenario
def error_in_1_while_0_works(rank):
    with ending_together(grace_s=2.0):
        wait_for_others()
        if rank == 1:
            raise ValueError("no such luck")
        while not peer_failed():
            time.sleep(0.01)
        (folder / "heard").touch()
        time.sleep(100)

@scenario
def error_in_1_when_0_is_done(rank):
    with ending_together(grace_s=2.0):
        wait_for_others()
        if rank == 1:
            time.sleep(1)
            raise ValueError("no such luck")
    time.sleep(100)

@scenario
def same_error_in_both(rank):
    with ending_together(grace_s=2.0):
        time.sleep(1.5 * rank)
        raise ValueError("no such luck")

@scenario
def same_error_in_both_caught(rank):
    for _ in range(2):
        try:
            same_error_in_both(rank)
        except ValueError as error:
            assert is_told_elsewhere(error) == (rank == 1)
    time.sleep(3)
    train(rank, wrong=None)
    assert not peer_failed()

@scenario
def agreed_exit(rank):
    with ending_together(grace_s=1.0, agreed=(Agreed,)):
        time.sleep(3 * rank)
        raise Agreed(143)

@scenario
def slow_1(rank):
    for _ in range(2):
        with ending_together(grace_s=0.5), ending_together(grace_s=0.5):
            time.sleep(1.5 * rank)
            wait_for_others()
            time.sleep(1.5 * rank)
    wait_for_others()

@scenario
def unreachable(rank):
    os.environ["MASTER_ADDR"] = "nobody.invalid"
    train(rank, wrong=None)

os.environ["MASTER_ADDR"] = "127.0.0.1"
pids, ended, start = {}, {}, time.monotonic()
for run in scenarios:
    for rank in (0, 1):
        name = run.__name__
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            os.dup2(os.open(folder / f"{name}.{rank}", os.O_CREAT | os.O_WRONLY), 2)
            store = f"file://{folder}/{name}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
            (folder / f"{name}.{rank}.started").touch()
            run(rank)
            sys.exit()
        pids[pid] = (name, rank)
while pids:
    pid, status = os.wait()
    name, rank = pids.pop(pid)
    seconds = time.time() - (folder / f"{name}.{rank}.started").stat().st_mtime
    text = (folder / f"{name}.{rank}").read_text()
    ended.setdefault(name, [None, None])[rank] = (os.waitstatus_to_exitcode(status), seconds, text)
(folder / "ended.json").write_text(json.dumps(ended))
'''

TRAIN = """
import os, sys, time, warnings
warnings.filterwarnings("ignore")
from datasets import Dataset
from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.peers import ending_together

model, out, way = sys.argv[1:]

class Trainer(ExtGRPOTrainer):
    def train(self, *args, **kwargs):
        with ending_together():
            return super().train(*args, **kwargs)

def judge(*, completions, trainer_state, **_):
    if trainer_state.global_step == 1 and os.environ["RANK"] == "1":
        with open(out, "w") as file:
            file.write(str(time.time()))
        if way == "exit":
            os._exit(3)
        raise RuntimeError("the judge is down")
    return [float(len(text)) for text in completions]

config = ExtGRPOConfig(
    out + "-run", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
    per_device_train_batch_size=4, num_generations=4, max_completion_length=8, max_steps=3,
)
trainer = Trainer(model, judge, config, Dataset.from_dict({"prompt": ["1 + 1"] * 8}))
trainer.train()
"""


@dataclass(frozen=True)
class Ended:
    code: int
    seconds: float
    text: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ended]]:
    """How both processes of each pair ended."""
    folder = tmp_path_factory.mktemp("pairs")
    script = folder / "script.py"
    script.write_text(PAIRS)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, folder], check=True, timeout=200, env=env)
    found: dict[str, list[Any]] = json.loads((folder / "ended.json").read_text())
    return {name: [Ended(*process) for process in both] for name, both in found.items()}


@pytest.mark.parametrize("failed", [0, 1])
def test_an_error_in_one_process_ends_both_and_stands_once(
    ended: dict[str, list[Ended]], failed: int
) -> None:
    both = ended[f"error_in_{failed}"]
    assert both[failed].code == 1
    assert both[1 - failed].code == PEER_FAILED_EXIT_CODE
    assert max(process.seconds for process in both) < 30
    assert both[failed].text.count("ValueError: no such luck") == 1
    other = 1 - failed
    line = f"process {failed} of 2 failed with ValueError; process {other} ends too\n"
    assert both[other].text == line


@pytest.mark.parametrize(
    ("name", "failed", "code"),
    [
        ("exit_of_1", 1, 3),
        ("kill_of_0", 0, -9),
        ("kill_of_1", 1, -9),
        ("kill_of_1_that_leaves_a_child", 1, -9),
    ],
)
def test_a_process_that_ends_without_a_word_ends_the_other(
    ended: dict[str, list[Ended]], name: str, failed: int, code: int
) -> None:
    dead, other = ended[name][failed], ended[name][1 - failed]
    assert (dead.code, other.code) == (code, PEER_FAILED_EXIT_CODE)
    assert other.seconds < 30
    told = f"process {failed} of 2 ended without a word (killed?); process {1 - failed} ends too\n"
    assert (dead.text, other.text) == ("", told)


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("sys_exit_in_1", 5, "failed with SystemExit(5)"),
        ("interrupt_of_1", -2, "failed with KeyboardInterrupt"),
    ],
)
def test_a_process_that_exits_or_is_interrupted_keeps_its_exit_code(
    ended: dict[str, list[Ended]], name: str, code: int, told: str
) -> None:
    other, exits = ended[name]
    assert (exits.code, other.code) == (code, PEER_FAILED_EXIT_CODE)
    assert other.text == f"process 1 of 2 {told}; process 0 ends too\n"


def test_a_process_is_ended_inside_a_collective_that_nothing_breaks(
    ended: dict[str, list[Ended]],
) -> None:
    other, stays = ended["error_in_1_which_stays"]
    assert (other.code, stays.code) == (PEER_FAILED_EXIT_CODE, 1)
    assert other.seconds < stays.seconds < 30  # not the 100 s for which it would stay
    assert other.text == "process 1 of 2 failed with ValueError; process 0 ends too\n"
    assert stays.text == "process 1 of 2 failed: ValueError: no such luck\n"  # had no traceback yet


def test_a_process_that_works_hears_of_the_failure_and_is_ended(
    ended: dict[str, list[Ended]],
) -> None:
    other, failed = ended["error_in_1_while_0_works"]
    assert (other.code, failed.code) == (PEER_FAILED_EXIT_CODE, 1)
    assert other.seconds < 30


def test_the_way_out_waits_for_the_others_so_a_late_failure_ends_all(
    ended: dict[str, list[Ended]],
) -> None:
    other, failed = ended["error_in_1_when_0_is_done"]
    assert (other.code, failed.code) == (PEER_FAILED_EXIT_CODE, 1)
    assert other.seconds < 30


def test_the_same_error_in_each_process_is_printed_once(ended: dict[str, list[Ended]]) -> None:
    first, second = ended["same_error_in_both"]
    assert (first.code, second.code) == (1, 1)
    assert first.text.count("ValueError: no such luck") == 1
    assert second.text == ""


@pytest.mark.parametrize(
    ("name", "code"), [("same_error_in_both_caught", 0), ("agreed_exit", 143), ("slow_1", 0)]
)
def test_what_is_no_failure_of_one_process_passes(
    ended: dict[str, list[Ended]], name: str, code: int
) -> None:
    assert [(process.code, process.text) for process in ended[name]] == [(code, ""), (code, "")]


def test_processes_that_cannot_be_reached_are_named_and_run_without_it(
    ended: dict[str, list[Ended]],
) -> None:
    first, second = ended["unreachable"]
    assert (first.code, second.code) == (0, 0)
    assert first.text.startswith("processes 0, 1 do not reach process 0 at nobody.invalid:")
    assert second.text == ""


def test_one_process_has_no_peers() -> None:
    with ending_together():
        assert not peer_failed()
    with pytest.raises(ValueError, match="luck"), ending_together():
        raise ValueError("no such luck")


def run_both(script: Path, *arguments: object, agent: bool) -> tuple[list[int], str]:
    """Exit codes and what was printed, under torchrun or as two processes that nobody watches."""
    command = [sys.executable, script, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    printed = script.with_suffix(".txt")
    with printed.open("w") as file:
        if agent:
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            started = [subprocess.Popen(command, stderr=file, env=env)]
        else:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = str(free.getsockname()[1])
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
            ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
            started = [subprocess.Popen(command, stderr=file, env=env | rank) for rank in ranks]
        codes = [process.wait(timeout=200) for process in started]
    return codes, printed.read_text()


@pytest.mark.parametrize(
    ("agent", "way", "codes"),
    [(True, "raise", [1]), pytest.param(False, "exit", [70, 3], marks=pytest.mark.slow)],
    ids=["torchrun", "no-agent"],
)
def test_a_reward_that_fails_in_one_process_ends_the_run(
    tiny_model_dir: Path, tmp_path: Path, agent: bool, way: str, codes: list[int]
) -> None:
    script, failed_at = tmp_path / "script.py", tmp_path / "failed"
    script.write_text(TRAIN)
    found, printed = run_both(script, tiny_model_dir, failed_at, way, agent=agent)
    assert time.time() - float(failed_at.read_text()) < 30
    assert found == codes
    how = {"raise": "failed with RuntimeError", "exit": "ended without a word (killed?)"}[way]
    assert printed.count(f"process 1 of 2 {how}; process 0 ends too\n") == 1
    assert printed.count("RuntimeError: the judge is down\n") == (way == "raise")
    assert "[rank0]" not in printed  # no traceback of the other process
