"""The counts add up, and untrusted texts do nothing to a terminal."""

from __future__ import annotations

import io

from rejection.made import candidate, group
from rich.console import Console

from trl_grpo_ext.rejection import REASONS, Rules, Selection, select
from trl_grpo_ext.rejection.candidates import Group
from trl_grpo_ext.rejection.tally import Tally, print_tally

RULES, SELECTION = Rules(), Selection(weights={"math": 1.0}, best_n=1)


def tally(*groups: Group) -> Tally:
    found = Tally()
    for one in groups:
        found.add(one, select(one, rules=RULES, selection=SELECTION))
    return found


def printed(found: Tally) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    print_tally(found, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def wrong(index: int, text: str = "no") -> object:
    return candidate(index, text, scores={"math": 0.0})


GROUPS = [
    group(
        candidate(0, "a"), candidate(1, "b"), candidate(2, "a"), candidate(3, "cut", finished=False)
    ),
    group(candidate(0, "a"), *(wrong(at) for at in (1, 2, 3))),  # type: ignore[arg-type]
    group(*(wrong(at) for at in range(4))),  # type: ignore[arg-type]
    group(wrong(0)),  # type: ignore[arg-type]
    group(candidate(0, scores={"math": None})),
]


def test_summary_counts_prompts_and_each_candidate_once() -> None:
    found = tally(*GROUPS).summary()
    fell = dict.fromkeys(REASONS, 0) | {
        "wrong": 8,
        "cut off": 1,
        "near-duplicate": 1,
        "not among the best": 1,
        "unscored": 1,
    }
    assert found == {
        "prompts": 5,
        "prompts_solved": 2,
        "prompts_always_solved": 1,
        "prompts_kept": 2,
        "candidates": 14,
        "kept": 2,
        "fell": fell,
        "prompts_by_pass_rate": {
            "0": 2,
            "(0, 1/4]": 1,
            "(1/4, 1/2]": 0,
            "(1/2, 3/4]": 0,
            "(3/4, 1)": 0,
            "1": 1,
        },
        "kept_by_pass_rate": {
            "0": 0,
            "(0, 1/4]": 1,
            "(1/4, 1/2]": 0,
            "(1/2, 3/4]": 0,
            "(3/4, 1)": 0,
            "1": 1,
        },
    }
    assert found["kept"] + sum(fell.values()) == found["candidates"]


def test_table_says_what_became_of_all() -> None:
    lines = [line.split() for line in printed(tally(*GROUPS)).splitlines()]
    assert ["prompts", "5", "100.0%"] in lines
    assert ["solved", "at", "least", "once", "2", "40.0%"] in lines
    assert ["replies", "14", "100.0%"] in lines
    assert ["kept", "2", "14.3%", "a"] in lines
    assert ["wrong", "8", "57.1%", "no"] in lines
    assert not [line for line in lines if line[:1] == ["repetition"]]  # nothing fell for it
    assert ["(0,", "1/4]", "1", "1"] in lines


def test_table_shows_markup_and_control_characters_as_they_are_and_no_more_than_some() -> None:
    text = printed(tally(group(wrong(0, "[red]\x1b[31m\n" + "x" * 10_000))))  # type: ignore[arg-type]
    assert r"[red]\x1b[31m\n" in text
    assert "\x1b" not in text
    assert len(text) < 4_000


def test_empty_tally_is_printed() -> None:
    assert "replies" in printed(Tally())
