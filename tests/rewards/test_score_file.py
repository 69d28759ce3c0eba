"""`trl-grpo-ext score`: score_arguments.py, score_rows.py, score_file.py, score_show.py."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from trl_grpo_ext.cli import app
from trl_grpo_ext.errors import ConfigurationError, RewardError
from trl_grpo_ext.rewards.score_arguments import rewards_to_score, tokens_by
from trl_grpo_ext.rewards.score_file import (
    Scored,
    read_completions,
    score_completions,
    with_scores,
)
from trl_grpo_ext.rewards.score_rows import check_output, read_rows, write_rows
from trl_grpo_ext.rewards.score_show import (
    check_plot,
    examples,
    histogram,
    histogram_lines,
    print_scores,
    shortened,
)

ROWS = [
    {"prompt": "3 + 4?", "completion": "7", "answer": "7"},
    {"prompt": "1 + 1?", "completion": "3", "answer": "2"},
]
GROUPS = [
    {"prompt": "3 + 4?", "completions": ["7", "8"], "gold": 7},
    {"prompt": "1 + 1?", "completions": ["2"], "gold": 2},
]
MESSAGE = [{"role": "assistant", "content": "7"}]
RUN = CliRunner()


def jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def message_of(raised: pytest.ExceptionInfo[ConfigurationError]) -> str:
    [problem] = raised.value.problems
    return problem


# Files


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows_are_read_as_they_were_written(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": 'a "quoted", täglich\nline', "completion": "x" * 200_000}, *ROWS[:1]]
    rows[1] = {name: rows[1][name] for name in ("prompt", "completion")}
    path = tmp_path / f"rows{suffix}"
    write_rows(path, rows)
    assert read_rows(path) == rows


def test_rows_of_parquet_may_hold_lists(tmp_path: Path) -> None:
    Dataset.from_list(GROUPS).to_parquet(tmp_path / "groups.parquet")
    assert read_rows(tmp_path / "groups.parquet") == GROUPS


def test_csv_has_lists_as_json_and_nothing_as_an_empty_cell(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.csv", [{"a": [1.0, None], "b": None, "c": 0.5}])
    assert (tmp_path / "a.csv").read_bytes() == b'a,b,c\r\n"[1.0, null]",,0.5\r\n'


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.txt", "7", "is a file of an unknown kind, so it is open how to read it"),
        ("a.jsonl", '{"a": 1}\n{"a"\n', "cannot be read (line 2: Expecting"),
        ("a.json", "{", "cannot be read (Expecting"),
        ("a.json", '{"a": 1}', "holds no rows with named columns"),
        ("a.jsonl", "[1]\n", "holds no rows with named columns"),
        ("a.jsonl", "", "holds no rows with named columns"),
        ("a.csv", "a,b\n", "holds no rows with named columns"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "cannot be read (row 2 has more cells than the header)"),
        ("a.parquet", "no parquet", "cannot be read ("),
        ("a.jsonl", None, "cannot be read (No such file or directory)"),
        ("a.parquet", None, "cannot be read (there is no such file)"),
    ],
)
def test_read_rows_says_what_is_wrong_with_a_file(
    tmp_path: Path, name: str, content: str | None, found: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigurationError) as error:
        read_rows(tmp_path / name)
    assert f"`--data` {tmp_path / name} {found}" in message_of(error)


def test_check_output_refuses_what_could_not_be_written(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", ROWS)
    check_output(None, data=data)
    check_output(tmp_path / "b.csv", data=data)
    for path, found in {
        tmp_path / "b.txt": "of an unknown kind, so it is open how to write it",
        tmp_path / "no" / "b.csv": "cannot be written (there is no such folder)",
        tmp_path / "." / "a.jsonl": "cannot be written (it is the file that is scored)",
    }.items():
        with pytest.raises(ConfigurationError) as error:
            check_output(path, data=data)
        assert found in message_of(error)


# Completions


def test_read_completions_takes_groups_apart_with_their_columns() -> None:
    found = read_completions(GROUPS, answer_column="gold")
    assert found.row_of == [0, 0, 1]
    assert found.columns == {
        "prompts": ["3 + 4?", "3 + 4?", "1 + 1?"],
        "completions": ["7", "8", "2"],
        "gold": [7, 7, 2],
        "answer": [7, 7, 2],
    }


@pytest.mark.parametrize(
    ("cell", "completions"),
    [
        ("7", ["7"]),
        (MESSAGE, [MESSAGE]),
        ([MESSAGE, MESSAGE], [MESSAGE, MESSAGE]),
        (["7", MESSAGE], ["7", MESSAGE]),
    ],
)
def test_read_completions_tells_messages_from_several_completions(
    cell: object, completions: list[object]
) -> None:
    rows = [{"q": "?", "reply": cell}]
    found = read_completions(rows, prompt_column="q", completion_column="reply")
    assert found.texts == completions


def test_read_completions_leaves_out_columns_that_the_trainer_passes() -> None:
    found = read_completions([{"prompt": "?", "completion": "7", "trainer_state": 1}])
    assert set(found.columns) == {"prompts", "completions"}


@pytest.mark.parametrize(
    ("rows", "options", "found"),
    [
        ([{"completion": "7"}], {}, "no column 'prompt' (it has completion)"),
        ([{"prompt": "?", "reply": "7"}], {}, "no column 'completion' (it has prompt, reply)"),
        (ROWS, {"answer_column": "gold"}, "no column 'gold' (it has prompt, completion, answer)"),
        ([{"prompt": "?", "completion": None}], {}, "in 1 of 1 rows (the first is row 0)"),
        ([*ROWS, {"prompt": "?", "completion": [7]}], {}, "1 of 3 rows (the first is row 2)"),
        ([{"prompt": "?", "completions": []}], {}, "in 1 of 1 rows (the first is row 0)"),
    ],
)
def test_read_completions_says_what_is_not_there(
    rows: list[dict[str, Any]], options: dict[str, str], found: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        read_completions(rows, **options)
    assert found in message_of(error)


# Scores


def test_score_completions_calls_a_reward_as_the_trainer_does() -> None:
    seen: dict[str, Any] = {}

    def mine(*, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        seen.update(columns, prompts=prompts)
        columns["log_metric"]("chars", sum(map(len, completions)))
        columns["log_extra"]("notes", completions)
        return [1, None, float("nan")]

    found = read_completions(GROUPS)
    scored = score_completions(mine, found, token_ids=lambda texts: [[1]] * len(texts))
    assert (scored.name, scored.scores, scored.num_non_finite) == ("mine", [1.0, None, None], 1)
    assert scored.metrics == {"chars": 3.0}
    assert (seen["prompts"], seen["gold"]) == (["3 + 4?", "3 + 4?", "1 + 1?"], [7, 7, 2])
    assert (seen["completion_ids"], seen["trainer_state"].global_step) == ([[1]] * 3, 0)


def test_score_completions_awaits_an_asynchronous_reward() -> None:
    async def later(*, completions: list[str], **columns: object) -> list[float]:
        return [0.5 for _ in completions]

    assert score_completions(later, read_completions(ROWS)).scores == [0.5, 0.5]


def test_score_completions_says_which_column_a_reward_needs() -> None:
    def solved(*, completions: list[str], solution: list[str], **columns: object) -> list[float]:
        raise AssertionError

    with pytest.raises(ConfigurationError) as error:
        score_completions(solved, read_completions(ROWS))
    assert message_of(error) == (
        "reward 'solved' needs the columns solution, which the file does not have (it has answer, "
        "prompts, completions), so it cannot be called. Add the columns, name the gold answers "
        "with `--answer-column`, or correct the reward's arguments."
    )


def test_score_completions_refuses_what_is_no_list_of_scores() -> None:
    with pytest.raises(RewardError, match="returned 1 rewards, but 2 were expected"):
        score_completions(lambda **columns: [1.0], read_completions(ROWS))


def test_summary_counts_shares_of_what_was_scored() -> None:
    summary = Scored("mine", [0.0, 1.0, 1.0, 0.5, None], 1, seconds=0.5).summary()
    assert summary == {
        "reward": "mine",
        "completions": 5,
        "unscored": 1,
        "non_finite": 1,
        "mean": 0.625,
        "share_0": 0.25,
        "share_1": 0.5,
        "seconds": 0.5,
        "completions_per_second": 10.0,
        "metrics": {},
    }
    assert Scored("mine", [None]).summary()["mean"] is None


def test_with_scores_adds_a_column_beside_each_row() -> None:
    singles = with_scores(read_completions(ROWS), [Scored("mine", [1.0, None])])
    assert [row["score_mine"] for row in singles] == [1.0, None]
    assert [set(row) - {"score_mine"} for row in singles] == [set(row) for row in ROWS]
    groups = with_scores(read_completions(GROUPS), [Scored("mine", [1.0, 0.0, 0.5])])
    assert [row["score_mine"] for row in groups] == [[1.0, 0.0], [0.5]]


def test_with_scores_does_not_replace_a_column() -> None:
    rows = [{**row, "score_mine": 1.0} for row in ROWS]
    with pytest.raises(ConfigurationError, match="the rows already have score_mine"):
        with_scores(read_completions(rows), [Scored("mine", [1.0, 0.0])])


# What is shown


def test_histogram_has_a_bar_a_value_if_there_are_few() -> None:
    assert histogram([1.0, 0.0, None, 0.25, 1.0]) == [("0", 1), ("0.25", 1), ("1", 2)]
    assert histogram([None]) == []


def test_histogram_has_ten_ranges_otherwise() -> None:
    bars = histogram([at / 20 for at in range(21)])  # 0.0, 0.05, ..., 1.0: two each, the last three
    assert bars[0] == ("0 to 0.1", 2)
    assert bars[-1] == ("0.9 to 1", 3)
    assert len(bars) == 10


@given(st.lists(st.none() | st.floats(-10, 10), min_size=1))
def test_histogram_counts_every_score_once(scores: list[float | None]) -> None:
    assert sum(count for _, count in histogram(scores)) == sum(s is not None for s in scores)
    assert list(histogram_lines(scores))


def test_examples_are_the_best_and_the_worst_in_their_order() -> None:
    scores = [0.5, 1.0, None, 0.0, 1.0, 0.25]
    assert examples(scores, 2) == {"Best": [1, 4], "Worst": [3, 5]}
    assert examples(scores, 3) == {"Best": [1, 4, 0], "Worst": [3, 5]}
    assert examples([None], 3) == {}


@given(st.text())
def test_shortened_text_is_printable_and_short(text: str) -> None:
    shown = shortened(text * 3, num_characters=40)
    assert shown.isprintable()
    assert len(shown) <= 40 or len(text * 3) <= 40


def test_print_scores_shows_untrusted_completions_without_what_a_terminal_obeys() -> None:
    rows = [{"prompt": "?", "completion": "\x1b]0;title\x07[bold]\x9b31m[/]\r7 [link=evil]"}]
    out = io.StringIO()
    found = read_completions(rows)
    scored = Scored("mine[red]", [1.0], metrics={"[blue]\x1b": 2.0})
    print_scores([scored], found, Console(file=out, force_terminal=True, width=120))
    printed = out.getvalue()
    assert r"\x1b]0;title\x07[bold]\x9b31m[/]\r7 [link=evil]" in printed
    assert "mine[red]" in printed
    assert r"[blue]\x1b: 2" in printed
    assert "\x07" not in printed
    assert "\x1b]" not in printed


def test_check_plot_refuses_what_could_not_be_written(tmp_path: Path) -> None:
    check_plot(tmp_path / "a.png")
    for path in (tmp_path / "a.txt", tmp_path / "no" / "a.png"):
        with pytest.raises(ConfigurationError, match="is no picture in a folder that exists"):
            check_plot(path)


# What was typed


def test_rewards_are_named_with_their_arguments_in_order() -> None:
    first, second = rewards_to_score(
        reward=["number_distance", "last_number"], arguments=['{"span": 2}'], config=None
    )
    assert first(completions=["6"], answer=["7"]) == [0.5]
    assert second.__name__ == "last_number"


def test_rewards_come_from_the_yaml_of_a_recipe(tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text("rewards: [last_number, {name: format, arguments: {pattern: '7'}}]")
    rewards = rewards_to_score(reward=[], arguments=[], config=config)
    assert [reward.__name__ for reward in rewards] == ["last_number", "format"]


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ({}, "`--reward` and `--config`: neither of them is given"),
        ({"reward": ["a"], "config": Path("b")}, "`--reward` and `--config`: both of them is"),
        ({"arguments": ["{}"], "config": Path("b")}, "`--arguments` would have no effect beside"),
        ({"reward": ["a"], "arguments": ["{}", "{}"]}, "`--arguments` is given 2 times for 1"),
        ({"reward": ["format"], "arguments": ["secret"]}, "`--arguments` number 1 is not a JSON"),
        ({"reward": ["format"], "arguments": ["[1]"]}, "`--arguments` number 1 is not a JSON"),
        ({"reward": ["no_such"]}, "reward 'no_such' is not known"),
        ({"config": Path("no.yaml")}, "`--config` no.yaml is not the YAML of a recipe ([Errno 2]"),
    ],
)
def test_rewards_to_score_says_what_cannot_work(typed: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        rewards_to_score(**{"reward": [], "arguments": [], "config": None, **typed})
    assert found in message_of(error)
    assert "secret" not in message_of(error)


def test_a_yaml_without_rewards_is_no_recipe(tmp_path: Path) -> None:
    for text in ("[1]", "seed: 0", "rewards: last_number", "rewards: ["):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ConfigurationError, match="is not the YAML of a recipe"):
            rewards_to_score(reward=[], arguments=[], config=tmp_path / "a.yaml")


def test_tokens_are_those_of_the_tokenizer(tiny_model_dir: Path, tiny_tokenizer: Any) -> None:
    token_ids = tokens_by(str(tiny_model_dir))
    assert token_ids is not None
    wanted = tiny_tokenizer("3 + 4", add_special_tokens=False)["input_ids"]
    assert token_ids(["3 + 4", [{"role": "assistant", "content": "3 + 4"}]]) == [wanted, wanted]
    assert tokens_by(None) is None
    with pytest.raises(ConfigurationError, match="so tokens cannot be counted"):
        tokens_by("./no/such/folder")


# The command


def test_score_prints_a_table_a_histogram_and_examples(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", ROWS)
    typed = ["score", "--data", str(data), "--reward", "last_number"]
    result = RUN.invoke(app, typed, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["last_number", "2", "0.500", "0", "0.500", "0.500"] in [line[:6] for line in lines]
    assert ["1", "row", "0:", "7"] in lines
    assert ["0", "row", "1:", "3"] in lines


def test_score_writes_scores_and_a_picture(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", GROUPS)
    output, plot = tmp_path / "b.jsonl", tmp_path / "b.png"
    typed = ["--reward", "last_number", "--answer-column", "gold", "--json"]
    files = ["--data", str(data), "--output", str(output), "--plot", str(plot)]
    result = RUN.invoke(app, ["score", *files, *typed])
    assert result.exit_code == 0, result.output
    [summary] = json.loads(result.stdout)
    assert summary["reward"] == "last_number"
    assert (summary["completions"], summary["share_1"]) == (3, 2 / 3)
    assert [row["score_last_number"] for row in read_rows(output)] == [[1.0, 0.0], [1.0]]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_score_ends_with_what_is_wrong(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", [{"prompt": "?", "reply": "7"}])
    result = RUN.invoke(app, ["score", "--data", str(data), "--reward", "last_number"])
    assert result.exit_code == 1
    assert "error: the file has no column 'completion' (it has prompt, reply)" in result.stderr
