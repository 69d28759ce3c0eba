"""The frontier of `benchmarks/reference.py`: what a bit buys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trl_grpo_ext.report.plots import BLACK, BLUE, GREY, PLOT_STYLE, VERMILION

# The package's arms from few bits to many, with their labels; then those beside the line.
LINE = {
    "nf4_rounded": "rounded",
    "nf4_rank8": "rank 8",
    "nf4_rank16": "rank 16",
    "nf4_rank32": "rank 32",
    "nf4_rank64": "rank 64",
    "int8": "int8",
}
BESIDE = {"nf4": "plain NF4", "fp4": "plain FP4", "nf4_rank32_distilled": "distilled"}
NOT_DRAWN = ("resident", "streamed", "nf4_rank32_embeddings8", "int8_rounded")
LABEL_GAP = 1.15  # least ratio of the heights of two labels


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the floor of each arm against the bits of a weight."""
    kinds = result["kinds"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        axes = figure.subplots()
        axes.set_yscale("log")
        widths = [kind["bits_per_weight"] for name, kind in kinds.items() if name not in NOT_DRAWN]
        axes.set_xlim(min(widths) - 0.4, max(widths) + 0.9)
        axes.set_xlabel("bits a weight of the quantized layers, scales and factors included")
        axes.set_ylabel("KL floor (k3), nats a token")
        axes.set_title("What a bit buys", loc="left")
        draw_line(axes, kinds, default=result["default"])
        draw_beside(axes, kinds)
        draw_methods(axes, {k: v for k, v in kinds.items() if is_method(k)})
        if "streamed" in kinds:
            draw_exact(axes)
        figure.savefig(path, dpi=120)


def is_method(name: str) -> bool:
    """Say whether an arm is none of the package's."""
    return name not in LINE and name not in BESIDE and name not in NOT_DRAWN


def draw_line(axes: Axes, kinds: Mapping[str, Any], *, default: str) -> None:
    """Draw the package's arms, the default one larger."""
    names = [name for name in LINE if name in kinds]
    points = [position(kinds[name]) for name in names]
    if not points:
        return
    axes.plot(*zip(*points, strict=True), "-o", color=BLUE, linewidth=2, markersize=7)
    for name, point in zip(names, points, strict=True):
        is_default = name == default
        if is_default:
            axes.plot(*point, "o", color=BLUE, markersize=13)
        axes.annotate(
            LINE[name] + (" (default)" if is_default else ""),
            point,
            xytext=(-8, -10),
            textcoords="offset points",
            ha="right",
            va="top",
            color=BLUE,
            weight="bold" if is_default else "normal",
        )


def draw_beside(axes: Axes, kinds: Mapping[str, Any]) -> None:
    """Draw the package's arms that the line leaves out."""
    for name, label in BESIDE.items():
        if name in kinds:
            point = position(kinds[name])
            axes.plot(*point, "s", color=BLACK, markersize=6)
            axes.annotate(label, point, xytext=(9, 0), textcoords="offset points", va="center")


def draw_methods(axes: Axes, kinds: Mapping[str, Any]) -> None:
    """Draw what is not in the package: hollow points, each with a label on its right."""
    names = sorted(kinds, key=lambda name: kinds[name]["kl_k3"])
    for name, height in zip(names, spread([kinds[name]["kl_k3"] for name in names]), strict=True):
        x, y = position(kinds[name])
        axes.plot(x, y, "o", markerfacecolor="none", color=VERMILION, markersize=7)
        axes.plot([x + 0.06, x + 0.22], [y, height], color=GREY, linewidth=0.8)
        axes.text(x + 0.25, height, name, color=VERMILION, va="center", fontsize=10)


def draw_exact(axes: Axes) -> None:
    """Name the streamed reference at the bottom, which a logarithm does not reach."""
    axes.annotate(
        "streamed: floor 0, two layers on the device",
        (9.0, 0),
        xytext=(0.985, 0.03),
        xycoords="axes fraction",
        textcoords="axes fraction",
        ha="right",
        color=BLUE,
    )


def position(kind: Mapping[str, float]) -> tuple[float, float]:
    """Return where an arm stands: bits, nats."""
    return kind["bits_per_weight"], kind["kl_k3"]


def spread(heights: Sequence[float]) -> list[float]:
    """Return heights for labels, at least ``LABEL_GAP`` apart, for values that ascend."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] * LABEL_GAP) if placed else height)
    shift = float(np.exp(np.mean(np.log(heights) - np.log(placed)))) if placed else 1.0
    return [height * shift for height in placed]
