"""What a run leaves behind to look at: ``summary.json``, ``report.md`` and plots.

Text that a model wrote is not trusted: it is shown inside fences that it cannot close.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

PACKAGES = (
    "trl_grpo_ext",
    "torch",
    "trl",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
)
# What comes first in summary.json; the rest follows by name, nested values at the end.
SUMMARY_ORDER = (
    "model",
    "task",
    "dataset",
    "accuracy_before",
    "accuracy_after",
    "num_eval_prompts",
    "steps",
    "minutes",
    "seed",
)
SECRET_KEY = re.compile(r"api_?key|secret|password|authorization|(hub|access|auth)_token", re.I)
WILSON_Z = 1.959964  # [standard deviations] two-sided 95%
MAX_EXAMPLE_CHARS = 1500
MAX_BARS = 60  # [steps] beyond this, bars of a phase would be thinner than their gaps

# Okabe and Ito's palette, which people with any kind of colour blindness can tell apart.
BLACK, BLUE, ORANGE, GREEN = "#000000", "#0072B2", "#E69F00", "#009E73"
VERMILION, PURPLE, SKY, GREY = "#D55E00", "#CC79A7", "#56B4E9", "#999999"
REWARD_COLOURS = (ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK)
LINE_STYLES = ("-", "--", ":", "-.")
PHASES = {
    "generation": ("time/generation", BLUE),
    "rewards": ("time/rewards", ORANGE),
    "log-probabilities": ("time/logprobs", GREEN),
    "update": ("time/update", PURPLE),
}
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
    "lines.linewidth": 2.0,
}

FILES = {
    "README.md": "model card",
    "adapter_config.json": "settings of the adapter",
    "chat_template.jinja": "how a conversation becomes tokens",
    "completions": "every completion with its rewards, as parquet",
    "config.json": "architecture of the model",
    "generation_config.json": "default settings of `generate`",
    "plots": "the plots of this report",
    "summary.json": "the result, for programs",
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "settings of the tokenizer",
    "training_args.bin": "all training arguments",
}


@dataclass(frozen=True)
class Example:
    """One held-out prompt and what the model said before and after training."""

    prompt: str
    answer: str
    before: str
    after: str


@dataclass(frozen=True)
class History:
    """The logged metrics of a run, by name and step; NaN where a step logged no finite number."""

    values: Mapping[str, Mapping[int, float]]

    @classmethod
    def of(cls, log_history: Iterable[Mapping[str, object]]) -> History:
        """Read transformers' ``trainer.state.log_history``; a step logged twice counts once."""
        values: dict[str, dict[int, float]] = {}
        for entry in log_history:
            step = entry.get("step")
            if not isinstance(step, int):
                continue
            for name, value in entry.items():
                if value is None or isinstance(value, int | float):
                    values.setdefault(name, {})[step] = _finite(value)
        return cls({name: dict(sorted(series.items())) for name, series in values.items()})

    def has(self, name: str) -> bool:
        """Return whether the metric was logged at least once with a finite number."""
        return bool(self.logged(name))

    def logged(self, name: str) -> list[float]:
        """Return the metric's finite numbers in the order of the steps."""
        return [value for value in self.values.get(name, {}).values() if not math.isnan(value)]

    def columns(self, *names: str) -> tuple[Floats, list[Floats]]:
        """Return the steps at which any of the metrics was logged, and each metric at them.

        Returns:
            Steps, shape ``(S,)``, and one array of shape ``(S,)`` a name, NaN where it is missing.
        """
        series = [self.values.get(name, {}) for name in names]
        steps = sorted(set().union(*series))
        columns = [np.array([one.get(s, math.nan) for s in steps], dtype=float) for one in series]
        return np.array(steps, dtype=float), columns

    def reward_names(self) -> list[str]:
        """Return the names of the reward functions, in alphabetical order."""
        found = (re.fullmatch(r"rewards/(.+)/mean", name) for name in self.values)
        return sorted(m.group(1) for m in found if m and self.has(m.string))


def _finite(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)


@dataclass(frozen=True)
class Plot:
    """One picture of the report.

    Attributes:
        name: File name without its ending.
        title: Of the picture, and of its section.
        y_label: With the unit.
        needs: It is drawn if one of these metrics was logged.
        draw: Fills the axes.
        absent: Says why there is nothing to draw, given the settings.
    """

    name: str
    title: str
    y_label: str
    needs: tuple[str, ...]
    draw: Callable[[Axes, History], None]
    absent: Callable[[Mapping[str, object]], str]


def write_report(
    output_dir: str | Path,
    *,
    summary: Mapping[str, object],
    log_history: Sequence[Mapping[str, object]],
    settings: Mapping[str, object],
    examples: Sequence[Example] = (),
) -> Path:
    """Write ``summary.json``, ``report.md`` and ``plots/*.png``; call it on one process only.

    Call it last: the report lists the files of the folder, and how to load a model that is there.

    Args:
        output_dir: Created if it is missing. Plots of an earlier report are replaced.
        summary: The result. ``accuracy_before``, ``accuracy_after`` and ``num_eval_prompts`` make
            the headline; ``versions`` is filled in if missing.
        log_history: ``trainer.state.log_history``.
        settings: What the run was started with. Values under keys such as ``api_key`` or
            ``hub_token`` are not written.
        examples: Completions before and after, shown as they are but for control characters.

    Returns:
        The path of ``report.md``.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    history = History.of(log_history)
    clean_summary = _ordered({"versions": library_versions(), **_clean_mapping(summary)})
    clean_settings = _clean_mapping(settings)
    _write_atomically(folder / "summary.json", json.dumps(clean_summary, indent=2) + "\n")
    drawn = write_plots(folder / "plots", history)
    sections = [
        _headline(clean_summary),
        _summary_section(clean_summary),
        _rewards_section(history),
        *(_plot_section(plot, drawn=drawn, settings=clean_settings) for plot in PLOTS),
        _examples_section(examples),
        _loading_section(folder),
        _settings_section(clean_settings),
        _versions_section(clean_summary),
    ]
    path = folder / "report.md"
    sections.append(_files_section(folder))
    _write_atomically(path, "\n\n".join(filter(None, sections)) + "\n")
    return path


def library_versions() -> dict[str, str]:
    """Return the versions of python and of the libraries a run stands on, and the device's name."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {**versions, "device": _device_name()}


def wilson_interval(share: float, *, num_trials: int) -> tuple[float, float]:
    r"""Return the 95% confidence interval of a share, sound also near 0 and 1.

    .. math:: \frac{p + z^2/2n \pm z \sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}

    Args:
        share: ``p``, from 0 to 1.
        num_trials: ``n``, at least 1.

    Returns:
        The lower and the upper end, from 0 to 1.

    References:
        Wilson 1927, Probable inference, J. Am. Stat. Assoc. 22, 209-212.

    Example:
        >>> low, high = wilson_interval(0.5, num_trials=64)
        >>> f"{low:.3f} {high:.3f}"
        '0.381 0.619'
    """
    z2 = WILSON_Z**2 / num_trials
    spread = WILSON_Z * math.sqrt(share * (1 - share) / num_trials + z2 / (4 * num_trials))
    low, high = ((share + z2 / 2 + sign * spread) / (1 + z2) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


# --- Plots ---------------------------------------------------------------------------------------


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
    steps, (total, *seconds) = history.columns(
        "step_time", *(metric for metric, _ in PHASES.values())
    )
    parts = [np.nan_to_num(column) for column in seconds]
    rest = np.clip(np.nan_to_num(total) - np.sum(parts, axis=0), 0, None)
    layers = [
        *(
            (name, part, colour)
            for (name, (_, colour)), part in zip(PHASES.items(), parts, strict=True)
        ),
        ("other", rest, GREY) if any(part.any() for part in parts) else ("step", rest, BLUE),
    ]
    layers = [layer for layer in layers if layer[1].any()]
    if len(steps) > MAX_BARS:
        names, values, colours = zip(*layers, strict=True)
        axes.stackplot(steps, *values, labels=names, colors=colours, lw=0)
        return
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


def _why_no_kl(settings: Mapping[str, object]) -> str:
    if settings.get("beta") == 0:
        return "KL: not logged, `beta` is 0, so there is no reference model."
    return "KL: not logged in this run."


PLOTS = (
    Plot(
        name="reward",
        title="Reward",
        y_label="reward (points per completion)",
        needs=("reward",),
        draw=_draw_reward,
        absent=lambda settings: "Reward: not logged in this run.",
    ),
    Plot(
        name="kl",
        title="KL divergence from the reference",
        y_label="KL (nats per token)",
        needs=("kl",),
        draw=_draw_kl,
        absent=_why_no_kl,
    ),
    Plot(
        name="length",
        title="Completion length",
        y_label="length (tokens)",
        needs=("completions/mean_length",),
        draw=_draw_length,
        absent=lambda settings: "Completion length: not logged in this run.",
    ),
    Plot(
        name="grad_norm",
        title="Gradient norm before clipping",
        y_label="L2 norm",
        needs=("grad_norm",),
        draw=_draw_gradient_norm,
        absent=lambda settings: "Gradient norm: not logged in this run.",
    ),
    Plot(
        name="time",
        title="Time per step",
        y_label="time (s)",
        needs=("step_time", *(metric for metric, _ in PHASES.values())),
        draw=_draw_time,
        absent=lambda settings: "Time per step: not logged in this run.",
    ),
)


# --- Sections of report.md -----------------------------------------------------------------------


def _headline(summary: Mapping[str, object]) -> str:
    title = "# Training report"
    after = _accuracy_text("after", summary)
    if not after:
        return title
    before = _accuracy_text("before", summary)
    arrow = f"{before} → {after}" if before else after
    return f"{title}\n\n**Accuracy: {arrow}** on {_held_out(summary)}."


def _accuracy_text(when: str, summary: Mapping[str, object]) -> str:
    accuracy, num_prompts = summary.get(f"accuracy_{when}"), summary.get("num_eval_prompts")
    if not isinstance(accuracy, int | float):
        return ""
    if not isinstance(num_prompts, int) or num_prompts < 1:
        return f"{accuracy:.1%}"
    low, high = wilson_interval(accuracy, num_trials=num_prompts)
    return f"{accuracy:.1%} ({low:.1%} to {high:.1%})"


def _held_out(summary: Mapping[str, object]) -> str:
    num_prompts = summary.get("num_eval_prompts")
    if not isinstance(num_prompts, int) or num_prompts < 1:
        return "held-out prompts"
    return f"{num_prompts} held-out prompts (in brackets: Wilson's 95% intervals)"


def _summary_section(summary: Mapping[str, object]) -> str:
    rows = [(key, value) for key, value in summary.items() if key != "versions"]
    return _section("Summary", _table(("", "value"), rows))


def _settings_section(settings: Mapping[str, object]) -> str:
    return _section("Settings", _table(("setting", "value"), sorted(settings.items())))


def _versions_section(summary: Mapping[str, object]) -> str:
    versions = summary["versions"]
    rows = list(versions.items()) if isinstance(versions, Mapping) else [("versions", versions)]
    return _section("Versions and device", _table(("", "version"), rows))


def _rewards_section(history: History) -> str:
    metrics = {"reward": "reward"}
    metrics |= {f"rewards/{name}/mean": name for name in history.reward_names()}
    logged = {metric: title for metric, title in metrics.items() if history.has(metric)}
    if not logged:
        return ""
    num_logs = max(len(history.logged(metric)) for metric in logged)
    window = max(1, min(5, num_logs // 2))
    ends = f"first {window} logged", f"last {window} logged"
    rows = [(title, *_ends(history, metric, window=window)) for metric, title in logged.items()]
    note = "`reward` is what the trainer aggregated; each function is shown before its weight."
    return _section("Rewards", f"{note}\n\n{_table(('reward', *ends, 'change'), rows)}")


def _ends(history: History, metric: str, *, window: int) -> tuple[float, float, float]:
    values = history.logged(metric)
    first, last = float(np.mean(values[:window])), float(np.mean(values[-window:]))
    return first, last, last - first


def _plot_section(plot: Plot, *, drawn: set[str], settings: Mapping[str, object]) -> str:
    if plot.name not in drawn:
        return _section(plot.title, plot.absent(settings))
    return _section(plot.title, f"![{plot.title}](plots/{plot.name}.png)")


def _examples_section(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    return _section("Examples", "\n\n".join(map(_example, range(1, len(examples) + 1), examples)))


def _example(number: int, example: Example) -> str:
    parts = [f"### Example {number}", "Prompt:", _fenced(example.prompt)]
    parts += [f"Expected answer: {_code_span(example.answer)}"]
    parts += ["Before training:", _fenced(example.before)]
    return "\n\n".join([*parts, "After training:", _fenced(example.after)])


def _loading_section(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        imports = (
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
        )
        model_class = "AutoPeftModelForCausalLM"
    elif (folder / "config.json").exists():
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
        model_class = "AutoModelForCausalLM"
    else:
        return _section(
            "Load the model", "There was no model in this folder when this was written."
        )
    lines = [
        imports,
        "",
        f"folder = {json.dumps(str(folder))}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {model_class}.from_pretrained(folder)",
    ]
    return _section("Load the model", _fenced("\n".join(lines), language="python"))


def _files_section(folder: Path) -> str:
    """List what lies next to the report."""
    paths = sorted(p for p in folder.iterdir() if p.name[0] != "." and p.name != "report.md")
    rows = [(path.name, _describe(path.name), _file_size(path)) for path in paths]
    body = "\n".join(f"| {_code_span(name)} | {what} | {size} |" for name, what, size in rows)
    return _section("Files in this folder", f"| file | what it is | size |\n|---|---|---:|\n{body}")


def _describe(name: str) -> str:
    if name.startswith("checkpoint-"):
        return "checkpoint to resume from"
    if name.endswith(".safetensors"):
        return "weights"
    return FILES.get(name, "")


def _file_size(path: Path) -> str:
    files = path.rglob("*") if path.is_dir() else [path]
    size = float(sum(file.stat().st_size for file in files if file.is_file()))
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


# --- Markdown that untrusted text cannot break ---------------------------------------------------


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a markdown table; the first column holds names, the others values."""
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join([_code_span(str(name)), *map(_cell, values)]) for name, *values in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool | int):
        return str(value)
    return _code_span(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _code_span(text: str) -> str:
    """Return text as inline code on one line, also inside a table."""
    if not text:
        return ""
    line = _visible(text).replace("\t", "\\t").replace("\n", "\\n").replace("|", "\\|")
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if "`" in line or not line.strip() else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def _fenced(text: str, *, language: str = "text") -> str:
    """Return text as a code block that it cannot close, cut where it is very long."""
    shown = _visible(text[:MAX_EXAMPLE_CHARS])
    cut = len(text) - MAX_EXAMPLE_CHARS
    fence = "`" * max(3, _longest_run(shown) + 1)
    block = f"{fence}{language}\n{shown}\n{fence}"
    return block if cut <= 0 else f"{block}\n\n({cut} more characters)"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _visible(text: str) -> str:
    """Return text with control characters, and those that turn the writing direction, spelt out."""
    return "".join(
        character if character in "\n\t" or not _is_hidden(character) else _escape(character)
        for character in text
    )


def _is_hidden(character: str) -> bool:
    turns_direction = unicodedata.bidirectional(character) in _BIDI_CONTROLS
    return turns_direction or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


_BIDI_CONTROLS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


# --- Values as JSON ------------------------------------------------------------------------------


def _clean_mapping(values: Mapping[str, object]) -> dict[str, object]:
    return {
        str(key): "(not shown)" if SECRET_KEY.search(str(key)) and value else _clean(value)
        for key, value in values.items()
    }


def _clean(value: object) -> object:
    """Return what strict JSON can hold: NaN becomes null, what it does not know a string."""
    if isinstance(value, Mapping):
        return _clean_mapping(value)
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, np.generic):
        return _clean(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def _ordered(summary: Mapping[str, object]) -> dict[str, object]:
    def rank(key: str) -> tuple[int, bool, str]:
        first = SUMMARY_ORDER.index(key) if key in SUMMARY_ORDER else len(SUMMARY_ORDER)
        return first, isinstance(summary[key], Mapping | list), key

    return {key: summary[key] for key in sorted(summary, key=rank)}


def _write_atomically(path: Path, text: str) -> None:
    """Write a file that a reader sees whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@functools.cache
def _device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name(0)} (one of {torch.cuda.device_count()})"
    if torch.backends.mps.is_available():
        return "Apple GPU (MPS)"
    return f"CPU: {_cpu_name()} ({os.cpu_count()} cores)"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1) if found else platform.processor() or platform.machine()
