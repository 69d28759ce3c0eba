"""docs/dropin.md: its table has every option, and each row is held by a test."""

from __future__ import annotations

import inspect
import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from dropin.cases import GIVEN, SAMPLED
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer

ROOT = Path(__file__).parents[2]
TABLE = runpy.run_path(str(ROOT / "docs" / "dropin_table.py"), run_name="dropin_table")
ROWS = [row for rows in TABLE["SECTIONS"].values() for row in rows]
SET_BY_CASES = {name for case in (GIVEN | SAMPLED).values() for name in case.changes}


def names(section: str) -> list[str]:
    return [row.option for row in TABLE[section]]


def test_the_table_has_each_option_of_grpo_config_once() -> None:
    own = [f.name for f in fields(GRPOConfig) if f.name in GRPOConfig.__annotations__]
    assert sorted(names("GRPO")) == sorted(own)


def test_the_table_has_each_argument_of_the_trainer_once() -> None:
    *arguments, data = names("ARGUMENTS")
    assert sorted(arguments) == sorted(inspect.signature(GRPOTrainer).parameters)
    assert data == "images in the data"


def test_the_table_names_options_of_training_arguments() -> None:
    known = {f.name for f in fields(TrainingArguments)}
    assert set(names("TRAINING")) <= known
    assert not set(names("TRAINING")) & set(names("GRPO"))


@pytest.mark.parametrize("row", ROWS, ids=[row.option for row in ROWS])
def test_each_row_is_held_by_a_test(row: Any) -> None:
    if row.shown_by != "cases":
        path, name = row.shown_by.split("::")
        assert f"def {name}(" in (ROOT / path).read_text()
    elif row.status == "inherited":
        assert row.note
    else:
        assert row.option in SET_BY_CASES | {"rollout_func"}  # each case of GIVEN has one


def test_the_page_is_that_of_the_table() -> None:
    assert (ROOT / "docs" / "dropin.md").read_text() == TABLE["page"]()
