"""The plots of a run: reward, KL, length, gradient norm and time a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from trl_grpo_ext.report.history import Floats, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BARS = 60  # [steps] beyond this, bars of a phase would be thinner than their gaps

# Okabe and Ito's palette, which people with any kind of colour blindness can tell apart.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
VERMILION, PURPLE, SKY, GREY = "#D55E00", "#CC79A7", "#56B4E9", "#999999"
REWARD_COLOURS = (ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK)
LINE_STYLES = ("-", "--", ":", "-.")
PHASES = (  # label, metric, colour
    ("generation", "time/generation", BLUE),
    ("rewards", "time/rewards", ORANGE),
    ("log-probabilities", "time/logprobs", GREEN),
    ("update", "time/update", PURPLE),
)
TIME_METRICS = ("step_time", *(metric for _, metric, _ in PHASES))
PLOT_STYLE = {
    "font.size": 12,
    "axes.titlesize": 15,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 11,
}


@dataclass(frozen=True)
class Plot:
    """One picture of the report.

    Attributes:
        name: File name without its ending.
        subject: What it shows, in a few words.
        title: Of the picture, and of its section.
        y_label: With the unit.
        needs: It is drawn if one of these metrics was logged.
        draw: Fills the axes.
    """

    name: str
    subject: str
    title: str
    y_label: str
    needs: tuple[str, ...]
    draw: Callable[[Axes, History], None]


def write_plots(folder: Path, history: History) -> set[str]:
    """Draw every plot whose metrics were logged, and return the names of those."""
    folder.mkdir(exist_ok=True)
    drawn = set()
    for plot in PLOTS:
        path = folder / f"{plot.name}.png"
        path.unlink(missing_ok=True)  # of an earlier report
        if any(map(history.has, plot.needs)):
            _draw(plot, history, path=path)
            drawn.add(plot.name)
    return drawn


def _draw(plot: Plot, history: History, *, path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # matplotlib types the keys as a literal of all of its settings.
    styled = cast("Callable[..., AbstractContextManager[None]]", mpl.rc_context)
    with styled(PLOT_STYLE):
        figure = Figure(figsize=(8.5, 4.8), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        plot.draw(axes, history)
        axes.set_xlim(*_step_limits(history, plot.needs))
        axes.set(title=plot.title, xlabel="optimizer step", ylabel=plot.y_label)
        ticks = MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        axes.xaxis.set_major_locator(ticks)
        handles, _ = axes.get_legend_handles_labels()
        if len(handles) > 1:
            figure.legend(loc="outside lower center", ncols=min(len(handles), 3))
        figure.savefig(path)


def _step_limits(history: History, metrics: Sequence[str]) -> tuple[float, float]:
    steps, _ = history.columns(*metrics)
    margin = max(0.75, 0.02 * float(steps[-1] - steps[0]))
    return float(steps[0]) - margin, float(steps[-1]) + margin


def _draw_loss(axes: Axes, history: History) -> None:
    steps, (loss,) = history.columns("loss")
    _line(axes, steps, loss, label="training loss")
    if history.has("eval_loss"):
        at, (held_out,) = history.columns("eval_loss")
        _line(axes, at, held_out, label="on held-out traces", color=ORANGE)
    axes.set_ylim(bottom=0)


def _draw_reward(axes: Axes, history: History) -> None:
    steps, (mean, std) = history.columns("reward", "reward_std")
    _line(axes, steps, mean, label="reward (mean)")
    _band(axes, steps, mean - std, mean + std, label="± 1 std over completions")
    for index, name in enumerate(history.reward_names()):
        steps_of_name, (mean_of_name,) = history.columns(f"rewards/{name}/mean")
        colour = REWARD_COLOURS[index % len(REWARD_COLOURS)]
        style = LINE_STYLES[(1 + index // len(REWARD_COLOURS)) % len(LINE_STYLES)]
        _line(
            axes,
            steps_of_name,
            mean_of_name,
            label=name,
            color=colour,
            linestyle=style,
            linewidth=1.6,
            zorder=2,
        )


def _draw_kl(axes: Axes, history: History) -> None:
    steps, (kl,) = history.columns("kl")
    axes.axhline(0, color=GREY, lw=1)
    _line(axes, steps, kl, label="KL")
    for floor in history.logged("reference/kl_floor")[:1]:
        axes.axhline(floor, color=VERMILION, lw=1.6, ls="--", label="floor of the reference")


def _draw_length(axes: Axes, history: History) -> None:
    steps, (mean, low, high) = history.columns(
        "completions/mean_length", "completions/min_length", "completions/max_length"
    )
    _line(axes, steps, mean, label="mean")
    _band(axes, steps, low, high, label="shortest to longest")
    axes.set_ylim(bottom=0)


def _draw_gradient_norm(axes: Axes, history: History) -> None:
    steps, (norm,) = history.columns("grad_norm")
    _line(axes, steps, norm, label="gradient norm")
    axes.set_ylim(bottom=0)


def _draw_time(axes: Axes, history: History) -> None:
    steps, (total, *phases) = history.columns(*TIME_METRICS)
    seconds = [np.nan_to_num(phase) for phase in phases]
    rest = np.clip(np.nan_to_num(total) - np.sum(seconds, axis=0), 0, None)
    layers = [
        (label, values, colour)
        for (label, _, colour), values in zip(PHASES, seconds, strict=True)
        if values.any()
    ]
    if rest.any():
        layers.append(("other", rest, GREY) if layers else ("step", rest, BLUE))
    if len(steps) > MAX_BARS:
        names, values, colours = zip(*layers, strict=True)
        axes.stackplot(steps, *values, labels=names, colors=colours, lw=0)
    else:
        _stacked_bars(axes, steps, layers)


def _stacked_bars(axes: Axes, steps: Floats, layers: Sequence[tuple[str, Floats, str]]) -> None:
    width = 0.8 * float(np.min(np.diff(steps), initial=math.inf)) if len(steps) > 1 else 0.8
    bottom = np.zeros_like(steps)
    for name, values, colour in layers:
        axes.bar(steps, values, width, bottom=bottom, label=name, color=colour)
        bottom = bottom + values


def _line(
    axes: Axes,
    steps: Floats,
    values: Floats,
    *,
    label: str,
    color: str = BLUE,
    linestyle: str = "-",
    linewidth: float = 2.4,
    zorder: float = 3,
) -> None:
    """Draw a line, with a dot at each step while they are few; a gap of NaN stays a gap."""
    axes.plot(
        steps,
        values,
        label=_plot_text(label),
        color=color,
        linestyle=linestyle,
        linewidth=linewidth,
        zorder=zorder,
        marker="o" if len(steps) <= MAX_BARS else "",
        markersize=4,
    )


def _band(axes: Axes, steps: Floats, low: Floats, high: Floats, *, label: str) -> None:
    if np.isfinite(low + high).any():
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.18, lw=0, label=label)


def _plot_text(text: str) -> str:
    """Return text that matplotlib shows as it is: no formulas, no label hidden by its ``_``."""
    short = text if len(text) <= 40 else text[:39] + "…"
    return short.lstrip("_").replace("$", r"\$") or "reward"


PLOTS = (
    Plot(
        name="loss",
        subject="Loss",
        title="Loss",
        y_label="cross-entropy (nats per token of a reply)",
        needs=("mean_token_accuracy",),  # of supervised fine-tuning alone
        draw=_draw_loss,
    ),
    Plot(
        name="reward",
        subject="Reward",
        title="Reward",
        y_label="reward (points per completion)",
        needs=("reward",),
        draw=_draw_reward,
    ),
    Plot(
        name="kl",
        subject="KL",
        title="KL divergence from the reference",
        y_label="KL (nats per token)",
        needs=("kl",),
        draw=_draw_kl,
    ),
    Plot(
        name="length",
        subject="Completion length",
        title="Completion length",
        y_label="length (tokens)",
        needs=("completions/mean_length",),
        draw=_draw_length,
    ),
    Plot(
        name="grad_norm",
        subject="Gradient norm",
        title="Gradient norm before clipping",
        y_label="L2 norm",
        needs=("grad_norm",),
        draw=_draw_gradient_norm,
    ),
    Plot(
        name="time",
        subject="Time per step",
        title="Time per step",
        y_label="time (s)",
        needs=TIME_METRICS,
        draw=_draw_time,
    ),
)
