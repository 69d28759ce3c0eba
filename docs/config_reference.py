"""Write docs/reference/config.md from the class; a test compares the two."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from trl_grpo_ext.config import ExtensionOptions

PAGE = Path(__file__).parent / "reference" / "config.md"
HEAD = """# Options

`ExtGRPOConfig` has every option of `trl.GRPOConfig` and these. With the defaults, training equals
plain TRL, but for groups of equal rewards, which teach exactly nothing, and for rewards that are
NaN or infinite, which are left out. Options of the reference are unset until you set them; what
they then stand for is in the text. This page is written by `python docs/config_reference.py`.

| option | default | what it does |
|---|---|---|
"""


def page() -> str:
    """Return the page that the class stands for."""
    return HEAD + "".join(_row(option) for option in fields(ExtensionOptions))


def _row(option: Field[Any]) -> str:
    assert option.default is not MISSING
    text = option.metadata["help"].replace("|", "\\|")
    return f"| `{option.name}` | `{_yaml(option.default)}` | {text} |\n"


def _yaml(value: object) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


if __name__ == "__main__":
    PAGE.write_text(page())
