"""The numbers of a run and of several: headline, health, what differs, stages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_grpo_ext.metrics import EVALUATION, Metric, find_metric
from trl_grpo_ext.report.markdown import cell_text
from trl_grpo_ext.report.web.contents import wilson_text
from trl_grpo_ext.report.web.markup import table, told_table
from trl_grpo_ext.report.web.run_folder import Run
from trl_grpo_ext.report.web.series import ends, tokens_per_second

FINAL = (  # what the comparison ends with
    "reward",
    "kl",
    "completions/mean_length",
    "completions/clipped_ratio",
    "frac_reward_zero_std",
    "entropy",
    "grad_norm",
    "step_time",
)
OF_FINE_TUNING = "mean_token_accuracy"  # a metric of TRL's SFTTrainer alone
UNCOMPARED = {"output_dir", "run_name", "logging_dir"}  # settings that differ by nature


@dataclass(frozen=True)
class Tile:
    """A number to see first, and what stands below it."""

    title: str
    value: str
    note: str = ""


def tiles(run: Run) -> Iterator[Tile]:
    """Yield the numbers that a reader looks for first, of those there are."""
    summary, num_prompts = run.summary, run.summary.get("num_eval_prompts")
    after, before = (summary.get(f"accuracy_{end}") for end in ("after", "before"))
    if isinstance(after, int | float):
        shown = f"{before:.1%} → " if isinstance(before, int | float) else ""
        note = "accuracy on held-out prompts, 95% interval after: "
        note += wilson_text(after, num_prompts).partition(" ")[2].strip("()") or "unknown"
        yield Tile("Accuracy", f"{shown}{after:.1%}", note)
    for title, metric, form in (
        ("Reward", "reward", "{:.3f}"),
        ("KL", "kl", "{:.3g}"),
        ("Completion length", "completions/mean_length", "{:.0f}"),
        ("Truncated", "completions/clipped_ratio", "{:.0%}"),
        ("Silent groups", "frac_reward_zero_std", "{:.0%}"),
    ):
        if found := ends(run.history, metric):
            first, last, window = found
            values = f"{form.format(first)} → {form.format(last)}"
            yield Tile(title, values, _ends_note(run, metric, window))
    steps_S, speed_S = tokens_per_second(run.history)
    if len(steps_S):
        yield Tile("Throughput", f"{np.median(speed_S):,.0f} tokens/s", "median over the logs")
    if isinstance(minutes := summary.get("minutes"), int | float):
        steps = f"{summary['steps']} steps" if "steps" in summary else ""
        yield Tile("Time", f"{minutes:.1f} min", steps)


def _ends_note(run: Run, metric: str, window: int) -> str:
    note = f"mean of the first → last {window} logs" if window > 1 else "first → last log"
    floors = run.history.logged("reference/kl_floor") if metric == "kl" else []
    unit = found.unit if (found := find_metric(metric)) else ""
    parts = [note, *(f"floor {floor:.3g}" for floor in floors[:1])]
    return "; ".join([*parts, unit] if unit not in ("", "reward") else parts)


def health_table(runs: Sequence[Run]) -> str:
    """Return the metrics that left their healthy range, and how often; ``""`` for none.

    The ranges are those of GRPO: what a fine-tuning logged is left out.
    """
    runs = [run for run in runs if not run.history.has(OF_FINE_TUNING)]
    rows = [row for run in runs for row in _unhealthy(run)]
    header = ["metric", "run", "outside", "farthest", "healthy", "what it is"]
    if len(runs) == 1:
        header.remove("run")
        rows = [row[:1] + row[2:] for row in rows]
    return told_table(header, rows) if rows else ""


def _unhealthy(run: Run) -> Iterator[tuple[str, ...]]:
    for name in run.history.values:
        metric = None if name.startswith(EVALUATION) else find_metric(name)
        if metric is None:
            continue
        values = run.history.logged(name)
        if bad := [value for value in values if not metric.is_healthy(value)]:
            share = f"{len(bad)} of {len(values)} logs"
            worst = f"{max(bad, key=lambda v: _excess(metric, v)):.4g}"
            yield name, run.name, share, worst, metric.healthy_range, metric.meaning


def _excess(metric: Metric, value: float) -> float:
    """How far a value is outside of the healthy range."""
    above = 0.0 if metric.high is None else value - metric.high
    return max(above, 0.0 if metric.low is None else metric.low - value)


def final_table(runs: Sequence[Run]) -> str:
    """Return what each run ended with, and how far it is from the first one."""
    first, *others = (_finals(run) for run in runs)
    names = list(dict.fromkeys(name for found in (first, *others) for name in found))
    header = ["", runs[0].name]
    for run in runs[1:]:
        header += [run.name, "difference"]
    rows = []
    for name in names:
        row = [_title(name), _shown(runs[0], name, first)]
        for run, found in zip(runs[1:], others, strict=True):
            row += [_shown(run, name, found), _difference(name, first, found)]
        rows.append(row)
    return table(header, rows, kind="numbers")


def _shown(run: Run, name: str, found: Mapping[str, float]) -> str:
    if name not in found:
        return "–"
    if name.startswith("accuracy_"):
        return wilson_text(found[name], run.summary.get("num_eval_prompts"))
    return f"{found[name]:.4g}"


def _difference(name: str, first: Mapping[str, float], found: Mapping[str, float]) -> str:
    if name not in first or name not in found:
        return "–"
    difference = found[name] - first[name]
    if name.startswith("accuracy_"):
        return f"{100 * difference:+.1f} points"
    return f"{difference:+.4g}"


def _finals(run: Run) -> dict[str, float]:
    components = [f"rewards/{name}/mean" for name in run.history.reward_names()]
    metrics = (FINAL[0], *components, *FINAL[1:])
    finals: dict[str, Any] = {
        name: run.summary.get(name) for name in ("accuracy_before", "accuracy_after")
    }
    finals |= {metric: found[1] for metric in metrics if (found := ends(run.history, metric))}
    steps_S, speed_S = tokens_per_second(run.history)
    finals["tokens a second"] = float(np.median(speed_S)) if len(steps_S) else None
    finals |= {name: run.summary.get(name) for name in ("steps", "minutes")}
    return {name: float(value) for name, value in finals.items() if isinstance(value, int | float)}


def _title(name: str) -> str:
    unit = metric.unit if (metric := find_metric(name)) else ""
    return f"{name} ({unit})" if unit and unit != "reward" else name


def settings_that_differ(runs: Sequence[Run]) -> str:
    """Return the settings in which the runs differ, as far as they are known; ``""`` for none."""
    known = [run for run in runs if run.settings]
    names = sorted({name for run in known for name in run.settings} - UNCOMPARED)
    rows = [(name, *(_setting(run, name) for run in known)) for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return told_table(("setting", *(run.name for run in known)), rows) if rows else ""


def _setting(run: Run, name: str) -> str:
    if name not in run.settings:
        return "(default)"
    return cell_text(run.settings[name])


def facts(run: Run) -> list[tuple[str, object]]:
    """Return what ``summary.json`` says that stands nowhere else on the page."""
    elsewhere = ("versions", "metrics", "accuracy", "accuracy_interval")
    rows = [(key, value) for key, value in run.summary.items() if key not in elsewhere]
    versions = run.summary.get("versions")
    return rows + (list(versions.items()) if isinstance(versions, Mapping) else [])


def stage_accuracies(run: Run) -> list[tuple[str, float, float, float]]:
    """Return name, accuracy and the ends of its interval (NaN if unknown) of each model."""
    shares, intervals = (run.summary.get(key) for key in ("accuracy", "accuracy_interval"))
    if not isinstance(shares, Mapping):
        return []
    return [
        (name, float(share), *_ends_of(intervals, name))
        for name, share in shares.items()
        if isinstance(share, int | float)
    ]


def _ends_of(intervals: Any, name: str) -> tuple[float, float]:
    found = intervals.get(name) if isinstance(intervals, Mapping) else None
    given = found if isinstance(found, list) else []
    numbers = [float(end) for end in given if isinstance(end, int | float)]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (math.nan, math.nan)


def stage_table(run: Run) -> str:
    """Return what was measured after each stage; ``""`` for a run without stages."""
    found = stage_accuracies(run)
    minutes = run.summary.get("minutes_by_stage")
    minutes = minutes if isinstance(minutes, Mapping) else {}
    rows = [
        (name, f"{share:.1%}", _interval(low, high), minutes.get(name))
        for name, share, low, high in found
    ]
    return table(("model", "accuracy", "95% interval", "minutes"), rows) if rows else ""


def _interval(low: float, high: float) -> str:
    return "not given" if math.isnan(low + high) else f"{low:.1%} to {high:.1%}"
