"""How good a trained reward model is on held-out prompts, and the report of its training.

The scores are those of the reward that loads the saved folder, so what is measured is what a GRPO
run will get.

Shapes: ``S`` steps over all solutions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from trl_grpo_ext.files import write_summary
from trl_grpo_ext.report.markdown import fenced, section, table
from trl_grpo_ext.report.versions import library_versions
from trl_grpo_ext.rewards.models.outcome import OutcomeModelReward
from trl_grpo_ext.rewards.models.process import ProcessModelReward
from trl_grpo_ext.rewards.models.steps import StepScores
from trl_grpo_ext.rewards.models.training_options import RewardModelArguments

NUM_EXAMPLES = 6
RIGHT_FROM = 0.5  # [reward] a step with at least this score is called right


def measure(folder: str, rows: Dataset, *, options: RewardModelArguments) -> dict[str, Any]:
    """Return what a trained model is worth on held-out rows: the saved folder, as rewards load it.

    Args:
        folder: Of the model.
        rows: From :func:`~trl_grpo_ext.rewards.models.training_data.make_rows`.
        options: The same.
    """
    if options.kind == "outcome":
        return measure_pairs(rows, OutcomeModelReward(folder))
    separator = options.step_separator
    reward = ProcessModelReward(folder, step_separator=separator)
    return measure_steps(rows, reward.step_scores, separator=separator)


def measure_pairs(pairs: Dataset, reward: Callable[..., Any]) -> dict[str, Any]:
    """Return the accuracy of an outcome model on pairs, of each source too.

    Args:
        pairs: As :func:`~trl_grpo_ext.rewards.models.training_data.preference_pairs` makes them.
        reward: Scores ``prompts`` and ``completions``, as TRL calls it.

    Returns:
        ``num_heldout_pairs``, ``pair_accuracy`` and ``pair_accuracy_<source>``, and ``examples``.
    """
    prompts, sources = list(pairs["prompt"]), list(pairs["source"])
    chosen = reward(prompts=prompts, completions=list(pairs["chosen"]))
    rejected = reward(prompts=prompts, completions=list(pairs["rejected"]))
    found: dict[str, Any] = {
        "num_heldout_pairs": len(prompts),
        "pair_accuracy": pair_accuracy(chosen, rejected),
    }
    for source in sorted(set(sources)):
        of_source = [index for index, name in enumerate(sources) if name == source]
        found[f"pair_accuracy_{source}"] = pair_accuracy(
            [chosen[index] for index in of_source], [rejected[index] for index in of_source]
        )
    shown = range(0, len(prompts), max(len(prompts) // NUM_EXAMPLES, 1))
    examples = [
        [*_shown(pairs[i]["chosen"], chosen[i]), *_shown(pairs[i]["rejected"], rejected[i])]
        for i in shown
    ]
    header = ("right reply", "score", "wrong reply", "score")
    return {**found, "examples": (header, examples)}


def measure_steps(
    solutions: Dataset, score: Callable[..., Sequence[StepScores | None]], *, separator: str
) -> dict[str, Any]:
    """Return how well a process model tells right steps from wrong ones, by source too.

    Args:
        solutions: As :func:`~trl_grpo_ext.rewards.models.training_data.step_solutions` makes them.
        score: Gives the scores of the steps of ``completions``, from 0 (wrong) to 1.
        separator: Between steps.

    Returns:
        ``num_heldout_steps``, ``right_steps_fraction`` (what always saying "right" would get),
        ``step_accuracy``, ``step_auc``, both with ``_<source>`` too, and ``examples``. Solutions
        that the model cuts into other steps are left out.
    """
    texts = [separator.join(steps) for steps in solutions["completions"]]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    found = score(prompts=list(solutions["prompt"]), completions=completions)
    steps: list[tuple[float, bool, str]] = []
    examples = []
    for row, scored in zip(solutions, found, strict=True):
        if scored is None or len(scored.scores) != len(row["labels"]):
            continue
        steps += [(*pair, row["source"]) for pair in zip(scored.scores, row["labels"], strict=True)]
        examples.append(_step_example(row, scored))
    measures: dict[str, Any] = {
        "num_heldout_steps": len(steps),
        "right_steps_fraction": _mean([label for _, label, _ in steps]),
        **_step_measures(steps),
    }
    for source in sorted({source for _, _, source in steps}):
        of_source = [step for step in steps if step[2] == source]
        measures |= _step_measures(of_source, suffix=f"_{source}")
    shown = examples[:: max(len(examples) // NUM_EXAMPLES, 1)]
    return {
        **measures,
        "examples": (("step", "label", "score"), [r for rows in shown for r in rows]),
    }


def pair_accuracy(chosen: Sequence[float | None], rejected: Sequence[float | None]) -> float:
    """Return the share of pairs whose right reply has the higher score; NaN without a pair.

    Args:
        chosen: Scores of the right replies; a pair with ``None`` does not count.
        rejected: Scores of the wrong ones.

    Example:
        >>> pair_accuracy([1.0, 0.5, 2.0], [0.0, 0.5, None])
        0.5
    """
    pairs = zip(chosen, rejected, strict=True)
    wins = [a > b for a, b in pairs if a is not None and b is not None]
    return sum(wins) / len(wins) if wins else float("nan")


def area_under_curve(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Return how often a right step scores above a wrong one, a tie counting half.

    It is the area under the ROC curve: 0.5 for scores that say nothing; NaN if one kind is missing.

    Args:
        scores: ``S`` scores.
        labels: Whether each step is right.

    Example:
        >>> area_under_curve([0.9, 0.4, 0.4, 0.1], [True, True, False, False])
        0.875
    """
    scores_S, labels_S = torch.tensor(scores, dtype=torch.float64), torch.tensor(labels)
    right, wrong = scores_S[labels_S], scores_S[~labels_S]
    if not len(right) or not len(wrong):
        return float("nan")
    above = (right[:, None] > wrong).double() + (right[:, None] == wrong).double() / 2
    return above.mean().item()


def write_training_report(
    output_dir: str | Path,
    measures: Mapping[str, Any],
    about: Mapping[str, Any],
    log_history: Sequence[Mapping[str, Any]],
    *,
    settings: Mapping[str, Any],
    options: RewardModelArguments,
) -> Path:
    """Write ``summary.json`` and ``report.md``; call it on one process only.

    Args:
        output_dir: Of the trained model.
        measures: From :func:`measure_pairs` or :func:`measure_steps`.
        about: What else the summary holds, such as the seed.
        log_history: ``trainer.state.log_history``.
        settings: What the run was started with.
        options: Of the reward model.

    Returns:
        The path of ``report.md``.
    """
    folder, numbers = Path(output_dir), {k: v for k, v in measures.items() if k != "examples"}
    losses = [entry["loss"] for entry in log_history if "loss" in entry]
    ends = {"loss_first": losses[0], "loss_last": losses[-1]} if losses else {}
    summary = {**about, **_finite(numbers), **ends, "versions": library_versions()}
    write_summary(folder, summary)
    header, rows = measures["examples"]
    shown = [(key, value) for key, value in summary.items() if key != "versions"]
    parts = [
        "# Reward model",
        section("Result", table(("", "value"), shown)),
        section("Use it", fenced(_usage(folder, options), language="yaml")),
        section("Held-out examples", table(header, rows)),
        section("Loss", table(("step", "loss"), _losses(log_history))),
        section("Settings", table(("setting", "value"), sorted(settings.items()))),
        section("Versions and device", table(("", "version"), summary["versions"].items())),
    ]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def headline(measures: Mapping[str, Any]) -> str:
    """Return one line for a terminal."""
    if "pair_accuracy" in measures:
        return (
            f"Held-out accuracy of pairs: {measures['pair_accuracy']:.3f} "
            f"({measures['num_heldout_pairs']} pairs)"
        )
    return (
        f"Held-out accuracy of steps: {measures['step_accuracy']:.3f}, area under the curve "
        f"{measures['step_auc']:.3f} ({measures['num_heldout_steps']} steps, "
        f"{measures['right_steps_fraction']:.3f} of them right)"
    )


def _usage(folder: Path, options: RewardModelArguments) -> str:
    arguments: dict[str, str] = {"model": str(folder)}
    if options.kind == "process":
        arguments["step_separator"] = options.step_separator
    entry = {"name": f"{options.kind}_model", "weight": 1.0, "arguments": arguments}
    judge = {"name": "last_number", "weight": 0}
    return f"rewards:\n  - {json.dumps(judge)}  # judges accuracy only\n  - {json.dumps(entry)}"


def _step_measures(
    steps: Sequence[tuple[float, bool, str]], *, suffix: str = ""
) -> dict[str, float]:
    scores, labels = [score for score, _, _ in steps], [label for _, label, _ in steps]
    hits = [(score >= RIGHT_FROM) is label for score, label, _ in steps]
    return {
        f"step_accuracy{suffix}": _mean(hits),
        f"step_auc{suffix}": area_under_curve(scores, labels),
    }


def _step_example(row: Mapping[str, Any], scored: StepScores) -> list[tuple[str, str, float]]:
    labels = ["right" if label else "wrong" for label in row["labels"]]
    return list(zip(row["completions"], labels, scored.scores, strict=True))


def _shown(reply: Sequence[Mapping[str, str]], score: float | None) -> tuple[str, float | None]:
    return reply[0]["content"], score


def _losses(log_history: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    logged = [(str(entry["step"]), entry["loss"]) for entry in log_history if "loss" in entry]
    return logged[:: max(len(logged) // 10, 1)]


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else math.nan


def _finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """NaN, where there was nothing to measure, is null in JSON."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in numbers.items()
    }
