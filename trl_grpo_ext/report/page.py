"""The sections of ``report.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trl_grpo_ext.report.accuracy import headline
from trl_grpo_ext.report.history import History
from trl_grpo_ext.report.markdown import code_span, fenced, section, table
from trl_grpo_ext.report.plots import PLOTS, Plot

FILES = {
    "README.md": "model card",
    "adapter_config.json": "settings of the adapter",
    "chat_template.jinja": "how a conversation becomes tokens",
    "completions": "every completion with its rewards, as parquet",
    "config.json": "architecture of the model",
    "generation_config.json": "default settings of `generate`",
    "metrics.jsonl": "every logged metric, one JSON object a line",
    "plots": "the plots of this report",
    "summary.json": "the result, for programs",
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "settings of the tokenizer",
    "training_args.bin": "all training arguments",
}

FIDELITY = {
    "reference/kl_floor": "KL floor, k3 (nats a token)",
    "reference/kl_floor_k1": "KL floor, k1 (nats a token)",
    "reference/kl_floor_full": "KL floor over the whole vocabulary (nats a token)",
    "reference/top_token_agreement": "share of tokens with the same likeliest one",
    "reference/gradient_cosine": "cosine between the gradients of the KL penalty",
}


@dataclass(frozen=True)
class Example:
    """One held-out prompt and what the model said before and after training."""

    prompt: str
    answer: str
    before: str
    after: str


def render_page(
    folder: Path,
    *,
    summary: Mapping[str, object],
    settings: Mapping[str, object],
    history: History,
    drawn: set[str],
    examples: Sequence[Example],
) -> str:
    """Return ``report.md`` for a folder that holds all the rest.

    Args:
        folder: Its files are listed, and how to load a model that is there.
        summary: Values that JSON can hold, with ``versions``.
        settings: Values that JSON can hold.
        history: What was logged.
        drawn: Names of the plots that are there.
        examples: Shown as they are but for control characters.
    """
    sections = [
        "# Training report",
        headline(summary, settings=settings),
        _summary_section(summary),
        _rewards_section(history),
        _reference_section(history),
        *(_plot_section(plot, drawn=drawn, settings=settings) for plot in _plots_of(history)),
        _examples_section(examples),
        _loading_section(folder),
        _settings_section(settings),
        _versions_section(summary),
        _files_section(folder),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _summary_section(summary: Mapping[str, object]) -> str:
    rows = [(key, value) for key, value in summary.items() if key != "versions"]
    return section("Summary", table(("", "value"), rows))


def _settings_section(settings: Mapping[str, object]) -> str:
    return section("Settings", table(("setting", "value"), sorted(settings.items())))


def _versions_section(summary: Mapping[str, object]) -> str:
    versions = summary["versions"]
    rows = list(versions.items()) if isinstance(versions, Mapping) else [("versions", versions)]
    return section("Versions and device", table(("", "version"), rows))


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
    return section("Rewards", f"{note}\n\n{table(('reward', *ends, 'change'), rows)}")


def _reference_section(history: History) -> str:
    rows = [
        (what, history.logged(metric)[0])
        for metric, what in FIDELITY.items()
        if history.has(metric)
    ]
    if not rows:
        return ""
    note = (
        "Measured on held-out prompts before training, while the policy was the model that the "
        "quantized reference stands for: the true KL is 0, the true agreement and cosine are 1."
    )
    return section("Fidelity of the reference", f"{note}\n\n{table(('', 'value'), rows)}")


def _ends(history: History, metric: str, *, window: int) -> tuple[float, float, float]:
    values = history.logged(metric)
    first, last = float(np.mean(values[:window])), float(np.mean(values[-window:]))
    return first, last, last - first


def _plots_of(history: History) -> list[Plot]:
    """Return the plots of this kind of run: a loss teaches, or a reward does."""
    is_supervised = history.has("mean_token_accuracy")
    supervised = ("loss", "grad_norm")
    return [
        plot
        for plot in PLOTS
        if (plot.name in supervised if is_supervised else plot.name != "loss")
    ]


def _plot_section(plot: Plot, *, drawn: set[str], settings: Mapping[str, object]) -> str:
    if plot.name in drawn:
        body = f"![{plot.title}](plots/{plot.name}.png)"
    elif plot.name == "kl" and settings.get("beta") == 0:
        body = "KL: not logged, `beta` is 0, so there is no reference model."
    else:
        body = f"{plot.subject}: not logged in this run."
    return section(plot.title, body)


def _examples_section(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    return section("Examples", "\n\n".join(map(_example, range(1, len(examples) + 1), examples)))


def _example(number: int, example: Example) -> str:
    parts = [
        f"### Example {number}",
        "Prompt:",
        fenced(example.prompt),
        f"Expected answer: {code_span(example.answer)}",
        "Before training:",
        fenced(example.before),
        "After training:",
        fenced(example.after),
    ]
    return "\n\n".join(parts)


def _loading_section(folder: Path) -> str:
    title = "Load the model"
    if (folder / "adapter_config.json").exists():
        model_class = "AutoPeftModelForCausalLM"
        imports = [f"from peft import {model_class}", "from transformers import AutoTokenizer"]
    elif (folder / "config.json").exists():
        model_class = "AutoModelForCausalLM"
        imports = [f"from transformers import {model_class}, AutoTokenizer"]
    else:
        return section(title, "There was no model in this folder when this was written.")
    lines = [
        *imports,
        "",
        f"folder = {json.dumps(str(folder))}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = {model_class}.from_pretrained(folder)",
    ]
    return section(title, fenced("\n".join(lines), language="python"))


def _files_section(folder: Path) -> str:
    """List what lies next to the report."""
    paths = sorted(p for p in folder.iterdir() if p.name[0] != "." and p.name != "report.md")
    rows = [(path.name, _describe(path.name), _file_size(path)) for path in paths]
    body = "\n".join(f"| {code_span(name)} | {what} | {size} |" for name, what, size in rows)
    return section("Files in this folder", f"| file | what it is | size |\n|---|---|---:|\n{body}")


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
