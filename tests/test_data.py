"""The task of a run: data_sources.py reads it, data_checks.py looks it over, data.py splits it."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict
from trl import TrlParser

from trl_grpo_ext.data import Task, TaskArguments, load_task, task_problems
from trl_grpo_ext.errors import ConfigurationError

ONE_DIGIT_SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.fixture(autouse=True)
def own_datasets_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("datasets_cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(path: Path, count: int = 6) -> str:
    """Write rows whose prompt is "question N" and whose answer is N."""
    return write_jsonl(path, [{"prompt": f"question {n}", "answer": n} for n in range(count)])


def questions(task_half: Dataset) -> list[str]:
    return [messages[-1]["content"] for messages in task_half["prompt"]]


def sums(**arguments: object) -> TaskArguments:
    return TaskArguments(
        dataset="reasoning_gym:chain_sum",
        dataset_arguments={**ONE_DIGIT_SUMS, "size": 3000},
        rewards=["last_number"],
        **arguments,
    )


def only_problem(arguments: TaskArguments) -> str:
    (problem,) = task_problems(arguments)
    return problem


def contents(task: Task) -> list[list[object]]:
    return [task.train.to_list(), task.held_out.to_list()]


# Splitting


def test_load_task_holds_out_by_text_when_generated_questions_repeat() -> None:
    task = load_task(sums(num_eval_prompts=64))
    train, held_out = set(questions(task.train)), set(questions(task.held_out))
    # Ten first terms, ten second terms, plus or minus: 200 questions, all of them in 3000 draws.
    assert (len(task.held_out), len(held_out)) == (64, 64)
    assert (len(task.train), len(train)) == (136, 136)
    assert not train & held_out


def test_load_task_gives_the_answer_of_each_question_when_generated() -> None:
    task = load_task(sums(num_eval_prompts=64))
    for row in [*task.train, *task.held_out]:
        expression = row["prompt"][0]["content"].removesuffix(" =").rsplit(": ", maxsplit=1)[-1]
        first, operator, second = expression.split()
        wanted = int(first) + int(second) if operator == "+" else int(first) - int(second)
        assert row["answer"] == str(wanted)


def test_load_task_leaves_the_answer_empty_when_a_generated_task_has_none() -> None:
    arguments = TaskArguments(dataset="reasoning_gym:rubiks_cube", dataset_arguments={"size": 2})
    assert load_task(arguments).train["answer"][:] == ["", ""]


def test_load_task_is_the_same_in_another_process() -> None:
    script = (
        "import json; from trl_grpo_ext.data import TaskArguments, load_task;"
        "task = load_task(TaskArguments(dataset='reasoning_gym:chain_sum', num_eval_prompts=5));"
        "print(json.dumps([task.train.to_list(), task.held_out.to_list()]))"
    )
    other = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    here = load_task(TaskArguments(dataset="reasoning_gym:chain_sum", num_eval_prompts=5))
    assert json.loads(other.stdout) == contents(here)


def test_load_task_shuffles_by_the_task_seed(tmp_path: Path) -> None:
    path = numbered(tmp_path / "data.jsonl", 50)
    in_order = [f"question {n}" for n in range(50)]
    first, again, other = (
        questions(load_task(TaskArguments(dataset=path, task_seed=seed)).train)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first not in (in_order, other)
    assert sorted(first) == sorted(other) == sorted(in_order)


def test_load_task_draws_the_questions_by_the_task_seed_when_generated() -> None:
    first, other = (
        load_task(TaskArguments(dataset="reasoning_gym:chain_sum", task_seed=seed)).train
        for seed in (1, 2_000_000)
    )
    assert set(questions(first)) != set(questions(other))


def test_load_task_counts_prompts_once_when_they_differ_in_white_space(tmp_path: Path) -> None:
    rows = [{"prompt": text, "answer": "1"} for text in ("a b", " a  b\n", "a b", "ab", "a  c")]
    task = load_task(TaskArguments(dataset=write_jsonl(tmp_path / "data.jsonl", rows)))
    assert sorted(questions(task.train)) == ["a  c", "a b", "ab"]


def test_load_task_takes_as_many_as_asked_for(tmp_path: Path) -> None:
    path = numbered(tmp_path / "data.jsonl", 10)
    task = load_task(TaskArguments(dataset=path, num_train_prompts=3, num_eval_prompts=4))
    assert (len(task.train), len(task.held_out)) == (3, 4)
    assert len({*questions(task.train), *questions(task.held_out)}) == 7


def test_load_task_holds_out_nothing_by_default(tmp_path: Path) -> None:
    task = load_task(TaskArguments(dataset=numbered(tmp_path / "data.jsonl")))
    assert (len(task.train), len(task.held_out)) == (6, 0)
    assert task.held_out.features == task.train.features


def test_load_task_holds_out_from_the_evaluation_split_what_training_never_has(
    tmp_path: Path,
) -> None:
    numbered(tmp_path / "train.jsonl", 6)
    numbered(tmp_path / "test.jsonl", 9)  # questions 6, 7 and 8 are new
    arguments = {"dataset": str(tmp_path), "eval_dataset_split": "test", "num_train_prompts": 2}
    task = load_task(TaskArguments(**arguments))
    assert len(task.train) == 2
    assert set(questions(task.held_out)) == {"question 6", "question 7", "question 8"}
    assert sorted(task.held_out["answer"]) == ["6", "7", "8"]
    assert len(load_task(TaskArguments(**arguments, num_eval_prompts=2)).held_out) == 2


# Rows


def test_load_task_makes_messages_and_texts_of_gsm8k_like_rows(tmp_path: Path) -> None:
    rows = [
        {"question": "How many clips?", "answer": "48/2 = 24\n48+24 = 72\n#### 72", "level": 3},
        {"question": "How much?", "answer": "#### 1,000 ", "level": 4},
    ]
    task = load_task(
        TaskArguments(
            dataset=write_jsonl(tmp_path / "gsm8k.jsonl", rows),
            prompt_column="question",
            answer_pattern="#### (.+)",
            system_prompt="Think first.",
            prompt_template="Q: {prompt} {x}",
        )
    )
    clips, much = sorted(task.train, key=lambda row: row["level"])
    assert clips == {
        "prompt": [
            {"role": "system", "content": "Think first."},
            {"role": "user", "content": "Q: How many clips? {x}"},
        ],
        "answer": "72",
        "level": 3,
    }
    assert much["answer"] == "1,000"


def test_load_task_keeps_a_conversation_as_it_is(tmp_path: Path) -> None:
    asked = {"role": "user", "content": "2 + 2?"}
    own = {"role": "system", "content": "own"}
    rows = [{"prompt": [asked], "answer": 4}, {"prompt": [own, asked], "answer": 5}]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    plain = load_task(TaskArguments(dataset=path)).train
    assert sorted(plain.to_list(), key=lambda row: row["answer"]) == [
        {"prompt": [asked], "answer": "4"},
        {"prompt": [own, asked], "answer": "5"},
    ]
    with_system = load_task(TaskArguments(dataset=path, system_prompt="set")).train
    assert sorted(with_system.to_list(), key=lambda row: row["answer"]) == [
        {"prompt": [{"role": "system", "content": "set"}, asked], "answer": "4"},
        {"prompt": [own, asked], "answer": "5"},
    ]


def test_load_task_drops_the_columns_that_trl_would_pass_twice(tmp_path: Path) -> None:
    row = {"prompt": "a", "gold": None, "answer": "old", "completions": "b", "completion": "c"}
    path = write_jsonl(tmp_path / "data.jsonl", [{**row, "hint": "d"}])
    task = load_task(TaskArguments(dataset=path, answer_column="gold"))
    assert task.train.to_list() == [
        {"prompt": [{"role": "user", "content": "a"}], "answer": "", "hint": "d"}
    ]
    without = load_task(TaskArguments(dataset=path, answer_column=None))
    assert without.train.column_names == ["prompt", "gold", "hint"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_load_task_reads_a_local_file(tmp_path: Path, suffix: str) -> None:
    source = Dataset.from_dict({"prompt": ["a", "b"], "answer": [1, 2]})
    path = str(tmp_path / f"data{suffix}")
    write = {".parquet": source.to_parquet, ".csv": source.to_csv}.get(suffix, source.to_json)
    write(path)
    task = load_task(TaskArguments(dataset=path))
    assert sorted(task.train["answer"]) == ["1", "2"]


def test_load_task_reads_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    one, two = (Dataset.from_dict({"prompt": [text], "answer": ["1"]}) for text in "ab")
    one.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": one, "test": two}).save_to_disk(str(tmp_path / "both"))
    assert questions(load_task(TaskArguments(dataset=str(tmp_path / "one"))).train) == ["a"]
    both = TaskArguments(dataset=str(tmp_path / "both"), eval_dataset_split="test")
    assert questions(load_task(both).held_out) == ["b"]


def test_load_task_passes_dataset_arguments_on_when_the_source_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("prompt;answer\na;1\n")
    arguments = TaskArguments(
        dataset=str(tmp_path / "data.csv"), dataset_arguments={"delimiter": ";"}
    )
    assert load_task(arguments).train["answer"][:] == ["1"]


# Arguments


def test_task_arguments_are_parsed_from_yaml_and_from_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "dataset: reasoning_gym:chain_sum\n"
        "dataset_arguments: {size: 9, min_terms: 2}\n"
        "num_eval_prompts: 3\n"
        "rewards: [last_number, {name: format, weight: 0.5, arguments: {pattern: a}}]\n"
    )
    (parsed,) = TrlParser([TaskArguments]).parse_args_and_config(
        ["--config", str(config), "--task_seed", "7"]
    )
    assert parsed == TaskArguments(
        dataset="reasoning_gym:chain_sum",
        dataset_arguments={"size": 9, "min_terms": 2},
        num_eval_prompts=3,
        task_seed=7,
        rewards=["last_number", {"name": "format", "weight": 0.5, "arguments": {"pattern": "a"}}],
    )
    command = ["--dataset", "d", "--dataset_arguments", '{"size": 9}', "--rewards", "a", "m:b"]
    (parsed,) = TrlParser([TaskArguments]).parse_args_and_config(command)
    assert parsed == TaskArguments(dataset="d", dataset_arguments={"size": 9}, rewards=["a", "m:b"])


def test_task_arguments_take_a_single_reward_without_a_list() -> None:
    assert TaskArguments(dataset="d", rewards="last_number").rewards == ["last_number"]


# Problems


def test_task_problems_is_empty_when_all_is_well(tmp_path: Path) -> None:
    path = numbered(tmp_path / "data.jsonl")
    assert task_problems(TaskArguments(dataset=path, rewards=["last_number"])) == []


def test_task_problems_names_the_columns_when_one_is_missing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": "a", "solution": "b"}])
    assert task_problems(TaskArguments(dataset=path, rewards=["last_number"])) == [
        "`prompt_column`='prompt' is not a column of the dataset, so its rows cannot be used. Set "
        "`prompt_column` to one of: question, solution.",
        "`answer_column`='answer' is not a column of the dataset, so its rows cannot be used. Set "
        "`answer_column` to one of: question, solution.",
    ]


def test_task_problems_reports_settings_data_and_rewards_at_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": "a", "answer": "b"}])
    problems = task_problems(
        TaskArguments(
            dataset=path,
            dataset_arguments="[1]",
            prompt_template="no placeholder",
            num_train_prompts=0,
            num_eval_prompts=-1,
            answer_pattern="(",
            rewards=["unknown", "other"],
        )
    )
    starts = (
        "`dataset_arguments`='[1]' is not a mapping, so it cannot be passed on. Write",
        "`prompt_template`='no placeholder' does not hold {prompt}, so the model would never",
        "`num_train_prompts`=0 is below 1, so the data cannot be split. Set `num_train_prompts`",
        "`num_eval_prompts`=-1 is below 0, so the data cannot be split. Set `num_eval_prompts`",
        "`answer_pattern`='(' is not a regular expression (missing ), unterminated subpattern",
        "`prompt_column`='prompt' is not a column",
        "reward 'unknown' is not known",
        "reward 'other' is not known",
    )
    assert len(problems) == len(starts)
    for problem, start in zip(problems, starts, strict=True):
        assert problem.startswith(start)


def test_task_problems_suggests_close_names_when_the_generated_task_is_unknown() -> None:
    arguments = TaskArguments(dataset="reasoning_gym:chain_sums", rewards=["last_number"])
    problem = only_problem(arguments)
    assert problem.startswith(
        "`dataset`='reasoning_gym:chain_sums' names no task of reasoning-gym, so no question can "
        "be drawn. Set it to one of its "
    )
    assert "such as chain_sum" in problem


def test_task_problems_names_the_extra_when_reasoning_gym_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert only_problem(sums()) == (
        "`dataset`='reasoning_gym:chain_sum' needs reasoning-gym, which is not installed, so no "
        "question can be drawn. Run: pip install reasoning-gym gguf"
    )


def test_task_problems_names_the_options_when_a_generated_task_does_not_know_one() -> None:
    arguments = TaskArguments(
        dataset="reasoning_gym:chain_sum",
        dataset_arguments={"digits": 1, "min_terms": 2},
        rewards=["last_number"],
    )
    assert only_problem(arguments) == (
        "`dataset_arguments` holds digits, which the reasoning-gym task 'chain_sum' does not "
        "accept, so no question can be drawn. It accepts allow_negation, max_digits, max_terms, "
        "min_digits, min_terms, seed, size."
    )


def test_task_problems_passes_on_what_a_generated_task_refuses() -> None:
    arguments = TaskArguments(
        dataset="reasoning_gym:chain_sum",
        dataset_arguments={"min_terms": 5, "max_terms": 2},
        rewards=["last_number"],
    )
    assert only_problem(arguments) == (
        "the reasoning-gym task 'chain_sum' refused {'seed': 42, 'min_terms': 5, 'max_terms': 2} "
        "(AssertionError: max_terms must be >= min_terms), so no question can be drawn. Correct "
        "`dataset_arguments`."
    )


def test_task_problems_refuses_splits_when_the_task_is_generated() -> None:
    assert only_problem(sums(eval_dataset_split="test")) == (
        "`dataset_split` and `eval_dataset_split` ask for train, test, but a reasoning-gym task "
        "has no splits. Leave both out, and set `num_eval_prompts` to hold prompts out."
    )


@pytest.mark.parametrize(
    ("task", "hash_seed", "refused"),
    [
        ("codeio", "0", True),
        ("ransom_note", None, True),
        ("ransom_note", "random", True),
        ("ransom_note", "0", False),
        ("chain_sum", None, False),
    ],
)
def test_task_problems_refuses_a_generated_task_that_differs_between_processes(
    monkeypatch: pytest.MonkeyPatch, task: str, hash_seed: str | None, refused: bool
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if hash_seed is not None:
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
    arguments = TaskArguments(
        dataset=f"reasoning_gym:{task}", dataset_arguments={"size": 3}, rewards=["last_number"]
    )
    problems = task_problems(arguments)
    assert any("draws other questions in every process" in p for p in problems) == refused
    assert any("PYTHONHASHSEED=0" in p for p in problems) == (refused and task != "codeio")


def test_task_problems_says_so_when_a_file_is_not_there() -> None:
    assert only_problem(TaskArguments(dataset="absent.parquet", rewards=["last_number"])) == (
        "`dataset`='absent.parquet' does not exist, so there are no prompts. Set `dataset` to a "
        "file or folder that is there, 'reasoning_gym:TASK', or a name on the Hub."
    )
    problem = only_problem(TaskArguments(dataset="./absent", rewards=["last_number"]))
    assert problem.startswith("`dataset`='./absent' does not exist")


def test_task_problems_names_the_kinds_of_file_when_the_suffix_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "data.xyz"
    path.touch()
    assert only_problem(TaskArguments(dataset=str(path), rewards=["last_number"])) == (
        f"`dataset`='{path}' is a file of an unknown kind, so it cannot be read. Set `dataset` to "
        "a file that ends in one of .jsonl, .json, .parquet, .csv."
    )


def test_task_problems_says_why_when_the_source_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": ')
    assert "could not be loaded with the split 'train' (DatasetGeneration" in only_problem(
        TaskArguments(dataset=str(broken), rewards=["last_number"])
    )
    path = numbered(tmp_path / "data.jsonl")
    assert "(ValueError: Unknown split" in only_problem(
        TaskArguments(dataset=path, dataset_split="validation", rewards=["last_number"])
    )
    assert "(TypeError: " in only_problem(
        TaskArguments(dataset=path, dataset_arguments={"streaming": True}, rewards=["last_number"])
    )


def test_task_problems_says_why_when_the_hub_is_not_to_be_reached() -> None:
    problem = only_problem(TaskArguments(dataset="some/dataset", rewards=["last_number"]))
    assert problem.startswith(
        "`dataset`='some/dataset' could not be loaded with the split 'train' ("
    )
    assert problem.endswith("or, without a network, set `dataset` to a local file.")


def test_task_problems_counts_distinct_prompts_when_too_few_are_there() -> None:
    assert only_problem(sums(num_eval_prompts=64, num_train_prompts=137)) == (
        "`dataset`='reasoning_gym:chain_sum' leaves 136 distinct prompts to train on "
        "(`num_train_prompts`: 137) and 64 to hold out (`num_eval_prompts`: 64); prompts with the "
        "same text count once, and none may be in both sets. Lower one of the two, or draw or add "
        "more rows (`size` in `dataset_arguments` for a reasoning-gym task)."
    )
    assert task_problems(sums(num_eval_prompts=64, num_train_prompts=136)) == []
    assert "leaves 0 distinct prompts to train on (`num_train_prompts`: all) and 200" in (
        only_problem(sums(num_eval_prompts=200))
    )


def test_task_problems_says_so_when_the_evaluation_split_holds_nothing_new(tmp_path: Path) -> None:
    numbered(tmp_path / "train.jsonl", 6)
    numbered(tmp_path / "test.jsonl", 6)
    arguments = TaskArguments(
        dataset=str(tmp_path), eval_dataset_split="test", rewards=["last_number"]
    )
    assert "and 0 to hold out (`num_eval_prompts`: 0)" in only_problem(arguments)


@pytest.mark.parametrize("prompt", ["  ", None, [], [{"text": "a"}]])
def test_task_problems_names_the_row_when_it_holds_no_prompt(
    tmp_path: Path, prompt: object
) -> None:
    good = [{"role": "user", "content": "a"}] if isinstance(prompt, list) else "a"
    rows = [{"prompt": value, "answer": "1"} for value in (good, prompt)]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    assert only_problem(TaskArguments(dataset=path, rewards=["last_number"])) == (
        "the column 'prompt' holds neither a text nor messages with a role in 1 of 2 rows (the "
        "first is row 1), so there is nothing to ask. Remove these rows, or set `prompt_column` "
        "to another column."
    )


def test_task_problems_refuses_a_template_when_the_prompts_are_conversations(
    tmp_path: Path,
) -> None:
    row = {"prompt": [{"role": "user", "content": "a"}], "answer": "1"}
    arguments = TaskArguments(
        dataset=write_jsonl(tmp_path / "data.jsonl", [row]),
        prompt_template="Q: {prompt}",
        rewards=["last_number"],
    )
    assert only_problem(arguments) == (
        "`prompt_template`='Q: {prompt}' is set, but the column 'prompt' holds conversations, "
        "which are kept as they are. Leave `prompt_template` out, or set `prompt_column` to a "
        "column of texts."
    )


def test_task_problems_counts_the_answers_when_the_pattern_is_not_in_them(tmp_path: Path) -> None:
    answers = ["#### 1", "2", None]
    rows = [{"prompt": f"q{n}", "answer": answer} for n, answer in enumerate(answers)]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    arguments = TaskArguments(dataset=path, answer_pattern="#### (.+)", rewards=["last_number"])
    assert only_problem(arguments) == (
        "`answer_pattern`='#### (.+)' is not found in 2 of 3 rows (the first is row 1), so "
        "these have no answer. Correct `answer_pattern`, or remove the rows."
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer_pattern": "#### .+"}, "`answer_pattern`='#### .+' has no group in parentheses"),
        ({"answer_pattern": "(.+)", "answer_column": None}, "but `answer_column` is null, so"),
    ],
)
def test_task_problems_refuses_a_pattern_that_extracts_nothing(
    tmp_path: Path, settings: dict[str, str | None], message: str
) -> None:
    path = numbered(tmp_path / "data.jsonl")
    pattern = [{"name": "format", "arguments": {"pattern": "a"}}]
    assert message in only_problem(TaskArguments(dataset=path, rewards=pattern, **settings))


def test_task_problems_names_the_columns_when_a_reward_needs_another(tmp_path: Path) -> None:
    path = numbered(tmp_path / "data.jsonl")
    reward = {"name": "last_number", "arguments": {"answer_column": "gold"}}
    assert only_problem(TaskArguments(dataset=path, rewards=[reward])) == (
        "reward 'last_number' needs the columns gold, which the task does not have (it has "
        "prompt, answer; the `answer_column` is renamed to answer), so it cannot be called. Add "
        "the columns to the dataset, or correct the reward's `arguments`."
    )


def test_task_problems_reports_a_missing_column_once_when_two_splits_lack_it(
    tmp_path: Path,
) -> None:
    numbered(tmp_path / "train.jsonl")
    numbered(tmp_path / "test.jsonl")
    arguments = TaskArguments(
        dataset=str(tmp_path),
        eval_dataset_split="test",
        prompt_column="question",
        rewards=["last_number"],
    )
    assert only_problem(arguments).startswith("`prompt_column`='question' is not a column")


def test_load_task_raises_the_problems_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as error:
        load_task(TaskArguments(dataset=numbered(tmp_path / "data.jsonl"), prompt_column="x"))
    assert error.value.problems == [
        "`prompt_column`='x' is not a column of the dataset, so its rows cannot be used. Set "
        "`prompt_column` to one of: prompt, answer."
    ]


# Choosing by the answer


def test_load_task_keeps_only_answers_that_match_as_a_whole() -> None:
    everything = load_task(sums())
    task = load_task(sums(keep_answers=r"\d+", num_eval_prompts=64))
    # Of 200 questions, the 45 with a smaller first digit in a subtraction have a negative result.
    assert everything.train.num_rows == 200
    assert (task.train.num_rows, task.held_out.num_rows) == (91, 64)
    assert not any("-" in answer for answer in [*task.train["answer"], *task.held_out["answer"]])
    assert not set(questions(task.train)) & set(questions(task.held_out))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_answers": "("}, "`keep_answers` is '(', which is not a regular expression"),
        ({"keep_answers": "1", "answer_column": None}, "`answer_column` is null"),
    ],
)
def test_task_problems_names_a_choice_that_cannot_be_made(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    path = numbered(tmp_path / "data.jsonl")
    assert message in "\n".join(task_problems(TaskArguments(dataset=path, **arguments)))


def test_the_quickstart_holds_out_64_prompts_that_training_never_sees() -> None:
    path = Path(__file__).parents[1] / "recipes" / "configs" / "quickstart.yaml"
    keys = yaml.safe_load(path.read_text())
    known = TaskArguments.__dataclass_fields__
    task = load_task(TaskArguments(**{k: v for k, v in keys.items() if k in known}))
    assert task.held_out.num_rows == 64
    assert len(set(questions(task.held_out))) == 64
    assert not set(questions(task.train)) & set(questions(task.held_out))
