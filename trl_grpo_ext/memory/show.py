"""A plan on the terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from trl_grpo_ext.memory.comparison import Setup
from trl_grpo_ext.memory.estimate import PARTS, MemoryEstimate, Phase, estimate_run
from trl_grpo_ext.memory.plan import GB, Plan, gb
from trl_grpo_ext.memory.recipe_lines import launch_command, recipe_yaml
from trl_grpo_ext.memory.settings import RunSettings, Sharding

_TITLES: dict[Sharding, str] = {
    "none": "whole",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp": "FSDP",
}
_BAR_WIDTH = 36  # [characters]


def print_plan(plan: Plan, console: Console) -> None:
    """Print tables, bars, the verdict, and the settings that fit."""
    console.print(_stage_table(plan))
    console.print(*_log_prob_lines(plan), sep="\n")
    console.print(_bars(plan))
    console.print(_comparison_table(plan.comparison))
    console.print(Text("Assumed: " + ";\n  ".join(plan.assumptions()) + ".\n", style="dim"))
    console.print(Text("Verdict: ", style="bold").append(_verdict(plan)), soft_wrap=True)
    console.print(*_suggestion(plan), sep="\n", soft_wrap=True)


def _stage_table(plan: Plan) -> Table:
    title = f"{plan.model} on {_gpus(plan)}: GB (1e9 bytes) a GPU"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("part", no_wrap=True)
    table.add_column("held")
    for stage in plan.stages:
        style = "bold" if stage == plan.asked.sharding else None
        table.add_column(_TITLES[stage], justify="right", header_style=style, style=style)
    for part in _shown_parts(list(plan.stages.values())):
        sizes = [_number(estimate.parts[part]) for estimate in plan.stages.values()]
        table.add_row(*PARTS[part], *sizes)
    table.add_section()
    totals = [_number(estimate.total_bytes) for estimate in plan.stages.values()]
    table.add_row("peak", "", *totals, style="bold")
    table.add_row(f"fits into {gb(plan.usable_bytes)}", "", *_fits(plan))
    hosts = [estimate.host_bytes * plan.asked.num_gpus for estimate in plan.stages.values()]
    if any(hosts):
        table.add_row("host memory, all", "", *map(_number, hosts))
    return table


def _fits(plan: Plan) -> Iterator[str]:
    for estimate in plan.stages.values():
        fits = estimate.total_bytes <= plan.usable_bytes
        yield "[green]yes[/green]" if fits else "[red]no[/red]"


def _shown_parts(estimates: list[MemoryEstimate]) -> list[str]:
    return [part for part in PARTS if any(estimate.parts[part] for estimate in estimates)]


def _log_prob_lines(plan: Plan) -> Iterator[str]:
    sizes = plan.log_prob_bytes
    yield "The peak is what is always held, and the larger of generation and update."
    counted = "shared prefixes are" if plan.asked.shared_prefix else "padded is"
    yield (
        f"Log-prob pass of a micro-batch: padded {gb(sizes['padded'])}, with shared prefixes "
        f"{gb(sizes['shared_prefix'])} ({counted} counted above)."
    )
    yield ""


def _bars(plan: Plan) -> Group:
    runs = [("asked for", plan.asked)]
    if plan.suggestion is not None and not plan.fits:
        runs.append(("suggested", plan.suggestion))
    estimates = [estimate_run(plan.shape, settings) for _, settings in runs]
    scale = max(plan.gpu_bytes, *(estimate.total_bytes for estimate in estimates))
    drawn: list[RenderableType] = []
    for (title, settings), estimate in zip(runs, estimates, strict=True):
        drawn.append(Text(f"{title}: {_summary(settings)}", style="italic"))
        drawn.append(_bar_table(estimate, plan=plan, scale=scale))
    return Group(*drawn)


def _bar_table(estimate: MemoryEstimate, *, plan: Plan, scale: int) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(justify="left", min_width=max(len(name) for name, _ in PARTS.values()))
    table.add_column(width=_BAR_WIDTH)
    table.add_column(justify="right")
    rows = [(PARTS[part][0], estimate.parts[part], "cyan") for part in _shown_parts([estimate])]
    over = estimate.total_bytes > plan.usable_bytes
    rows.append(("peak", estimate.total_bytes, "red" if over else "green"))
    rows.append(("usable on a GPU", plan.usable_bytes, "white"))
    for name, size, color in rows:
        bar = Bar(scale, 0, size, width=_BAR_WIDTH, color=color)
        table.add_row(name, bar, gb(size))
    table.add_row("")
    return table


def _gpus(plan: Plan) -> str:
    return f"{plan.asked.num_gpus} GPU{'' if plan.asked.num_gpus == 1 else 's'}"


def _summary(settings: RunSettings) -> str:
    parts = [
        f"reference {settings.reference}",
        "weights whole" if settings.sharding == "none" else _TITLES[settings.sharding],
        "checkpointing" if settings.gradient_checkpointing else "no checkpointing",
        f"micro-batch {settings.micro_batch}",
        f"LoRA {settings.lora_rank}" if settings.lora_rank else "all weights trained",
        settings.dtype,
        settings.optimizer,
    ]
    return ", ".join(parts)


def _comparison_table(setups: list[Setup]) -> Table:
    title = "Weights alone, 16 bits, all models of this size, before sharding: GB (1e9 bytes)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("setup")
    table.add_column("round numbers, then counted (plain NF4)", justify="right")
    for setup in setups:
        rough = _sum(setup.parts, setup.total)
        table.add_row(setup.title, rough)
        table.add_row("", _sum(setup.exact_parts, setup.exact_total), style="dim")
    return table


def _sum(parts: dict[str, int], total: int) -> str:
    return f"{' + '.join(map(_short, parts.values()))} = {_short(total)}"


def _short(num_bytes: int) -> str:
    """In GB, to a tenth, or to a thousandth below 10."""
    text = f"{num_bytes / GB:.1f}" if num_bytes >= 10 * GB else f"{num_bytes / GB:.3f}"
    return text.rstrip("0").rstrip(".")


def _verdict(plan: Plan) -> str:
    return f"{plan.model} on {plan.asked.num_gpus} x {gb(plan.gpu_bytes)} {plan.verdict()}"


def _suggestion(plan: Plan) -> Iterator[RenderableType]:
    if plan.suggestion is None:
        gpus = plan.enough_gpus
        enough = f"{gpus} GPUs like these would do" if gpus else "not even 1024 GPUs would do"
        yield f"None of the settings that were tried fits; {enough}, with the most frugal of them."
        reward = plan.estimate.parts["reward"]
        if reward > plan.usable_bytes / 2:
            yield f"The reward model alone takes {gb(reward)} of each GPU: --reward api takes none."
        return
    estimate = estimate_run(plan.shape, plan.suggestion)
    need = f"{gb(estimate.total_bytes)} a GPU"
    if estimate.host_bytes:
        need += f", {gb(estimate.host_bytes * plan.suggestion.num_gpus)} of host memory"
    if plan.fits:
        yield "These settings in a recipe:\n"
    else:
        yield f"The fastest that fits ({need}): {_summary(plan.suggestion)}. In a recipe:\n"
    yield Syntax(recipe_yaml(plan.model, plan.suggestion), "yaml", background_color="default")
    yield f"{launch_command(plan.suggestion)} recipes/grpo.py --config YOUR.yaml"


def save_plot(plan: Plan, path: Path) -> None:
    """Write stacked bars, one a kind of sharding and one for what is suggested, to a picture."""
    from matplotlib.figure import Figure

    bars = {_TITLES[stage]: estimate for stage, estimate in plan.stages.items()}
    title = f"{plan.model} on {_gpus(plan)}\nasked for: {_summary(plan.asked)}"
    if plan.suggestion is not None and not plan.fits:
        bars["suggested"] = estimate_run(plan.shape, plan.suggestion)
        title += f"\nsuggested: {_summary(plan.suggestion)}"
    figure = Figure(figsize=(10, 2.5 + 0.6 * len(bars)), layout="constrained")
    axes: Any = figure.subplots()
    _stack(axes, bars)
    axes.axvline(plan.gpu_bytes / GB, color="black", label="memory of a GPU")
    axes.axvline(plan.usable_bytes / GB, color="black", linestyle="--", label="usable")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("GB (1e9 bytes) a GPU at the peak")
    axes.set_title(title, loc="left", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def _stack(axes: Any, bars: dict[str, MemoryEstimate]) -> None:
    from matplotlib import colormaps

    colors, starts = colormaps["tab20"], dict.fromkeys(bars, 0.0)
    for index, part in enumerate(PARTS):
        sizes = {bar: _at_peak(estimate, part) / GB for bar, estimate in bars.items()}
        if any(sizes.values()):
            left, widths = list(starts.values()), list(sizes.values())
            axes.barh(list(bars), widths, left=left, color=colors(index), label=PARTS[part][0])
            starts = {bar: starts[bar] + sizes[bar] for bar in bars}
    for row, (bar, end) in enumerate(starts.items()):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(
            gb(bars[bar].total_bytes),
            (end, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            bbox=box,
        )


def _at_peak(estimate: MemoryEstimate, part: str) -> int:
    """The bytes of a part that are held at the peak of a step."""
    transient: tuple[Phase, ...] = ("update", "generation")
    larger = max(transient, key=estimate.phase_bytes)
    return estimate.parts[part] if PARTS[part][1] in ("always", larger) else 0


def _number(num_bytes: int) -> str:
    """In GB, with three digits or more."""
    if not num_bytes:
        return "-"
    size = num_bytes / GB
    decimals = 2 if size < 10 else 1 if size < 1000 else 0
    return f"{size:,.{decimals}f}"
