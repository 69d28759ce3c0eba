"""What the stages were worth: one table, one plot, one summary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_grpo_ext.files import SUMMARY_FILE, write_summary
from trl_grpo_ext.pipeline.stages import MODELS, Stage
from trl_grpo_ext.report.markdown import section, table
from trl_grpo_ext.report.plots import BLUE, GREY, PLOT_STYLE
from trl_grpo_ext.report.versions import library_versions

GREEDY = "greedy/accuracy"
PLOT_FILE = Path("plots") / "accuracy_by_stage.png"
TITLES = {
    "base": "base",
    "sft": "1: SFT",
    "grpo": "2: GRPO",
    "rejection_sft": "3: rejection sampling + SFT",
}

_MADE_BY = {"rejection_sft": ["rejection", "rejection_sft"]}

Metrics = Mapping[str, float | None]


def read_metrics(stages: Sequence[Stage]) -> dict[str, Metrics]:
    """Return what each evaluation measured that is there, by the name of its model."""
    found = {}
    for name in MODELS:
        (stage,) = (each for each in stages if each.name == f"evaluation/{name}")
        path = stage.folder / SUMMARY_FILE
        if path.is_file():
            found[name] = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    return found


def summarize_stages(stages: Sequence[Stage], *, seed: int, num_processes: int) -> dict[str, Any]:
    """Return what summary.json holds: greedy accuracy by stage, its interval, all metrics."""
    metrics, summaries = read_metrics(stages), _summaries(stages)
    return {
        "accuracy": {name: of_model[GREEDY] for name, of_model in metrics.items()},
        "accuracy_interval": {
            name: [of_model[f"{GREEDY}/low"], of_model[f"{GREEDY}/high"]]
            for name, of_model in metrics.items()
        },
        "metrics": metrics,
        "minutes_by_stage": {name: one.get("minutes") for name, one in summaries.items()},
        "minutes": sum(one.get("minutes", 0.0) for one in summaries.values()),
        "seed": seed,
        "num_processes": num_processes,
        "versions": library_versions(),
    }


def metric_names(metrics: Mapping[str, Metrics]) -> list[str]:
    """Return the names of what was measured, without intervals."""
    first: Metrics = next(iter(metrics.values()), {})
    return [name for name in first if not name.endswith(("/low", "/high"))]


def table_rows(summary: Mapping[str, Any]) -> list[tuple[object, ...]]:
    """Return a row a model: its title, its metrics with intervals, and its stage's minutes."""
    metrics, minutes = summary["metrics"], summary["minutes_by_stage"]
    return [
        (
            TITLES[name],
            *(_with_interval(of_model, metric) for metric in metric_names(metrics)),
            _minutes_of(name, minutes),
        )
        for name, of_model in metrics.items()
    ]


def write_results(folder: Path, summary: Mapping[str, Any], stages: Sequence[Stage]) -> Path:
    """Write the plot, ``report.md`` and, last, ``summary.json``; return the report's path."""
    draw_accuracy(folder / PLOT_FILE, summary["metrics"])
    report = folder / "report.md"
    report.write_text(_page(summary, stages), encoding="utf-8")
    write_summary(folder, summary)
    return report


def draw_accuracy(path: Path, metrics: Mapping[str, Metrics]) -> None:
    """Draw the greedy accuracy of each model, with its interval, and pass@k beside it."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(dict(PLOT_STYLE)):  # type: ignore[arg-type]
        figure = Figure(figsize=(8.5, 4.8), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        places = range(len(metrics))
        values = [of_model[GREEDY] or 0.0 for of_model in metrics.values()]
        spread = [_spread(of_model) for of_model in metrics.values()]
        axes.bar(places, values, 0.55, color=BLUE, label="greedy accuracy, 95 % interval")
        axes.errorbar(
            places, values, yerr=list(zip(*spread, strict=True)), fmt="none", ecolor="#000000"
        )
        for name in [name for name in metric_names(metrics) if name.startswith("pass@")]:
            points = [of_model[name] or 0.0 for of_model in metrics.values()]
            axes.plot(places, points, "s", color=GREY, mec="#000000", label=name)
        for place, value, (_, above) in zip(places, values, spread, strict=True):
            axes.text(place, value + above + 0.02, f"{value:.2f}", ha="center", weight="bold")
        axes.set_xticks(list(places), [TITLES[name] for name in metrics])
        axes.set(ylim=(0, 1.1), ylabel="share of held-out prompts", title="Accuracy by stage")
        figure.legend(loc="outside lower center", ncols=3)
        figure.savefig(path)


def _spread(metrics: Metrics) -> tuple[float, float]:
    value, low, high = (metrics[f"{GREEDY}{end}"] or 0.0 for end in ("", "/low", "/high"))
    return max(value - low, 0.0), max(high - value, 0.0)


def _minutes_of(name: str, minutes: Mapping[str, float]) -> str:
    parts = [minutes[part] for part in _MADE_BY.get(name, [name]) if part in minutes]
    return f"{sum(parts):.1f}" if parts else ""


def _with_interval(metrics: Metrics, name: str) -> str:
    value, low, high = (metrics.get(f"{name}{end}") for end in ("", "/low", "/high"))
    if value is None:
        return "not measured"
    return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _summaries(stages: Sequence[Stage]) -> dict[str, dict[str, Any]]:
    paths = {stage.name: stage.folder / SUMMARY_FILE for stage in stages}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.is_file()
    }


def _page(summary: Mapping[str, Any], stages: Sequence[Stage]) -> str:
    names = metric_names(summary["metrics"])
    note = (
        "Each model answered the same held-out prompts: once greedily, and several times by "
        "sampling (`accuracy` is their mean, pass@k the chance that one of k is right). In "
        "brackets: 95 % intervals by the bootstrap over prompts."
    )
    minutes = [(name, value) for name, value in summary["minutes_by_stage"].items()]
    folders = [(stage.name, str(stage.folder), f"recipes/{stage.recipe}.py") for stage in stages]
    sections = [
        "# The three stages",
        note,
        table(("model", *names, "minutes of its stage"), table_rows(summary)),
        f"![Accuracy by stage]({PLOT_FILE.as_posix()})",
        section("Stages", table(("stage", "folder", "recipe"), folders)),
        section("Minutes", table(("stage", "minutes"), minutes)),
        section("Versions", table(("", "version"), list(summary["versions"].items()))),
    ]
    return "\n\n".join(sections) + "\n"
