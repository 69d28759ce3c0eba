"""Rows in a file, each with named columns: .jsonl, .json, .csv and .parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_grpo_ext.errors import ConfigurationError

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a .jsonl, .json (a list of objects), .csv or .parquet file.

    Raises:
        ConfigurationError: It is not there, of another kind, not readable, or has no rows.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigurationError([_unknown_suffix("data", path)])
    try:
        rows = _READERS[path.suffix.lower()](path)
    except (OSError, ValueError, csv.Error) as error:  # ValueError: not JSON, not UTF-8
        raise ConfigurationError([_unreadable(path, error)]) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or not rows:
        raise ConfigurationError([_no_rows(path)])
    return rows


def check_output(path: Path | None, *, data: Path) -> None:
    """Raise if rows could not be written there, before the work of scoring them.

    Raises:
        ConfigurationError: The file is of another kind, in no folder, or the one that is read.
    """
    if path is None:
        return
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigurationError([_unknown_suffix("output", path)])
    if not path.parent.is_dir():
        raise ConfigurationError([_unwritable(path, "there is no such folder")])
    if path.resolve() == data.resolve():
        raise ConfigurationError([_unwritable(path, "it is the file that is scored")])


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as .jsonl, .json, .csv or .parquet.

    In a .csv, what is no text, number or nothing is written as JSON.

    Raises:
        ConfigurationError: The file cannot be written.
    """
    try:
        _WRITERS[path.suffix.lower()](path, rows)
    except OSError as error:
        raise ConfigurationError([_unwritable(path, error.strerror or str(error))]) from error


def _read_lines(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # the default ends a long completion
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if long := [number for number, row in enumerate(rows, start=1) if None in row]:
        raise ValueError(f"row {long[0]} has more cells than the header")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    try:
        rows: list[Row] = pq.ParquetFile(path).read().to_pylist()
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    return rows


def _write_lines(path: Path, rows: Sequence[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def _write_json(path: Path, rows: Sequence[Row]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1, default=str), encoding="utf-8")


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows([{name: _cell(value) for name, value in row.items()} for row in rows])


def _cell(value: object) -> object:
    plain = value is None or isinstance(value, str | int | float)
    return value if plain else json.dumps(value, ensure_ascii=False, default=str)


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    from datasets import Dataset

    names = dict.fromkeys(name for row in rows for name in row)
    Dataset.from_list([{name: row.get(name) for name in names} for row in rows]).to_parquet(path)


_READERS: Mapping[str, Callable[[Path], Any]] = {
    ".jsonl": _read_lines,
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_WRITERS: Mapping[str, Callable[[Path, Sequence[Row]], None]] = {
    ".jsonl": _write_lines,
    ".json": _write_json,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}


def _unknown_suffix(option: str, path: Path) -> str:
    return (
        f"`--{option}` {path} is a file of an unknown kind, so it is open how to "
        f"{'read' if option == 'data' else 'write'} it. Give a name that ends in one of "
        f"{', '.join(SUFFIXES)}."
    )


def _unreadable(path: Path, error: Exception) -> str:
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
    return (
        f"`--data` {path} cannot be read ({reason}), so there is nothing to score. Correct the "
        "path, or the file: JSON objects a line, a JSON list of objects, CSV with a header, or "
        "parquet."
    )


def _no_rows(path: Path) -> str:
    return (
        f"`--data` {path} holds no rows with named columns, so there is nothing to score. Write "
        'one object a row, such as {"prompt": "3 + 4?", "completion": "7"}.'
    )


def _unwritable(path: Path, reason: str) -> str:
    return (
        f"`--output` {path} cannot be written ({reason}), so the scores would be lost. Name "
        "another file, in a folder that exists."
    )
