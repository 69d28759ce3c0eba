"""A subject of the page: its curves for one run, or for several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from trl_grpo_ext.metrics import EVALUATION, find_metric
from trl_grpo_ext.report.web.bands import LENGTH, band_caption, band_of
from trl_grpo_ext.report.web.charts import Chart, Level, Line
from trl_grpo_ext.report.web.run_folder import Run

FLOOR = "reference/kl_floor"

Named = tuple[str, str]  # a label and a metric


@dataclass(frozen=True)
class Panel:
    """A subject of the page.

    Attributes:
        title: Of its chart.
        unit: Of the vertical axis.
        metrics: Finds label and metric of its lines in a run; several runs side by side have a
            chart a metric.
        missing: What to say where nothing of it was logged; ``""`` for a metric that few runs have.
        from_zero: Whether the axis begins at 0.
        skip_zeros: Whether a run in which it is 0 throughout is without it.
    """

    title: str
    unit: str
    metrics: Callable[[Run], Sequence[Named]]
    missing: str = ""
    from_zero: bool = False
    skip_zeros: bool = False

    def charts(self, runs: Sequence[Run]) -> list[Chart]:
        """Return the charts: one for a run, one a metric for several."""
        pairs = ((run, named) for run in runs for named in self.metrics(run))
        found = list(dict.fromkeys(named for run, named in pairs if self._is_in(run, named)))
        if not found:
            return []
        if len(runs) == 1:
            return [self._chart_of_run(runs[0], found)]
        return [self._chart_of_metric(runs, named, alone=len(found) == 1) for named in found]

    def _is_in(self, run: Run, named: Named) -> bool:
        values = run.history.logged(named[1])
        return any(values) if self.skip_zeros else bool(values)

    def _chart_of_run(self, run: Run, found: Sequence[Named]) -> Chart:
        lines = [_line(run, metric, label, n) for n, (label, metric) in enumerate(found)]
        if len(lines) > 4:  # bands would hide each other
            lines = [replace(line, band=None) for line in lines]
        banded = [metric for line, (_, metric) in zip(lines, found, strict=True) if line.band]
        return self._chart(self.title, lines, band_caption([run], banded), found[0][1], [run])

    def _chart_of_metric(self, runs: Sequence[Run], named: Named, *, alone: bool) -> Chart:
        label, metric = named
        lines = [
            _line(run, metric, run.name, number)
            for number, run in enumerate(runs)
            if self._is_in(run, named)
        ]
        if metric == LENGTH:
            lines = [replace(line, band=None) for line in lines]
        title = self.title if alone else f"{self.title}: {label}"
        caption = band_caption(runs, [metric] if any(line.band for line in lines) else [])
        return self._chart(title, lines, caption, metric, runs)

    def _chart(
        self, title: str, lines: Sequence[Line], band: str, metric: str, runs: Sequence[Run]
    ) -> Chart:
        is_taught = any(run.history.has("mean_token_accuracy") for run in runs)
        described = None if is_taught else find_metric(metric)
        healthy = described.healthy_range if described and not metric.startswith(EVALUATION) else ""
        return Chart(
            title=title,
            unit=self.unit,
            lines=lines,
            levels=_floors(runs) if metric == "kl" else (),
            caption=" ".join(filter(None, [band, healthy and f"Healthy: {healthy}."])),
            from_zero=self.from_zero,
        )


def _line(run: Run, metric: str, label: str, colour: int) -> Line:
    steps_S, (values_S,) = run.history.columns(metric)
    return Line(label, steps_S, values_S, band=band_of(run, metric), colour=colour)


def _floors(runs: Sequence[Run]) -> list[Level]:
    alone = len(runs) == 1
    return [
        Level("floor of the reference" if alone else f"floor, {run.name}", floor, 1 if alone else n)
        for n, run in enumerate(runs)
        for floor in run.history.logged(FLOOR)[:1]
    ]
