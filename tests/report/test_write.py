"""The files of a report: its numbers, and text that must not break it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from report.logs import make_log, without

from trl_grpo_ext.report import Example, library_versions, write_report
from trl_grpo_ext.report.markdown import MAX_EXAMPLE_CHARS
from trl_grpo_ext.report.plots import MAX_BARS

SUMMARY = {"accuracy_before": 0.25, "accuracy_after": 0.75, "num_eval_prompts": 64}
ALL_PLOTS = {"reward", "kl", "length", "grad_norm", "time"}


def report_text(folder: Path, **changes: object) -> str:
    arguments = {"summary": SUMMARY, "log_history": [], "settings": {"beta": 0.04}}
    return write_report(folder, **{**arguments, **changes}).read_text(encoding="utf-8")


# --- Numbers -------------------------------------------------------------------------------------


def test_write_report_headline_has_both_accuracies_n_and_intervals(tmp_path: Path) -> None:
    # 16 and 48 of 64: (p + z2/2n -+ z sqrt(p q / n + z2/4n2)) / (1 + z2/n) with z2 = 3.8415
    assert (
        "**Accuracy: 25.0% (16.0% to 36.8%) → 75.0% (63.2% to 84.0%)** on 64 held-out prompts"
        in report_text(tmp_path)
    )


def test_write_report_headline_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    only_after = report_text(tmp_path, summary={"accuracy_after": 0.5})
    assert "**Accuracy: 50.0%** on held-out prompts." in only_after
    assert "Accuracy:" not in report_text(tmp_path, summary={"accuracy_after": math.nan})


def test_write_report_compares_the_first_with_the_last_rewards(tmp_path: Path) -> None:
    text = report_text(tmp_path, log_history=make_log(4))  # windows of two
    assert "| reward | first 2 logged | last 2 logged | change |" in text
    assert "| `reward` | 0.15 | 0.35 | 0.2 |" in text
    assert "| `right_answer` | 0.45 | 1.05 | 0.6 |" in text


def test_write_report_windows_are_at_most_five_steps_and_skip_nan(tmp_path: Path) -> None:
    log = make_log(12)
    log[0]["reward"] = math.nan
    text = report_text(tmp_path, log_history=log)
    # eleven numbers, 0.2 to 1.2: the means of 0.2 to 0.6 and of 0.8 to 1.2
    assert "| `reward` | 0.4 | 1 | 0.6 |" in text
    assert "first 5 logged" in text


def test_summary_json_puts_the_result_first_and_nested_values_last(tmp_path: Path) -> None:
    summary = {"zeta": 1, "config": {"a": 1}, "minutes": 2.5, "accuracy_after": math.nan}
    report_text(tmp_path, summary=summary)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert list(found) == ["accuracy_after", "minutes", "zeta", "config", "versions"]
    assert found["accuracy_after"] is None  # NaN is not JSON
    assert found["versions"] == library_versions()


def test_summary_json_keeps_versions_that_are_given_and_converts_numpy_and_paths(
    tmp_path: Path,
) -> None:
    summary = {"versions": {"torch": "x"}, "steps": np.int64(3), "model": Path("a") / "b"}
    report_text(tmp_path, summary=summary)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found == {"model": "a/b", "steps": 3, "versions": {"torch": "x"}}


def test_write_report_leaves_no_temporary_file_and_replaces_an_older_report(
    tmp_path: Path,
) -> None:
    report_text(tmp_path / "new", summary={"steps": 1})
    report_text(tmp_path / "new", summary={"steps": 2})
    assert json.loads((tmp_path / "new" / "summary.json").read_text())["steps"] == 2
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"summary.json", "report.md", "plots"}


def test_report_module_imports_neither_trl_nor_transformers_nor_pyplot() -> None:
    code = (
        "import sys, trl_grpo_ext.report; "
        "print(sorted({'trl', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- Plots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 4, MAX_BARS + 1])
def test_write_report_draws_and_embeds_every_plot_when_all_is_logged(
    tmp_path: Path, num_steps: int
) -> None:
    text = report_text(tmp_path, log_history=make_log(num_steps))
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == ALL_PLOTS
    for name in ALL_PLOTS:
        assert f"](plots/{name}.png)" in text
        png = (tmp_path / "plots" / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG\r\n")
        assert int.from_bytes(png[16:20]) == 1275  # 8.5 inches at 150 dots


@pytest.mark.parametrize(
    ("prefixes", "name", "sentence"),
    [
        (("reward",), "reward", "Reward: not logged in this run."),
        (("kl",), "kl", "KL: not logged in this run."),
        (("completions/",), "length", "Completion length: not logged in this run."),
        (("grad_norm",), "grad_norm", "Gradient norm: not logged in this run."),
        (("time/", "step_time"), "time", "Time per step: not logged in this run."),
    ],
)
def test_write_report_says_why_instead_of_an_empty_plot_when_a_metric_is_missing(
    tmp_path: Path, prefixes: tuple[str, ...], name: str, sentence: str
) -> None:
    report_text(tmp_path, log_history=make_log())  # an earlier report had the plot
    log = make_log()
    for prefix in prefixes:
        log = without(log, prefix)
    text = report_text(tmp_path, log_history=log)
    assert sentence in text
    assert f"plots/{name}.png" not in text
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == ALL_PLOTS - {name}


def test_write_report_explains_a_missing_kl_by_beta_when_it_is_zero(tmp_path: Path) -> None:
    text = report_text(tmp_path, log_history=without(make_log(), "kl"), settings={"beta": 0.0})
    assert "KL: not logged, `beta` is 0" in text


def test_write_report_draws_nothing_when_nothing_but_nan_was_logged(tmp_path: Path) -> None:
    text = report_text(tmp_path, log_history=[{"step": 1, "kl": math.nan, "reward": None}])
    assert list((tmp_path / "plots").iterdir()) == []
    assert "## Rewards\n" not in text


# --- Text ----------------------------------------------------------------------------------------


def test_write_report_fences_completions_that_contain_fences(tmp_path: Path) -> None:
    evil = "```\n# heading\n````\n<script>"
    text = report_text(tmp_path, examples=[Example("p", "a", evil, "fine")])
    assert f"Before training:\n\n`````text\n{evil}\n`````\n\n" in text
    assert "After training:\n\n```text\nfine\n```\n" in text


def test_write_report_spells_out_characters_that_hide_or_turn_text(tmp_path: Path) -> None:
    text = report_text(
        tmp_path, examples=[Example("\x1b[31mred\r\n", "a", "a\u202eb\ud800", "tab\tstays")]
    )
    assert "\\x1b[31mred\\x0d\n" in text
    assert "a\\u202eb\\ud800" in text
    assert "tab\tstays" in text


def test_write_report_cuts_a_very_long_completion_and_says_so(tmp_path: Path) -> None:
    examples = [Example("p", "a", "x" * (MAX_EXAMPLE_CHARS + 7), "y" * MAX_EXAMPLE_CHARS)]
    text = report_text(tmp_path, examples=examples)
    assert "(7 more characters)" in text
    assert f"\n{'x' * MAX_EXAMPLE_CHARS}\n" in text
    assert text.count("more characters") == 1


def test_write_report_keeps_an_answer_on_one_line_whatever_is_in_it(tmp_path: Path) -> None:
    text = report_text(tmp_path, examples=[Example("p", "a`b\n# c|d", "x", "y")])
    assert "Expected answer: `` a`b\\n# c\\|d ``\n" in text


def test_write_report_settings_keep_their_table_whole_and_secrets_out(tmp_path: Path) -> None:
    settings = {
        "model": "a|b\nc",
        "hub_token": "hf_SECRET",
        "rewards": [{"name": "api", "api_key": "k-SECRET"}],
        "max_completion_tokens": 32,
        "learning_rate": 1e-06,
        "use_cpu": True,
        "run_name": None,
    }
    text = report_text(tmp_path, settings=settings)
    rows = text.split("## Settings\n\n")[1].split("\n\n")[0].splitlines()
    assert rows == [
        "| setting | value |",
        "| --- | --- |",
        "| `hub_token` | `(not shown)` |",
        "| `learning_rate` | 1e-06 |",
        "| `max_completion_tokens` | 32 |",
        "| `model` | `a\\|b\\nc` |",
        '| `rewards` | `[{"name": "api", "api_key": "(not shown)"}]` |',
        "| `run_name` | – |",
        "| `use_cpu` | True |",
    ]
    assert "SECRET" not in text


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("config.json", "AutoModelForCausalLM.from_pretrained(folder)"),
        ("adapter_config.json", "AutoPeftModelForCausalLM.from_pretrained(folder)"),
        ("other", "There was no model in this folder"),
    ],
)
def test_write_report_shows_how_to_load_what_is_in_the_folder(
    tmp_path: Path, file: str, expected: str
) -> None:
    (tmp_path / file).write_text("{}")
    text = report_text(tmp_path)
    assert expected in text
    if file != "other":
        snippet = text.split("```python\n")[1].split("```")[0]
        compile(snippet, "report.md", "exec")
        assert f"folder = {json.dumps(str(tmp_path))}" in snippet


def test_write_report_lists_the_files_with_their_sizes_and_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(3 * 2**20))
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "state").write_bytes(bytes(2048))
    (tmp_path / ".hidden").touch()
    text = report_text(tmp_path)
    assert "| `model.safetensors` | weights | 3 MiB |" in text
    assert "| `checkpoint-5` | checkpoint to resume from | 2 KiB |" in text
    assert ".hidden" not in text
