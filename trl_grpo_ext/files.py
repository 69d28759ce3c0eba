"""Writing files that a reader sees whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUMMARY_FILE = "summary.json"


def write_atomically(path: Path, text: str) -> None:
    """Write a file that a reader sees whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)


def write_summary(folder: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write ``summary.json`` as strict JSON, and return its path.

    Recipes write it last: when it is there, the run is complete.

    Raises:
        ValueError: A number is not finite.
    """
    path = Path(folder) / SUMMARY_FILE
    write_atomically(path, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return path
