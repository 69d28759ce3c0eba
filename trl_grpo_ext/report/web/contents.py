"""What the page shows of one run or of several, part by part."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from trl_grpo_ext.report.accuracy import wilson_interval
from trl_grpo_ext.report.plots import PHASES
from trl_grpo_ext.report.web.bands import CORRECT, LENGTH
from trl_grpo_ext.report.web.charts import Chart, Line
from trl_grpo_ext.report.web.panels import Named, Panel
from trl_grpo_ext.report.web.run_folder import Run
from trl_grpo_ext.report.web.series import phase_times, tokens_per_second, wilson_band


def _only(metric: str, label: str = "") -> Callable[[Run], Sequence[Named]]:
    return lambda run: [(label or metric, metric)]


def _all_like(pattern: str) -> Callable[[Run], Sequence[Named]]:
    """Find all metrics that match, named by the first group."""

    def find(run: Run) -> Sequence[Named]:
        found = (re.fullmatch(pattern, name) for name in run.history.values)
        return sorted((match[1], match.string) for match in found if match)

    return find


def _correct(prefix: str) -> Callable[[Run], Sequence[Named]]:
    """Find accuracy, then pass@k and votes in their order, of a data set or a reward.

    pass@1 is the accuracy again, where both were logged.
    """

    def find(run: Run) -> Sequence[Named]:
        found = [match for match in _evaluations(run) if match[1] == prefix]
        names = {match[2] for match in found}
        named = {match[2]: match.string for match in sorted(found, key=_order)}
        return [pair for pair in named.items() if pair[0] != "pass@1" or "accuracy" not in names]

    return find


def _evaluations(run: Run) -> list[re.Match[str]]:
    return [match for name in run.history.values if (match := CORRECT.fullmatch(name))]


def _order(match: re.Match[str]) -> tuple[int, int]:
    kind, _, k = match[2].partition("@")
    return ("accuracy", "pass", "maj").index(kind), int(k or 0)


def _evaluation_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return a chart for each data set or reward that was evaluated."""
    prefixes = sorted({match[1] for run in runs for match in _evaluations(run)})
    titles = {
        prefix: ": ".join(filter(None, ["Evaluation", prefix.strip("_/")])) for prefix in prefixes
    }
    return [
        chart
        for prefix, title in titles.items()
        for chart in Panel(title, "share", _correct(prefix), from_zero=True).charts(runs)
    ]


def _components(run: Run) -> list[Named]:
    return [(name, f"rewards/{name}/mean") for name in run.history.reward_names()]


def _losses(run: Run) -> list[Named]:
    """The loss; of a supervised run, that of held-out data too."""
    if not run.history.has("mean_token_accuracy"):
        return [("loss", "loss")]
    return [("training", "loss"), ("held-out data", "eval_loss")]


def accuracy_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return evaluations during training, and the accuracy before and after it."""
    charts = _evaluation_charts(runs)
    lines = [line for n, run in enumerate(runs) if (line := _before_and_after(run, n))]
    if not lines:
        return charts
    if len(runs) == 1:
        lines = [replace(lines[0], name="held-out prompts")]
    ends = Chart(
        title="Accuracy before and after",
        unit="share",
        lines=lines,
        caption="Bars: Wilson's 95% interval, each held-out prompt counted once.",
        from_zero=True,
    )
    return [ends, *charts]


def _before_and_after(run: Run, colour: int) -> Line | None:
    summary = run.summary
    shares = [summary.get(f"accuracy_{end}") for end in ("before", "after")]
    values = np.array([s if isinstance(s, int | float) else math.nan for s in shares], dtype=float)
    if not np.isfinite(values).any():
        return None
    num_prompts, last = summary.get("num_eval_prompts"), summary.get("steps")
    band = None
    if isinstance(num_prompts, int) and num_prompts > 0:
        band = wilson_band(values, np.full(2, float(num_prompts)))
    steps = np.array([0.0, float(last) if isinstance(last, int | float) and last > 0 else 1.0])
    return Line(run.name, steps, values, band=band, colour=colour, style="points")


def time_charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the time of a step, by phase for one run, and the throughput."""
    charts = STEP_TIME_PANEL.charts(runs) if len(runs) > 1 else _phases(runs[0])
    lines = [
        Line("tokens a second" if len(runs) == 1 else run.name, *found, colour=n)
        for n, run in enumerate(runs)
        for found in [tokens_per_second(run.history)]
        if len(found[0])
    ]
    if lines:
        caption = "Tokens of prompts and completions, by the time of a whole step."
        charts.append(Chart("Throughput", "tokens a second", lines, (), caption, from_zero=True))
    return charts


def _phases(run: Run) -> list[Chart]:
    steps_S, times = phase_times(run.history)
    colours = {label: n for n, label in enumerate([*(label for label, _, _ in PHASES), "other"])}
    lines = [
        Line(label, steps_S, times_S, colour=colours[label], style="area")
        for label, times_S in times.items()
    ]
    caption = "Stacked; the top is the whole step, without the optimizer itself."
    return [Chart("Time of a step", "seconds", lines, (), caption, from_zero=True)] if lines else []


def wilson_text(share: float, num_prompts: object) -> str:
    """Return a share in percent, with its interval if the number of prompts is known.

    Example:
        >>> wilson_text(0.5, 64), wilson_text(0.5, None)
        ('50.0% (38.1% to 61.9%)', '50.0%')
    """
    if not isinstance(num_prompts, int) or num_prompts < 1 or not 0 <= share <= 1:
        return f"{share:.1%}"
    low, high = wilson_interval(share, num_trials=num_prompts)
    return f"{share:.1%} ({low:.1%} to {high:.1%})"


REWARD_UNIT = "points a completion"
STEP_TIME_PANEL = Panel("Time of a step", "seconds", _only("step_time"), from_zero=True)
REWARDS = (
    Panel("Reward", REWARD_UNIT, _only("reward", "mean"), "No reward was logged in this run."),
    Panel("Reward by component, before its weight", REWARD_UNIT, _components),
    Panel(
        "Silent groups (zero variance)",
        "share",
        _only("frac_reward_zero_std", "silent groups"),
        "The share of silent groups was not logged: it comes with the rewards of GRPO.",
        from_zero=True,
    ),
    Panel(
        "Completions without a score",
        "share",
        lambda run: [
            ("left out of the batch", "rewards/excluded_fraction"),
            *_all_like(r"rewards/(.+)/unscored_fraction")(run),
        ],
        from_zero=True,
        skip_zeros=True,
    ),
    Panel(
        "Dynamic sampling",
        "groups drawn / kept",
        _only("dynamic_sampling/cost", "cost"),
        from_zero=True,
    ),
)
COMPLETIONS = (
    Panel(
        "Completion length",
        "tokens",
        _only(LENGTH, "mean"),
        "No completion lengths were logged: they come with GRPO.",
        from_zero=True,
    ),
    Panel(
        "Truncated completions", "share", _only("completions/clipped_ratio", "truncated"), "", True
    ),
)
POLICY = (
    Panel(
        "KL from the reference",
        "nats a token",
        _only("kl", "KL"),
        "No KL was logged: with `beta: 0` there is no reference model.",
        from_zero=True,
    ),
    Panel("Entropy", "nats a token", _only("entropy"), from_zero=True),
    Panel("Loss", "", _losses),
    Panel("Token accuracy", "share", _only("mean_token_accuracy", "training"), from_zero=True),
    Panel("Gradient norm before clipping", "L2 norm", _only("grad_norm", "norm"), from_zero=True),
    Panel("Clipped tokens", "share", _only("clip_ratio/region_mean", "clipped"), "", True, True),
    Panel("Learning rate", "", _only("learning_rate"), from_zero=True),
    Panel("Skipped steps", "steps", _only("skipped_steps", "skipped"), "", True, True),
)


def sections(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """Return the charts by the title of their part of the page; parts without charts are out."""
    found = {
        "Accuracy": accuracy_charts(runs),
        "Rewards": [chart for panel in REWARDS for chart in panel.charts(runs)],
        "Completions": [chart for panel in COMPLETIONS for chart in panel.charts(runs)],
        "Policy": [chart for panel in POLICY for chart in panel.charts(runs)],
        "Time": time_charts(runs),
    }
    return {title: charts for title, charts in found.items() if charts}


def missing(runs: Sequence[Run]) -> list[str]:
    """Return sentences on what a reader may look for and does not find."""
    sentences = [
        panel.missing
        for panel in (*REWARDS, *COMPLETIONS, *POLICY)
        if panel.missing and not panel.charts(runs)
    ]
    if not _evaluation_charts(runs):
        sentences.append(
            "There are no evaluations in the course of training: `eval_strategy: steps` and "
            "`eval_steps` make them."
        )
    if not any(run.completions.steps for run in runs):
        sentences.append("There are no completions: `log_completions: true` keeps them.")
    if not time_charts(runs):
        sentences.append("No times were logged: `step_time` comes with every log of GRPO.")
    return sentences
