"""The page: what stands where, for one run, several, or one with stages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from trl_grpo_ext import __version__
from trl_grpo_ext.report.web.charts import Chart, as_json
from trl_grpo_ext.report.web.completions import Completions
from trl_grpo_ext.report.web.contents import missing, sections
from trl_grpo_ext.report.web.markup import (
    data_block,
    document,
    folded,
    paragraphs,
    prose,
    section,
    text,
    told_table,
)
from trl_grpo_ext.report.web.run_folder import Run
from trl_grpo_ext.report.web.tables import (
    facts,
    final_table,
    health_table,
    settings_that_differ,
    stage_accuracies,
    stage_table,
    tiles,
)

FINAL_NOTE = (
    "<p>Of metrics, the mean of the last logs, up to five. Differences are from the first run.</p>"
)
SCRIPTS = ("charts.js", "completions.js", "start.js")


def render(runs: Sequence[Run]) -> str:
    """Return the page of one run, or of several side by side."""
    page = _Page()
    body = page.of_runs(runs)
    title = runs[0].name if len(runs) == 1 else "Comparison of " + ", ".join(r.name for r in runs)
    shown = [part for run in runs for part in (run, *run.stages) if part.completions.steps]
    data = {
        "charts": [chart.to_json() for chart in page.charts],
        "bars": page.bars,
        "compares": len(runs) > 1,
        "completions": [_completions_json(run.name, run.completions) for run in shown],
    }
    content = f"{_header(title, runs)}{_links(body)}<main>{body}</main>{_footer()}"
    assets = {name: _asset(name) for name in ("page.css", *SCRIPTS)}
    return document(
        f"{title} · training report",
        content + data_block("data", data),
        style=assets["page.css"],
        script="".join(assets[name] for name in SCRIPTS),
    )


class _Page:
    """Collects the charts while the parts are written: a part refers to a chart by its number."""

    def __init__(self) -> None:
        self.charts: list[Chart] = []
        self.bars: list[dict[str, Any]] = []

    def of_runs(self, runs: Sequence[Run]) -> str:
        parts = [part for run in runs for part in (run, *run.stages)]
        body = [*self._summary(runs), *self._stages(runs)]
        for title, charts in sections(runs).items():
            body.append(section(_key(title), title, self._grid(charts)))
        body += [
            _browser(parts),
            _settings(runs),
            section("left-out", "Not on this page", paragraphs(missing(parts))),
        ]
        return "".join(body)

    def _summary(self, runs: Sequence[Run]) -> Iterator[str]:
        prefixes = [f"{run.name}: " if len(runs) > 1 else "" for run in runs]
        notes = [p + note for p, run in zip(prefixes, runs, strict=True) for note in run.notes]
        body = _tiles(runs[0]) if len(runs) == 1 else final_table(runs) + FINAL_NOTE
        yield section("summary", "Summary", body + paragraphs(notes, kind="notes"))
        if len(runs) > 1:
            yield section("differences", "Settings that differ", _differences(runs))
        parts = [part for run in runs for part in (run, *run.stages)]
        yield section("health", "Outside of the healthy range", health_table(parts))

    def _stages(self, runs: Sequence[Run]) -> Iterator[str]:
        for run in runs:
            if measured := stage_accuracies(run):
                self.bars.append({"rows": [[name, *as_json(v)] for name, *v in measured]})
                bars = f'<div class="bars" data-bars="{len(self.bars) - 1}"></div>'
                title = "Accuracy by stage" + (f": {run.name}" if len(runs) > 1 else "")
                yield section(_key(title), title, bars + stage_table(run))
            for stage in run.stages:
                inner = _tiles(stage) + paragraphs(stage.notes, kind="notes")
                for title, charts in sections([stage]).items():
                    inner += f"<h3>{text(title)}</h3>{self._grid(charts)}"
                inner += folded("Summary and settings", _facts(stage))
                yield section(_key(f"stage {stage.name}"), f"Stage: {stage.name}", inner)

    def _grid(self, charts: Sequence[Chart]) -> str:
        return f'<div class="grid">{"".join(map(self._figure, charts))}</div>'

    def _figure(self, chart: Chart) -> str:
        number = len(self.charts)
        self.charts.append(chart)
        caption = f"<p>{prose(chart.full_caption)}</p>" if chart.full_caption else ""
        return (
            f'<figure data-chart="{number}"><h3>{text(chart.title)}</h3>'
            f'<div class="legend"></div><div class="plot"></div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )


def _header(title: str, runs: Sequence[Run]) -> str:
    chips = []
    if len(runs) == 1:
        known = {**runs[0].settings, **runs[0].summary}
        named = {"model_name_or_path": "model", "model": "model", "dataset": "data", "seed": "seed"}
        chips = [(label, known[key]) for key, label in named.items() if key in known]
    shown = "".join(f"<span><b>{label}</b> {text(value)}</span>" for label, value in chips)
    return (
        f'<header><p class="kind">Training report</p><h1>{text(title)}</h1>'
        f'<div class="chips">{shown}</div></header>'
        "<noscript><p>The curves and completions of this page are drawn by its own script, which "
        "is switched off here. The numbers below stand without it.</p></noscript>"
    )


def _links(body: str) -> str:
    found = re.findall(r'<section id="([\w-]+)"><h2>(.*?)</h2>', body)
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title in found)
    return f'<nav aria-label="Parts of this page">{links}</nav>'


def _footer() -> str:
    return f"<footer>Made by trl-grpo-ext {text(__version__)}. This file fetches nothing.</footer>"


def _tiles(run: Run) -> str:
    shown = "".join(
        f'<div class="tile"><h3>{text(tile.title)}</h3><p class="value">{text(tile.value)}</p>'
        f"<p>{text(tile.note)}</p></div>"
        for tile in tiles(run)
    )
    return f'<div class="tiles">{shown}</div>' if shown else ""


def _differences(runs: Sequence[Run]) -> str:
    unknown = [run.name for run in runs if not run.settings]
    sentence = f"The settings of {', '.join(unknown)} are not in the folder." if unknown else ""
    found = settings_that_differ(runs)
    none = "" if found or unknown else "They were given the same settings."
    return found + paragraphs(filter(None, [sentence, none]), kind="notes")


def _settings(runs: Sequence[Run]) -> str:
    body = "".join(
        folded(f"{run.name}: summary and settings" if len(runs) > 1 else "Show them", _facts(run))
        for run in runs
        if run.settings or run.summary
    )
    return section("settings", "Summary and settings", body)


def _facts(run: Run) -> str:
    rows = [*facts(run), *sorted(run.settings.items())]
    return told_table(("", "value"), rows) if rows else ""


def _browser(runs: Sequence[Run]) -> str:
    shown = [run for run in runs if run.completions.steps]
    if not shown:
        return ""
    cut = [_cut_note(run, alone=len(shown) == 1) for run in shown]
    note = paragraphs(filter(None, cut), kind="notes")
    return section("completions-by-step", "Browse completions", f'{note}<div id="browser"></div>')


def _cut_note(run: Run, *, alone: bool) -> str:
    found = run.completions
    name = "" if alone else f"{run.name}: "
    parts = []
    if len(found.steps) < found.num_logged_steps:
        parts.append(
            f"{len(found.steps)} of {found.num_logged_steps} logged steps are on this page, "
            f"evenly spaced, with {found.num_completions} completions."
        )
    if found.num_cut_steps:
        parts.append(f"Of {found.num_cut_steps} of these steps only the first groups are here.")
    return f"{name}{' '.join(parts)} `--max-completions` sets how many." if parts else ""


def _completions_json(name: str, completions: Completions) -> Mapping[str, Any]:
    return {"run": name, "steps": [_step_json(step) for step in completions.steps]}


def _step_json(step: Any) -> Mapping[str, Any]:
    return {
        "step": step.step,
        "columns": step.columns,
        "extras": step.extra_columns,
        "groups": [vars(group) for group in step.groups],
    }


def _key(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "part"


def _asset(name: str) -> str:
    return files("trl_grpo_ext.report.web").joinpath(name).read_text(encoding="utf-8")
