"""What is read from a run's folder, and what is said where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report.html_runs import make_rows, write_completions, write_run
from report.logs import make_log

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.metrics_file import FILE
from trl_grpo_ext.report import write_report
from trl_grpo_ext.report.web.completions import MAX_CHARS, as_messages, as_step, as_text
from trl_grpo_ext.report.web.run_folder import METRICS, read_runs


def test_metrics_are_read_from_the_file_that_training_writes() -> None:
    assert METRICS == FILE


def test_half_written_line_is_skipped_and_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "rew')
    (run,) = read_runs([folder], max_completions=0)
    assert run.history.logged("kl") == [0.01] * 4
    (note,) = run.notes
    assert note.startswith("1 line of metrics.jsonl could not be read, so the page goes without")


def test_newest_checkpoint_has_the_history_where_there_is_no_file(tmp_path: Path) -> None:
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"log_history": [{"step": step, "reward": float(step)}]}
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps(state))
    (run,) = read_runs([tmp_path], max_completions=0)
    assert run.history.logged("reward") == [10.0]
    assert run.notes == ["There is no metrics.jsonl: curves end at checkpoint-10."]


def test_an_empty_file_of_metrics_hides_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    state = {"log_history": [{"step": 5, "reward": 0.5}]}
    (tmp_path / "checkpoint-5/trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "metrics.jsonl").touch()
    (run,) = read_runs([tmp_path], max_completions=0)
    assert run.history.logged("reward") == [0.5]
    assert run.notes == ["metrics.jsonl holds nothing: curves end at checkpoint-5."]


@pytest.mark.parametrize("history", [None, 5, {"a": 1}, [5, None]])
def test_a_history_that_is_none_is_empty(tmp_path: Path, history: object) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    state = json.dumps({"log_history": history})
    (tmp_path / "checkpoint-5/trainer_state.json").write_text(state)
    (run,) = read_runs([tmp_path], max_completions=0)
    assert run.history.values == {}


def test_numbers_beyond_every_float_are_left_out(tmp_path: Path) -> None:
    huge = int("9" * 400)
    log = [{"step": 1, "reward": huge}, {"step": huge, "reward": 1.0}, {"step": 2, "reward": 0.5}]
    (run,) = read_runs([write_run(tmp_path, log=log)], max_completions=0)
    assert run.history.logged("reward") == [0.5]


def test_what_holds_itself_or_is_nested_deeply_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder / "stage.yaml").write_text("a: &x [*x]\n")
    (folder / "summary.json").write_text('{"a": ' + "[" * 900 + "]" * 900 + "}")
    (run,) = read_runs([folder], max_completions=0)
    assert run.settings == {}
    assert any("settings cannot be read" in note for note in run.notes)


def test_secrets_in_a_stage_are_not_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    settings = {
        "token": "abc",
        "hf_token": "abc",
        "key": "abc",
        "bearer": "abc",
        "url": "https://host/v1?api_key=abc",
        "login": "https://u:p@abc@host",
        "slash": "https://user:pa/abc@host",
        "command": "run --token=abc --api-key abc",
        "text": "hf_abcabcabcabcabcabcabc",
        "max_tokens": 7,
        "token_env": "HF_TOKEN",
    }
    (folder / "stage.yaml").write_text(json.dumps(settings))
    (run,) = read_runs([folder], max_completions=0)
    assert "abc" not in str(run.settings)
    assert (run.settings["max_tokens"], run.settings["token_env"]) == (7, "HF_TOKEN")


def test_a_damaged_last_file_lets_no_more_completions_in(tmp_path: Path) -> None:
    folder = write_run(tmp_path, steps={step: make_rows(step) for step in range(1, 10)})
    (folder / "completions/completions_00010.parquet").write_text("cut off")
    (run,) = read_runs([folder], max_completions=12)
    assert run.completions.num_completions <= 12


def test_prompts_are_counted_before_groups_are_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path, steps={1: make_rows(1, texts="abcdefgh")})  # of four prompts
    (run,) = read_runs([folder], max_completions=4)
    assert run.completions.num_completions == 4
    assert run.completions.num_prompts == 4
    assert run.completions.num_cut_steps == 1


def test_unreadable_files_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps={1: make_rows(1), 3: make_rows(3)})
    (folder / "completions/completions_00002.parquet").write_text("no parquet")
    (folder / "summary.json").write_text("{")
    (run,) = read_runs([folder], max_completions=100)
    assert [step.step for step in run.completions.steps] == [1, 3]
    assert any("completions_00002.parquet cannot be read" in note for note in run.notes)
    assert any("summary.json cannot be read" in note for note in run.notes)


def test_folders_without_a_run_are_all_named_at_once(tmp_path: Path) -> None:
    write_run(tmp_path / "outputs/first")
    with pytest.raises(ConfigurationError) as raised:
        read_runs([tmp_path / "gone", tmp_path / "outputs"], max_completions=0)
    missing, empty = raised.value.problems
    assert f"{tmp_path / 'gone'} is not a folder, so there is no run to report." in missing
    assert "Name the `output_dir` of a run" in missing
    assert "holds none of summary.json, metrics.jsonl" in empty
    assert empty.endswith("Name runs in it, such as first.")


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / parent / "run") for parent in "ab"]
    assert [run.name for run in read_runs(folders, max_completions=0)] == ["a/run", "b/run"]
    twice = read_runs([folders[0], folders[0]], max_completions=0)
    assert len({run.name for run in twice}) == 2


def test_settings_are_those_of_the_report_without_secrets(tmp_path: Path) -> None:
    settings = {"beta": 0.02, "pattern": "a|`b`", "hub_token": "hf_secret", "flag": True}
    write_report(tmp_path, summary={"seed": 1}, log_history=make_log(), settings=settings)
    (run,) = read_runs([tmp_path], max_completions=0)
    assert run.settings == {
        "beta": "0.02",
        "pattern": "a|`b`",
        "flag": "True",
        "hub_token": "(not shown)",
    }


def test_settings_of_a_stage_are_shown_without_secrets(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "stage.yaml").write_text(
        "beta: 0.1\nrewards:\n- {api_key: sk-secret, base_url: 'https://me:pw@host/v1'}\n"
    )
    (run,) = read_runs([folder], max_completions=0)
    (reward,) = run.settings["rewards"]
    assert reward == {"api_key": "(not shown)", "base_url": "https://(not shown)@host/v1"}


def test_completions_are_those_of_evenly_spaced_steps(tmp_path: Path) -> None:
    steps = {step: make_rows(step) for step in range(1, 10)}
    (run,) = read_runs([write_run(tmp_path / "run", steps=steps)], max_completions=13)
    assert [step.step for step in run.completions.steps] == [1, 5, 9]
    assert (run.completions.num_completions, run.completions.num_logged_steps) == (12, 9)
    assert run.completions.num_prompts == 2


def test_two_runs_share_the_number_of_completions(tmp_path: Path) -> None:
    steps = {step: make_rows(step) for step in range(1, 5)}
    folders = [write_run(tmp_path / name, steps=steps) for name in "ab"]
    runs = read_runs(folders, max_completions=16)
    assert [run.completions.num_completions for run in runs] == [8, 8]


def test_groups_are_neighbours_with_the_same_prompt_and_are_left_whole() -> None:
    step = as_step(make_rows(5), most=4)
    assert [list(group.texts) for group in step.groups] == [["a", "b"], ["c", "d"]]
    assert step.groups[1].scores == [[2.0, 0.5], [3.0, 1.5]]
    assert step.columns == ["right_answer", "advantage"]
    assert [list(group.texts) for group in as_step(make_rows(5), most=3).groups] == [["a", "b"]]
    assert len(as_step(make_rows(5), most=1).groups) == 1


def test_columns_of_text_are_not_scores_and_missing_scores_stay_missing() -> None:
    rows = [dict(row, judged="yes", right_answer=None) for row in make_rows(1)]
    step = as_step(rows, most=10)
    assert step.extra_columns == ["judged"]
    assert step.groups[0].extras == [["yes"], ["yes"]]
    assert step.groups[0].scores[0] == [None, -1.5]


def test_messages_and_their_parts_become_text() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    assert as_messages([{"role": "user", "content": parts}]) == [("user", "[image]what is it?")]
    assert as_text([{"role": "assistant", "content": "4"}]) == "4"
    told = [{"role": "assistant", "content": "call"}, {"role": "tool", "content": "4"}]
    assert as_text(told) == "[assistant]\ncall\n\n[tool]\n4"
    assert as_text(None) == ""


def test_long_texts_are_cut_and_say_so() -> None:
    assert as_text("x" * (MAX_CHARS + 7)) == "x" * MAX_CHARS + "\n… (7 more characters)"


def test_stages_are_read_in_their_order(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r1", summary={"accuracy": {"base": 0.1}})
    for name in ("rejection", "grpo", "sft", "checkpoint-4", "evaluation"):
        write_run(folder / name)
    (run,) = read_runs([folder], max_completions=0)
    assert [stage.name for stage in run.stages] == ["sft", "grpo", "rejection"]


def test_run_without_completions_says_nothing_of_them(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run")], max_completions=10)
    assert run.completions.num_logged_steps == 0
    write_completions(tmp_path / "run", {1: make_rows(1)})
    (run,) = read_runs([tmp_path / "run"], max_completions=0)
    assert (run.completions.num_logged_steps, run.completions.num_completions) == (1, 0)
