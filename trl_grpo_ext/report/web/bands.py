"""What is shaded around a curve, and the words for it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trl_grpo_ext.metrics import EVALUATION
from trl_grpo_ext.report.web.run_folder import Run
from trl_grpo_ext.report.web.series import Band, standard_error_band

LENGTH = "completions/mean_length"
CORRECT = re.compile(rf"{EVALUATION}(.*?)(accuracy|(pass|maj)@\d+)")


def band_of(run: Run, metric: str) -> Band | None:
    """Return what is shaded around a metric at its steps; ``None`` for nothing."""
    spread = _spread_metrics(metric)
    if spread is None or not all(run.history.has(name) for name in spread):
        return None
    _, columns = run.history.columns(metric, *spread)
    there_S = [step in run.history.values[metric] for step in _all_steps(run, metric, *spread)]
    mean_S, *others = (column[there_S] for column in columns)
    if len(others) == 2:
        return others[0], others[1]
    return standard_error_band(mean_S, others[0], num_prompts=run.completions.num_prompts or 1)


def _all_steps(run: Run, *metrics: str) -> list[float]:
    steps_S, _ = run.history.columns(*metrics)
    return [float(step) for step in steps_S]


def _spread_metrics(metric: str) -> tuple[str, ...] | None:
    """Return the metrics that say how far a metric spreads: both ends, or a deviation."""
    if match := CORRECT.fullmatch(metric):
        return f"{metric}/low", f"{metric}/high"
    if metric == LENGTH:
        return "completions/min_length", "completions/max_length"
    if metric == "reward":
        return ("reward_std",)
    match = re.fullmatch(r"(rewards/.+)/mean", metric)
    return (f"{match[1]}/std",) if match else None


def band_caption(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    """Return what the band around these metrics is; ``""`` where there is none."""
    if not metrics:
        return ""
    if CORRECT.fullmatch(metrics[0]):
        return "Band: 95% interval by the bootstrap over prompts."
    if metrics[0] == LENGTH:
        return "Band: shortest to longest."
    known = {run.completions.num_prompts for run in runs}
    if known == {None}:
        return "Band: one standard deviation over the completions of a step."
    numbers = " or ".join(str(number) for number in sorted(known - {None}, key=lambda n: n or 0))
    return (
        f"Band: standard error: deviation over completions / √({numbers} prompts), each prompt "
        "counted once; too wide rather than too narrow."
        + (" One deviation where the number of prompts is not known." if None in known else "")
    )
