"""Comparisons that take too long, crash or eat the memory lose their own row only."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.math.reward import MathReward
from trl_grpo_ext.rewards.math.workers import Worker, WorkerPool
from trl_grpo_ext.rewards.worker_process import OutOfTimeError, WorkerDiedError

# A worker that does as it is told: the gold answer is what it runs.
OBEDIENT = """
import json, sys, time, os, signal
print("ready", flush=True)
for line in sys.stdin:
    command = json.loads(line)[0]
    if command == "hang": time.sleep(600)
    if command == "crash": os.abort()
    if command == "exit": sys.exit(3)
    if command == "chatter": print("what?", flush=True)
    print({"none": "null", "no": "false"}.get(command, "true"), flush=True)
"""
TOWER = r"\boxed{9^{9^{9^{9^{9}}}}}"


@pytest.fixture
def worker() -> Worker:
    return Worker([sys.executable, "-c", OBEDIENT])


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_worker_answers_in_three_ways(worker: Worker) -> None:
    assert [worker.ask(word, "", limit_s=60) for word in ("yes", "no", "none")] == [
        True,
        False,
        None,
    ]
    worker.close()


def test_worker_that_runs_forever_is_ended_and_the_next_question_answered(worker: Worker) -> None:
    process = worker.start()
    start = time.monotonic()
    with pytest.raises(OutOfTimeError):
        worker.ask("hang", "", limit_s=0.5)
    assert time.monotonic() - start < 30
    assert process.poll() is not None
    assert worker.ask("yes", "", limit_s=60) is True
    worker.close()


@pytest.mark.parametrize("command", ["crash", "exit", "chatter"])
def test_worker_that_dies_or_talks_nonsense_is_replaced(worker: Worker, command: str) -> None:
    with pytest.raises(WorkerDiedError):
        worker.ask(command, "", limit_s=60)
    assert worker.ask("yes", "", limit_s=60) is True
    worker.close()


def test_worker_without_time_left_is_not_asked(worker: Worker) -> None:
    with pytest.raises(OutOfTimeError):
        worker.ask("yes", "", limit_s=0)


def test_worker_that_does_not_start_says_how_to_see_why() -> None:
    with pytest.raises(RewardError, match=r"no expression can be scored.*-c raise SystemExit"):
        Worker([sys.executable, "-c", "raise SystemExit"]).start()


def test_pool_loses_only_the_rows_that_fail() -> None:
    pool = WorkerPool(2, command=[sys.executable, "-c", OBEDIENT])

    def ask(worker: Worker, word: str) -> object:
        worker.start()
        try:
            return worker.ask(word, "", limit_s=2)
        except (OutOfTimeError, WorkerDiedError) as error:
            return type(error)

    jobs = ["yes", "crash", "no", "hang", "exit", "yes", "none", "no"]
    expected = [True, WorkerDiedError, False, OutOfTimeError, WorkerDiedError, True, None, False]
    assert pool.map(ask, jobs) == expected
    pool.close()


def test_reward_starts_no_process_until_an_expression_is_compared() -> None:
    before = children()
    reward = MathReward()
    assert reward(completions=["72", "{1, 2}"], answer=["72", "2, 1"]) == [1.0, 1.0]
    assert children() == before
    assert reward(completions=[r"\boxed{x+1}"], answer=["1+x"]) == [1.0]
    assert children() > before
    reward.close()
    assert children() == before


def test_reward_ends_its_processes_when_it_is_collected() -> None:
    before = children()
    reward = MathReward()
    reward(completions=[r"\boxed{x+1}"], answer=["1+x"])
    del reward
    gc.collect()
    assert children() == before


def test_reward_scores_the_others_when_a_power_tower_runs_out_of_time() -> None:
    reward, logged = MathReward(time_limit_s=3.0, num_workers=1), {}
    scores = reward(
        completions=[TOWER, r"\boxed{1024}", TOWER, r"\boxed{2^{11}}", "none"],
        answer=["2^{10}"] * 5,
        log_metric=logged.__setitem__,
    )
    assert scores == [0.0, 1.0, 0.0, 0.0, 0.0]
    lost = logged["rewards/math/timeouts_fraction"] + logged["rewards/math/crashes_fraction"]
    assert lost in (0.0, 2 / 5)  # refused by the memory limit within the worker, or ended
    assert reward(completions=[r"\boxed{32^2}"], answer=["2^{10}"]) == [1.0]
    reward.close()


def test_reward_leaves_out_a_gold_answer_that_cannot_be_compared() -> None:
    reward, logged = MathReward(time_limit_s=3.0), {}
    golds = [r"\frac{1}{0} + x", r"x^{", "2\\sqrt{3}"]
    scores = reward(completions=[r"\boxed{x}"] * 3, answer=golds, log_metric=logged.__setitem__)
    assert scores == [None, None, 0.0]
    assert logged == {
        "rewards/math/unparsable_gold_fraction": 2 / 3,
        "rewards/math/timeouts_fraction": 0.0,
        "rewards/math/crashes_fraction": 0.0,
    }
    reward.close()


def test_worker_memory_is_limited() -> None:
    command = Worker().command
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    soft, hard = psutil.Process(process.pid).rlimit(psutil.RLIMIT_AS)
    assert soft == hard == int(command[-1])
    process.communicate("")  # its input ends, and so does it
    assert process.returncode == 0


def test_worker_ends_when_the_trainer_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "train.py"  # without `if __name__ == "__main__"`, as people write them
    script.write_text(
        "import os, signal, psutil\n"
        "from trl_grpo_ext.rewards.math import MathReward\n"
        "print('imported', flush=True)\n"
        "reward = MathReward(num_workers=1)\n"
        "assert reward(completions=['x+1'], answer=['1+x']) == [1.0]\n"
        "print(psutil.Process().children()[0].pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    first, pid = run.stdout.split()
    assert first == "imported"
    deadline = time.monotonic() + 30
    while psutil.pid_exists(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(int(pid))


def _score_in_child(reward: MathReward, scores: multiprocessing.SimpleQueue[object]) -> None:
    scores.put(reward(completions=[r"\boxed{x+1}"], answer=["1+x"]))
    scores.put(len(children()))
    reward.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_forked_process_gets_workers_of_its_own_and_leaves_ours_alone() -> None:
    reward = MathReward(num_workers=1)
    reward(completions=[r"\boxed{x+1}"], answer=["1+x"])
    ours = children()
    context = multiprocessing.get_context("fork")
    scores = context.SimpleQueue()
    child = context.Process(target=_score_in_child, args=(reward, scores))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert scores.get() == [1.0]
    assert scores.get() == 1
    assert ours <= children()
    assert reward(completions=[r"\boxed{x+1}"], answer=["1+x"]) == [1.0]
    reward.close()


def test_reward_can_be_copied_and_pickled() -> None:
    reward = MathReward(log_as="maths", answer_column="gold", num_workers=1)
    reward(completions=[r"\boxed{x+1}"], gold=["1+x"])
    for twin in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert twin.__name__ == "maths"
        assert twin(completions=[r"\boxed{x+2}"], gold=["2+x"]) == [1.0]
        twin.close()
    reward.close()


def test_no_reply_runs_python(tmp_path: Path) -> None:
    target = tmp_path / "hacked"
    code = f"__import__('pathlib').Path('{target}').touch()"
    replies = [code, f"x + {code}", rf"\text{{{code}}}", f"sqrt({code})", f"f({code})"]
    replies = [rf"\boxed{{{reply}}}" for reply in replies] + [
        f"<answer>{r}</answer>" for r in replies
    ]
    reward = MathReward()
    assert reward(completions=replies, answer=["x + 1"] * len(replies)) == [0.0] * len(replies)
    worker = Worker()
    for reply in (code, rf"x + {code}", rf"\operatorname{{{code}}}"):  # and past our own reading
        assert worker.ask(reply, "x", limit_s=60) is not True
    assert not target.exists()
    worker.close()
    reward.close()
