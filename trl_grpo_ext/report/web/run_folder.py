"""What a run left in its folder: summary, settings, metrics and completions, none of it trusted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.report.history import History
from trl_grpo_ext.report.web.completions import FILES as COMPLETIONS
from trl_grpo_ext.report.web.completions import Completions, read_completions
from trl_grpo_ext.report.write import clean_mapping

SUMMARY, METRICS, STAGE_SETTINGS = "summary.json", "metrics.jsonl", "stage.yaml"
STATES = "checkpoint-*/trainer_state.json"
SOURCES = (SUMMARY, METRICS, STATES, COMPLETIONS)
STAGES = ("sft", "grpo", "rejection", "rejection_sft")  # the order in which they run

_HINT = "Name the `output_dir` of a run: training writes these files into it."


@dataclass(frozen=True)
class Run:
    """One run, as far as its folder tells.

    Attributes:
        name: That tells it from the other runs of the page.
        summary: Of ``summary.json``, without secrets.
        settings: What was set, without secrets; empty if nobody wrote it down.
        history: Every logged metric.
        completions: Some or all of those that were logged.
        notes: What could not be read, in sentences.
        stages: The runs of a run that has several.
    """

    name: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=lambda: History({}))
    completions: Completions = field(default_factory=Completions)
    notes: Sequence[str] = ()
    stages: Sequence[Run] = ()


def read_runs(folders: Sequence[Path], *, max_completions: int) -> list[Run]:
    """Return the runs in these folders, which share the number of completions.

    Args:
        folders: At least one; a run of several stages holds these as folders.
        max_completions: Most completions to read, all runs together.

    Raises:
        ConfigurationError: Folders that are not there or hold no run, all of them at once.
    """
    if problems := [text for folder in folders if (text := _problem(folder))]:
        raise ConfigurationError(problems)
    stages = {folder: stage_folders(folder) for folder in folders}
    num_parts = sum(len(parts) or 1 for parts in stages.values())
    most = max(max_completions // num_parts, 1) if max_completions else 0
    names = distinct_names([folder.resolve() for folder in folders])
    return [
        _read_run(
            folder,
            name=name,
            stages=stages[folder],
            max_completions=most,
            is_one_of_many=len(folders) > 1,
        )
        for folder, name in zip(folders, names, strict=True)
    ]


def stage_folders(folder: Path) -> list[Path]:
    """Return the stages that a run's folder holds, in their order."""
    return [folder / name for name in STAGES if (folder / name).is_dir() and _is_run(folder / name)]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart.

    Example:
        >>> distinct_names([Path("/a/x/run"), Path("/a/y/run")])
        ['x/run', 'y/run']
        >>> distinct_names([Path("/a/first"), Path("/a/second")])
        ['first', 'second']
    """
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def _is_run(folder: Path) -> bool:
    return any(True for pattern in SOURCES for _ in folder.glob(pattern))


def _problem(folder: Path) -> str | None:
    if not folder.is_dir():
        return f"{folder} is not a folder, so there is no run to report. {_HINT}"
    if _is_run(folder) or stage_folders(folder):
        return None
    inside = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and _is_run(path)]
    hint = f"Name runs in it, such as {', '.join(inside[:3])}." if inside else _HINT
    return f"{folder} holds none of {', '.join(SOURCES)}, so there is no run to report. {hint}"


def _read_run(
    folder: Path,
    *,
    name: str,
    stages: Sequence[Path],
    max_completions: int,
    is_one_of_many: bool = False,
) -> Run:
    notes: list[str] = []
    prefix = f"{name}/" if is_one_of_many else ""
    return Run(
        name=name,
        summary=_cleaned(_read_json(folder / SUMMARY, notes), SUMMARY, notes),
        settings=_cleaned(_read_settings(folder, notes), "The settings", notes),
        history=History.of(_read_log(folder, notes)),
        completions=read_completions(folder, most=max_completions, notes=notes),
        notes=notes,
        stages=[
            _read_run(
                stage, name=f"{prefix}{stage.name}", stages=(), max_completions=max_completions
            )
            for stage in stages
        ],
    )


def _cleaned(values: Mapping[str, Any], source: str, notes: list[str]) -> dict[str, Any]:
    """Without secrets, as plain values; nothing if the values hold each other."""
    try:
        return clean_mapping(values)
    except RecursionError:
        notes.append(f"{source} cannot be read (nested too deeply), so what it says is left out.")
        return {}


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({error}), so what it says is left out.")
        return {}
    return found if isinstance(found, dict) else {}


def _read_log(folder: Path, notes: list[str]) -> Iterable[Mapping[str, Any]]:
    """Return what was logged: ``metrics.jsonl``, else the newest checkpoint's history."""
    path = folder / METRICS
    entries = _read_lines(path, notes) if path.is_file() else []
    if entries:
        return entries
    states = sorted(folder.glob(STATES), key=lambda state: _number(state.parent.name))
    if not states:
        return []
    what = f"{METRICS} holds nothing" if path.is_file() else f"There is no {METRICS}"
    notes.append(f"{what}: curves end at {states[-1].parent.name}.")
    history = _read_json(states[-1], notes).get("log_history")
    entries = history if isinstance(history, list) else []
    return [entry for entry in entries if isinstance(entry, dict)]


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    entries, num_broken = [], 0
    for line in filter(str.strip, path.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            num_broken += 1
    if num_broken:
        notes.append(
            f"{num_broken} {'line' if num_broken == 1 else 'lines'} of {path.name} could not be "
            "read, so the page goes without. A run that is killed leaves a last line unfinished."
        )
    return entries


def _number(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def _read_settings(folder: Path, notes: list[str]) -> dict[str, Any]:
    """Return what was set: ``stage.yaml``, else the table of ``report.md``."""
    path = folder / STAGE_SETTINGS
    if path.is_file():
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            notes.append(f"{path.name} cannot be read ({type(error).__name__}).")
            return {}
        return found if isinstance(found, dict) else {}
    report = folder / "report.md"
    if not report.is_file():
        return {}
    return settings_in_markdown(report.read_text(encoding="utf-8", errors="replace"))


def settings_in_markdown(text: str) -> dict[str, str]:
    r"""Return the settings that stand in a ``report.md``, as text.

    Example:
        >>> settings_in_markdown("## Settings\n\n|  | value |\n| --- | --- |\n| `beta` | 0.02 |\n")
        {'beta': '0.02'}
    """
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    tables = [part for part in sections if part.startswith("Settings\n")]
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", tables[-1], re.MULTILINE) if tables else []
    return {key: _uncoded(cell) for key, cell in rows}


def _uncoded(cell: str) -> str:
    match = re.fullmatch(r"(`+)( ?)(.*)\2\1", cell)
    return (match[3] if match else cell).replace("\\|", "|")
