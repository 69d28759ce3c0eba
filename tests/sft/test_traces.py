"""What is imitated: turns of conversations, or the solutions of a task's own questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig

from trl_grpo_ext.data import TaskArguments
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.sft.options import SFTArguments, sft_problems
from trl_grpo_ext.sft.solvers import sums
from trl_grpo_ext.sft.traces import Traces, load_questions, load_traces, make_traces, solved_rows


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def says(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


def replies(text: str) -> dict[str, str]:
    return says(text, "assistant")


def task(tmp_path: Path, **changes: Any) -> TaskArguments:
    rows = [
        {"prompt": f"{a} + 1 - 2 =", "answer": f"{a} and one\n#### {a - 1}"} for a in range(3, 9)
    ]
    return TaskArguments(
        dataset=write(tmp_path / "rows.jsonl", rows),
        answer_pattern="#### (.+)",
        **{"num_eval_prompts": 2, "rewards": ["last_number"], **changes},
    )


def traces(tmp_path: Path, options: SFTArguments, **changes: Any) -> Traces:
    return make_traces(options, load_questions(task(tmp_path, **changes)))


def test_solutions_of_the_column_fill_the_template(tmp_path: Path) -> None:
    columns = {"solution_column": "answer", "solution_pattern": r"(?s)(.*?)\s*####"}
    found = traces(tmp_path, SFTArguments(), **columns, system_prompt="Think.")
    assert found.rows.num_rows == 4
    for row in found.rows:
        system, question = row["prompt"]
        assert system == says("Think.", "system")
        a = int(question["content"].split()[0])
        reply = f"<think>\n{a} and one\n</think>\n<answer>{a - 1}</answer>"
        assert row["completion"] == [replies(reply)]


def test_a_solver_writes_solutions_of_training_questions_alone(tmp_path: Path) -> None:
    options = SFTArguments(solver="sums", reply_template="{solution} // {answer}", num_traces=3)
    found = traces(tmp_path, options)
    questions = load_questions(task(tmp_path))
    held_out = {row["prompt"][0]["content"] for row in questions.held_out}
    assert found.rows.num_rows == 3
    for row in found.rows:
        text = row["prompt"][0]["content"]
        assert text not in held_out
        a = int(text.split()[0])
        solution = f"{a} + 1 = {a + 1}\n{a + 1} - 2 = {a - 1} // {a - 1}"
        assert row["completion"] == [replies(solution)]
    of_held_out = solved_rows(questions.held_out, options)
    assert {row["prompt"][0]["content"] for row in of_held_out} == held_out


def test_questions_without_a_solution_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_solver.py").write_text(
        "def odd_only(text):\n    return text if int(text.split()[0]) % 2 else None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = traces(tmp_path, SFTArguments(solver="own_solver:odd_only"), num_eval_prompts=0)
    assert (found.rows.num_rows, found.num_unsolved) == (3, 3)
    assert str(found) == "3 traces; 3 left out: no solution"


def test_each_assistant_turn_is_a_row_with_all_before_it_as_its_prompt(tmp_path: Path) -> None:
    talk = [says("Be brief.", "system"), says("a"), replies("A"), says("b"), replies("B")]
    options = SFTArguments(traces=write(tmp_path / "t.jsonl", [{"messages": talk}]))
    rows = make_traces(options, load_questions(TaskArguments())).rows.to_list()
    assert sorted(rows, key=lambda row: len(row["prompt"])) == [
        {"prompt": talk[:2], "completion": [talk[2]]},
        {"prompt": talk[:4], "completion": [talk[4]]},
    ]


def test_turns_of_a_given_prompt_are_not_imitated(tmp_path: Path) -> None:
    prompt = [says("a"), replies("A"), says("b")]
    rows = [{"prompt": prompt, "completion": [replies("B")]}]
    options = SFTArguments(traces=write(tmp_path / "t.jsonl", rows))
    found = make_traces(options, load_questions(TaskArguments())).rows.to_list()
    assert found == [{"prompt": prompt, "completion": [replies("B")]}]
    texts = [{"prompt": "a", "completion": "A"}]
    options = SFTArguments(traces=write(tmp_path / "u.jsonl", texts))
    found = make_traces(options, load_questions(TaskArguments())).rows.to_list()
    assert found == [{"prompt": [says("a")], "completion": [replies("A")]}]


def test_traces_of_held_out_questions_are_left_out(tmp_path: Path) -> None:
    arguments = task(tmp_path)
    questions = load_questions(arguments)
    asked = questions.held_out[0]["prompt"][0]["content"]
    rows = [
        {"messages": [says(f"  {asked.replace(' ', '  ')}"), replies("1")]},
        {"messages": [says("something else"), replies("2")]},
    ]
    options = SFTArguments(traces=write(tmp_path / "t.jsonl", rows))
    found = make_traces(options, questions)
    assert [row["completion"] for row in found.rows] == [[replies("2")]]
    assert str(found) == "1 traces; 1 left out: the question is held out"


def test_a_held_out_question_earlier_in_a_talk_or_without_its_template_counts(
    tmp_path: Path,
) -> None:
    arguments = task(tmp_path, prompt_template="Sum: {prompt} Reply.")
    questions = load_questions(arguments)
    asked = questions.held_out[0]["prompt"][0]["content"]
    bare = asked.removeprefix("Sum: ").removesuffix(" Reply.")
    rows = [
        {"messages": [says(bare), replies("1"), says("again"), replies("1")]},
        {"messages": [says(f"{asked} And why?"), replies("2")]},
    ]
    options = SFTArguments(traces=write(tmp_path / "t.jsonl", rows))
    found = make_traces(options, questions, template=arguments.prompt_template)
    assert [row["completion"] for row in found.rows] == [[replies("2")]]
    assert found.num_held_out == 2


def test_notes_are_taken_out_of_solutions(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "48/2=<<48/2=24>>24\n#### 24"}]
    arguments = TaskArguments(
        dataset=write(tmp_path / "g.jsonl", rows),
        answer_pattern="#### (.+)",
        solution_column="answer",
        solution_pattern=r"(?s)(.*?)\s*####",
    )
    options = SFTArguments(remove_from_solutions="<<.*?>>", reply_template="{solution}")
    found, _ = load_traces(options, arguments)
    assert found.rows[0]["completion"] == [replies("48/2=24")]


@pytest.mark.parametrize(
    ("training", "options", "message"),
    [
        ({"eval_strategy": "steps", "eval_steps": 1}, {"traces": "t"}, "`eval_strategy` is set"),
        ({"resume_from_checkpoint": "nowhere"}, {"solver": "sums"}, "which is not a folder"),
        (
            {"chat_template_path": "x.jinja"},
            {"solver": "sums", "opens_think": True},
            "`opens_think` and `chat_template_path` are set",
        ),
        (
            {"push_to_hub": True, "hub_strategy": "all_checkpoints"},
            {"solver": "sums"},
            "`hub_strategy` is 'all_checkpoints', but",
        ),
        ({"packing": True, "max_length": None}, {"solver": "sums"}, "`packing` is on"),
    ],
)
def test_problems_of_the_training(
    tmp_path: Path, training: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **training)
    found = list(sft_problems(task(tmp_path), SFTArguments(**options), args))
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "has neither a column messages nor prompt and completion"),
        ({"messages": [{"role": "user"}]}, "holds no conversation in row 0"),
        ({"messages": [says("a"), {"role": "assistant", "content": [1]}]}, "in row 0"),
        ({"messages": [says("a")]}, "no trace is left"),
    ],
)
def test_what_is_no_conversation_is_refused(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    options = SFTArguments(traces=write(tmp_path / "t.jsonl", [row]))
    with pytest.raises(ConfigurationError, match=message):
        make_traces(options, load_questions(TaskArguments()))


def test_traces_that_are_not_there_are_named_by_their_option(tmp_path: Path) -> None:
    options = SFTArguments(traces=str(tmp_path / "absent.jsonl"))
    with pytest.raises(ConfigurationError, match=r"^`traces`=.*absent.jsonl' does not exist"):
        make_traces(options, load_questions(TaskArguments()))


def test_a_dataset_that_rejection_sampling_wrote_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    row = {"prompt": [says("a")], "completion": [replies("A")], "reward": 1.0, "model": "m"}
    Dataset.from_list([row, row]).to_parquet(folder / "train.parquet")
    found = make_traces(SFTArguments(traces=str(folder)), load_questions(TaskArguments()))
    assert found.rows.to_list() == [{"prompt": [says("a")], "completion": [replies("A")]}] * 2


def test_sums_writes_a_line_a_step() -> None:
    assert sums("How much is 12 - 3 + 4?") == "12 - 3 = 9\n9 + 4 = 13"
    assert sums("no sum") is None


def problems(tmp_path: Path, options: SFTArguments, **changes: Any) -> list[str]:
    return list(sft_problems(task(tmp_path, **changes), options))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {}, "none of `traces`, `solver` and `solution_column` is set"),
        ({"solver": "sums", "traces": "x.jsonl"}, {}, "`traces` and `solver` are set"),
        ({"solver": "sum"}, {}, "`solver` is 'sum', which is no function"),
        ({"solver": "os:sep"}, {}, "`solver` is 'os:sep', which is no function"),
        ({"solver": "sums", "reply_template": "{answer}"}, {}, "does not hold {solution}"),
        ({"solver": "sums", "num_traces": 0}, {}, "`num_traces` is 0"),
        ({"solver": "sums", "remove_from_solutions": "["}, {}, "`remove_from_solutions` is '['"),
        ({"solver": "sums", "temperature": 0.0}, {}, "`temperature` is 0.0"),
        ({}, {"solution_column": "answer", "solution_pattern": "x"}, "has no group"),
        ({}, {"solution_column": "steps"}, "`solution_column`='steps' is not a column"),
    ],
)
def test_problems_name_what_cannot_work(
    tmp_path: Path, changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    found = problems(tmp_path, SFTArguments(**changes), **arguments)
    assert any(message in problem for problem in found), found


def test_nothing_to_train_on_is_a_problem() -> None:
    (problem,) = sft_problems(TaskArguments(), SFTArguments())
    assert "neither `dataset` nor `traces` is set" in problem
