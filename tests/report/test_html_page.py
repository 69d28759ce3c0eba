"""The page as HTML: well formed, fetching nothing, holding what the runs hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.html_runs import Page, make_rows, write_run
from report.logs import make_log, without
from typer.testing import CliRunner

from trl_grpo_ext.cli import app
from trl_grpo_ext.report import write_report
from trl_grpo_ext.report.web import write_web_report
from trl_grpo_ext.report.web.markup import data_block, document, prose, table, text
from trl_grpo_ext.report.web.run_folder import read_runs
from trl_grpo_ext.report.web.tables import settings_that_differ

HOSTILE = "</script><img src=x onerror=alert(1)> & \u202e \x00 \u2028"
SUMMARY = {
    "accuracy_before": 0.25,
    "accuracy_after": 0.5,
    "num_eval_prompts": 64,
    "steps": 4,
    "minutes": 2.5,
}


def page_of(*folders: Path, **options: Any) -> Page:
    html = write_web_report(folders, output=folders[0] / "page.html", **options).read_text()
    page = Page(html)
    assert page.open == []
    return page


def titles(page: Page) -> list[str]:
    return [chart["title"] for chart in page.data["charts"]]


# Markup ------------------------------------------------------------------------------------------


@given(
    st.recursive(
        st.text() | st.floats(allow_nan=False, allow_infinity=False), lambda inner: st.lists(inner)
    )
)
def test_data_reads_back_and_holds_no_markup(data: Any) -> None:
    block = data_block("d", {"x": data})
    inside = block[block.index(">") + 1 : block.rindex("<")]
    assert not set("<>&") & set(inside)
    assert inside.isascii()
    assert Page(block).data == {"x": data}


@given(st.text())
def test_text_is_one_text_whatever_it_says(value: str) -> None:
    page = Page(f"<p>{text(value)}</p><p>{prose(value)}</p>{table(['x'], [[value]])}")
    assert page.open == []
    assert {tag for tag, _ in page.tags} <= {
        "p",
        "code",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
    }
    text(value).encode()  # no half of a pair of surrogates


def test_page_runs_its_own_script_and_fetches_nothing() -> None:
    page = Page(document("t", "", style="p{}", script="f()"))
    (policy,) = [a["content"] for tag, a in page.tags if "http-equiv" in a]
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    # sha256 of "f()" and of "p{}", from `printf ... | openssl dgst -sha256 -binary | base64`
    assert rules["script-src"] == "'sha256-GcEEE0IkDzIP5EQ6DXZaDPORqT5RTBELX8Fyzyg9yvo='"
    assert rules["style-src"] == "'sha256-gG2yISYereRMiG2lMXrbiUgi0Ubw9p7QCeWcroOvy9Y='"


# One run -----------------------------------------------------------------------------------------


def test_page_of_a_run_has_every_subject(tmp_path: Path) -> None:
    log = [
        {**entry, "completions/clipped_ratio": 0.5, "frac_reward_zero_std": 0.25, "num_tokens": 90}
        if "reward" in entry
        else entry
        for entry in make_log()
    ]
    log += [{"step": 4, "eval_accuracy": 0.5, "eval_pass@2": 0.75, "reference/kl_floor": 0.003}]
    page = page_of(write_run(tmp_path, log=log, summary=SUMMARY, steps={4: make_rows(4)}))
    assert titles(page) == [
        "Accuracy before and after",
        "Evaluation",
        "Reward",
        "Reward by component, before its weight",
        "Silent groups (zero variance)",
        "Completion length",
        "Truncated completions",
        "KL from the reference",
        "Gradient norm before clipping",
        "Time of a step",
        "Throughput",
    ]
    charts = {chart["title"]: chart for chart in page.data["charts"]}
    assert [line["name"] for line in charts["Evaluation"]["lines"]] == ["accuracy", "pass@2"]
    assert charts["KL from the reference"]["levels"][0]["value"] == 0.003
    (length,) = charts["Completion length"]["lines"]
    assert (length["low"], length["high"]) == ([10.0] * 4, [30.0] * 4)
    # Wilson for 32 of 64, as in the docstring of `wilson_interval`
    ends = charts["Accuracy before and after"]["lines"][0]
    assert (ends["x"], ends["y"]) == ([0, 4], [0.25, 0.5])
    assert (ends["low"][1], ends["high"][1]) == pytest.approx((0.381, 0.619), abs=5e-4)
    (run,) = page.data["completions"]
    assert run["steps"][0]["groups"][1]["texts"] == ["c", "d"]


def test_what_is_not_there_is_said_in_words(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, log=without(make_log(), "kl")))
    said = " ".join(page.text("li", "code"))
    for words in ("No KL was logged", "eval_strategy: steps", "log_completions: true"):
        assert words in said
    assert page.data["completions"] == []


def test_unhealthy_metrics_stand_in_a_table(tmp_path: Path) -> None:
    log = [{"step": step, "kl": kl} for step, kl in enumerate([0.1, 1.5, 0.2, 3.0])]
    page = page_of(write_run(tmp_path, log=log))
    cells = page.text("td")
    assert cells[:2] == ["2 of 4 logs", "3"]
    assert "kl" in page.text("th")


def test_page_escapes_what_the_run_says(tmp_path: Path) -> None:
    log = [{"step": 1, f"rewards/{HOSTILE}/mean": 1.0, "reward": 1.0}]
    rows = make_rows(1, texts=[HOSTILE] * 4)
    folder = write_run(tmp_path / "a <b> & c", log=log, summary={HOSTILE: HOSTILE}, steps={1: rows})
    page = page_of(folder)
    assert {"img"} & {tag for tag, _ in page.tags} == set()
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "a <b> & c" in page.text("h1")
    assert page.data["completions"][0]["steps"][0]["groups"][0]["texts"][0] == HOSTILE
    shown = [cell for cell in page.text("td") if "onerror" in cell]
    assert shown == [
        HOSTILE.replace("\u202e", r"\u202e").replace("\0", r"\x00").replace("\u2028", r"\u2028")
    ]


def test_page_fetches_nothing(tmp_path: Path) -> None:
    html = write_web_report([write_run(tmp_path, summary=SUMMARY)]).read_text()
    assert not re.search(
        r"""\b(?:src|href)\s*=\s*["'](?!#)|url\(|@import|\bfetch\(|XMLHttp""", html
    )


def test_completions_that_are_left_out_are_said(tmp_path: Path) -> None:
    steps = {step: make_rows(step) for step in range(1, 10)}
    folder = write_run(tmp_path, steps=steps)
    said = "".join(page_of(folder, max_completions=8).text("li", "code"))
    assert "2 of 9 logged steps are on this page, evenly spaced, with 8 completions." in said
    assert "logged steps" not in "".join(page_of(folder).text("li"))


def test_groups_that_are_left_out_are_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path, steps={1: make_rows(1, texts="abcdefgh")})
    said = "".join(page_of(folder, max_completions=4).text("li", "code"))
    assert "Of 1 of these steps only the first groups are here." in said


def test_health_of_a_stage_is_told_but_not_of_a_fine_tuning(tmp_path: Path) -> None:
    write_run(tmp_path, log=[], summary={"accuracy": {"base": 0.1}})
    write_run(tmp_path / "grpo", log=[{"step": 1, "kl": 9.0}])
    log = [{"step": 1, "mean_token_accuracy": 0.5, "grad_norm": 1e9, "entropy": 0.0}]
    write_run(tmp_path / "sft", log=log)
    page = page_of(tmp_path)
    assert "Outside of the healthy range" in page.text("h2")
    assert page.text("td").count("1 of 1 logs") == 1


# Several runs ------------------------------------------------------------------------------------


def test_comparison_has_the_same_axes_a_colour_a_run_and_differences(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", summary=SUMMARY)
    second = write_run(
        tmp_path / "second",
        log=make_log(6),
        summary={**SUMMARY, "accuracy_after": 0.75},
    )
    for folder, beta in ((first, 0.1), (second, 0.2)):
        (folder / "stage.yaml").write_text(f"beta: {beta}\nseed: 1\noutput_dir: {folder}\n")
    page = page_of(first, second)
    reward = next(chart for chart in page.data["charts"] if chart["title"] == "Reward")
    assert [(line["name"], line["colour"]) for line in reward["lines"]] == [
        ("first", 0),
        ("second", 1),
    ]
    assert "Reward by component, before its weight" in titles(page)
    cells = page.text("th", "td")
    at = cells.index("accuracy_after")
    assert cells[at + 1 : at + 4] == [
        "50.0% (38.1% to 61.9%)",
        "75.0% (63.2% to 84.0%)",
        "+25.0 points",
    ]
    # the reward ends at the mean of its last two of 4 logs, and of its last three of 6
    at = cells.index("reward")
    assert cells[at + 1 : at + 4] == ["0.35", "0.5", "+0.15"]
    at = cells.index("beta")
    assert cells[at + 1 : at + 3] == ["0.1", "0.2"]
    assert cells.index("setting") < at
    assert "seed" not in cells[cells.index("setting") : at + 3]


def test_runs_with_a_component_each_have_a_chart_each(tmp_path: Path) -> None:
    for name in "ab":
        write_run(tmp_path / name, log=[{"step": 1, "reward": 0.5, f"rewards/of_{name}/mean": 0.5}])
    page = page_of(tmp_path / "a", tmp_path / "b")
    assert titles(page)[1:3] == [
        "Reward by component, before its weight: of_a",
        "Reward by component, before its weight: of_b",
    ]


def test_equal_settings_do_not_differ_whoever_wrote_them(tmp_path: Path) -> None:
    settings = {"rewards": ["a", "b"], "temperature": 1.0, "seed": 3, "top_k": None, "flag": True}
    first, second = write_run(tmp_path / "first"), tmp_path / "second"
    (first / "stage.yaml").write_text(json.dumps(settings))
    write_report(second, summary={}, log_history=make_log(), settings={**settings, "seed": 4})
    found = settings_that_differ(read_runs([first, second], max_completions=0))
    assert "seed" in found
    assert not any(name in found for name in ("rewards", "temperature", "top_k", "flag"))


def test_run_with_stages_shows_accuracy_after_each_and_the_stages(tmp_path: Path) -> None:
    summary = {
        "accuracy": {"base": 0.1, "sft": 0.5, "grpo": None},
        "accuracy_interval": {"base": [0.05, 0.2]},
        "minutes_by_stage": {"sft": 2.0},
    }
    write_run(tmp_path, log=[], summary=summary)
    write_run(tmp_path / "sft", log=[{"step": 1, "loss": 2.0, "mean_token_accuracy": 0.5}])
    page = page_of(tmp_path)
    assert page.data["bars"] == [{"rows": [["base", 0.1, 0.05, 0.2], ["sft", 0.5, None, None]]}]
    assert page.text("td")[:6] == ["10.0%", "5.0% to 20.0%", "–", "50.0%", "not given", "2"]
    assert "Stage: sft" in page.text("h2")
    assert titles(page) == ["Loss", "Token accuracy"]


def test_stages_of_compared_runs_are_named_with_their_run(tmp_path: Path) -> None:
    for name in "ab":
        write_run(tmp_path / name, summary={"accuracy": {"base": 0.1}})
        write_run(tmp_path / name / "sft")
    page = page_of(tmp_path / "a", tmp_path / "b")
    found = page.text("h2")
    assert {"Accuracy by stage: a", "Accuracy by stage: b", "Stage: a/sft", "Stage: b/sft"} <= set(
        found
    )
    keys = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert len(keys) == len(set(keys))


def test_caption_names_each_number_of_prompts(tmp_path: Path) -> None:
    write_run(tmp_path / "two", steps={1: make_rows(1)})
    write_run(tmp_path / "one", steps={1: make_rows(1, texts="ab")})
    write_run(tmp_path / "unknown")
    said = " ".join(page_of(*(tmp_path / name for name in ("two", "one", "unknown"))).text("p"))
    assert "√(1 or 2 prompts)" in said
    assert "One deviation where the number of prompts is not known." in said


# Command line ------------------------------------------------------------------------------------


def report(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_command_writes_into_the_folder_of_a_run(tmp_path: Path) -> None:
    done = report(write_run(tmp_path))
    assert done.exit_code == 0
    assert done.stdout.replace("\n", "").startswith(str(tmp_path / "report.html"))
    assert done.stdout.strip().endswith("MiB)")
    assert (tmp_path / "report.html").is_file()


def test_command_writes_a_comparison_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert report(write_run(tmp_path / "a"), write_run(tmp_path / "b")).exit_code == 0
    assert (tmp_path / "comparison.html").is_file()


def test_command_shows_the_page_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert report(write_run(tmp_path)).exit_code == 0
    assert opened == []
    assert report(tmp_path, "--open").exit_code == 0
    assert opened == [(tmp_path / "report.html").as_uri()]


def test_command_exits_2_where_there_is_no_run_or_no_way_to_write(tmp_path: Path) -> None:
    missing = report(tmp_path / "gone")
    assert missing.exit_code == 2
    assert "is not a folder, so there is no run to report" in missing.stderr
    unwritable = report(write_run(tmp_path / "run"), "--output", tmp_path / "no" / "folder.html")
    assert unwritable.exit_code == 2
    assert "cannot be written" in unwritable.stderr
    assert "--output" in unwritable.stderr
