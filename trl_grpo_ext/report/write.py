"""Writing ``summary.json``, ``report.md`` and the plots, with values that strict JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trl_grpo_ext.files import write_atomically, write_summary
from trl_grpo_ext.redaction import HIDDEN, is_secret, without_credentials
from trl_grpo_ext.report.history import History
from trl_grpo_ext.report.page import Example, render_page
from trl_grpo_ext.report.plots import write_plots
from trl_grpo_ext.report.versions import library_versions

# What comes first in summary.json; the rest follows by name, nested values at the end.
SUMMARY_ORDER = (
    "model",
    "task",
    "dataset",
    "accuracy_before",
    "accuracy_after",
    "num_eval_prompts",
    "eval_samples",
    "steps",
    "minutes",
    "seed",
)


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
            the headline. ``eval_samples``, also looked up in the settings, says how accuracy was
            measured: on how many sampled replies to each prompt, or 0 for the greedy one.
            ``versions`` is filled in if missing.
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
    clean_summary = _ordered({"versions": library_versions(), **clean_mapping(summary)})
    clean_settings = clean_mapping(settings)
    write_summary(folder, clean_summary)
    drawn = write_plots(folder / "plots", history)
    page = render_page(
        folder,
        summary=clean_summary,
        settings=clean_settings,
        history=history,
        drawn=drawn,
        examples=examples,
    )
    path = folder / "report.md"
    write_atomically(path, page)
    return path


def clean_mapping(values: Mapping[str, object]) -> dict[str, object]:
    """Return what strict JSON can hold, without secrets: NaN becomes null, others a string."""
    return {
        str(key): HIDDEN if is_secret(str(key)) and value else _clean(value)
        for key, value in values.items()
    }


def _clean(value: object) -> object:
    """Return what strict JSON can hold: NaN becomes null, what it does not know a string."""
    if isinstance(value, Mapping):
        return clean_mapping(value)
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, np.generic):
        return _clean(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int | None):
        return value
    return without_credentials(str(value))


def _ordered(summary: Mapping[str, object]) -> dict[str, object]:
    def rank(key: str) -> tuple[int, bool, str]:
        first = SUMMARY_ORDER.index(key) if key in SUMMARY_ORDER else len(SUMMARY_ORDER)
        return first, isinstance(summary[key], Mapping | list), key

    return {key: summary[key] for key in sorted(summary, key=rank)}
