"""The guide names every option and reason, and its example prints what it says."""

from __future__ import annotations

import contextlib
import io
from dataclasses import fields
from pathlib import Path

from trl_grpo_ext.rejection import REASONS
from trl_grpo_ext.rejection.options import RejectionArguments

GUIDE = (Path(__file__).parents[2] / "docs" / "rejection_sampling.md").read_text(encoding="utf-8")


def test_guide_names_every_option() -> None:
    assert [f.name for f in fields(RejectionArguments) if f"`{f.name}" not in GUIDE] == []


def test_guide_has_the_reasons_in_their_order() -> None:
    first_cells = [line.split("|")[1].strip() for line in GUIDE.splitlines() if line[:1] == "|"]
    told = [cell for cell in first_cells if cell in REASONS]
    assert told[: len(REASONS)] == list(REASONS)


def test_example_of_the_guide_prints_what_it_says() -> None:
    code = GUIDE.split("```python\n")[1].split("```")[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue().strip() == code.strip().splitlines()[-1].split("#")[1].strip()
