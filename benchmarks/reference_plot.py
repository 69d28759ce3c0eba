"""The frontier of `benchmarks/reference.py`: what a bit buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trl_grpo_ext.report.plots import BLACK, BLUE, GREY, PLOT_STYLE, VERMILION

# The package's arms from few bits to many, with their labels; then its others.
LINE = {
    "nf4_rounded": "rounded",
    "nf4_mixed_4.5": "mixed",
    "nf4_mixed_4.9": "",
    "nf4_mixed": "mixed",
    "nf4_mixed_7.1": "mixed",
    "int8_rounded": "int8, rounded",
}
PLAIN = {"nf4": "plain NF4", "fp4": "plain FP4", "int8": "plain int8"}
LOW_RANK = {
    "nf4_rank8": "8",
    "nf4_rank16": "16",
    "nf4_rank32": "",  # others stand above it
    "nf4_rank64": "64: low rank",
}
DISTILLED = {"nf4_rank32_distilled": "distilled"}
NOT_DRAWN = ("resident", "streamed", "nf4_mixed_embeddings8")
LABEL_GAP = 1.38  # least ratio of the heights of two labels


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the floor of each arm against the bits of a weight."""
    kinds = {name: kind for name, kind in result["kinds"].items() if name not in NOT_DRAWN}
    bits = [kind["bits_per_weight"] for kind in kinds.values()]
    floors = [kind["kl_k3"] for kind in kinds.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(9, 6), layout="constrained")
        axes = figure.subplots()
        axes.set_yscale("log")
        axes.set_xlim(min(bits) - 0.55, max(bits) + 0.9)
        axes.set_ylim(min(floors) / 5, max(floors) * 1.6)
        axes.set_xlabel("bits a weight of the quantized layers, scales and factors included")
        axes.set_ylabel("KL floor (k3), nats a token")
        axes.set_title("What a bit buys", loc="left")
        draw_line(axes, kinds, LOW_RANK, colour=GREY, offset=(0, 8))
        draw_line(axes, kinds, LINE, colour=BLUE, offset=(-2, -17), default=result["default"])
        draw_plain(axes, kinds)
        draw_others(axes, kinds)
        if "streamed" in result["kinds"]:
            draw_streamed(axes)
        figure.savefig(path, dpi=120)


def draw_line(
    axes: Axes,
    kinds: Mapping[str, Any],
    labels: Mapping[str, str],
    *,
    colour: str,
    offset: tuple[int, int],
    default: str | None = None,
) -> None:
    """Draw some of the package's arms, the default one larger; labels are so many points away."""
    names = [name for name in labels if name in kinds]
    points = [position(kinds[name]) for name in names]
    axes.plot([x for x, _ in points], [y for _, y in points], "-o", color=colour, linewidth=2)
    for name, point in zip(names, points, strict=True):
        is_default = name == default
        if is_default:
            axes.plot(*point, "o", color=colour, markersize=12)
        axes.annotate(
            labels[name] + (" (default)" if is_default else ""),
            point,
            xytext=offset,
            textcoords="offset points",
            ha="right" if offset[1] < 0 else "left",
            color=colour,
            weight="bold" if is_default else "normal",
        )


def draw_plain(axes: Axes, kinds: Mapping[str, Any]) -> None:
    """Draw the package's arms that are not calibrated."""
    for name, label in PLAIN.items():
        if name in kinds:
            point = position(kinds[name])
            axes.plot(*point, "s", color=BLACK)
            axes.annotate(label, point, xytext=(9, 0), textcoords="offset points", va="center")


def draw_others(axes: Axes, kinds: Mapping[str, Any]) -> None:
    """Draw what is beside the line, labels on the right; hollow if it is not in the package."""
    names = [name for name in kinds if name not in {*LINE, *LOW_RANK, *PLAIN}]
    names.sort(key=lambda name: kinds[name]["kl_k3"])
    heights = spread([kinds[name]["kl_k3"] for name in names])
    for name, height in zip(names, heights, strict=True):
        x, y = position(kinds[name])
        colour, fill = (BLUE, BLUE) if name in DISTILLED else (VERMILION, "white")
        axes.plot([x + 0.07, x + 0.4], [y, height], color=GREY, linewidth=0.8)
        axes.plot(x, y, "o", color=colour, markerfacecolor=fill)
        axes.text(x + 0.43, height, DISTILLED.get(name, name), color=colour, va="center")


def draw_streamed(axes: Axes) -> None:
    """Name the streamed reference at the bottom, which a logarithm does not reach."""
    axes.annotate(
        "streamed: 0, exact, two layers on the device at a time",
        (0.985, 0.0),
        xytext=(0.985, 0.055),
        xycoords="axes fraction",
        textcoords="axes fraction",
        ha="right",
        color=BLUE,
        arrowprops={"arrowstyle": "->", "color": BLUE, "relpos": (1, 0)},
    )


def position(kind: Mapping[str, float]) -> tuple[float, float]:
    """Return where an arm stands: bits, nats."""
    return kind["bits_per_weight"], kind["kl_k3"]


def spread(heights: Sequence[float]) -> list[float]:
    """Return heights for labels above values that ascend, at least ``LABEL_GAP`` apart."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, (placed[-1] if placed else height) * LABEL_GAP))
    return placed
