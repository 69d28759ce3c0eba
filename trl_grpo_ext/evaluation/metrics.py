"""The metrics of an evaluation: TRL's, accuracy, pass@k and majority votes, with intervals.

Every prompt counts the same: a value is the mean over prompts of the mean over a prompt's scored
completions. What no completion has a score for is NaN.

Shapes: ``P`` prompts, ``G`` completions a prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_grpo_ext.evaluation.estimators import bootstrap_interval, majority_at_k, pass_at_k
from trl_grpo_ext.evaluation.groups import EvalGroups


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """What decides about the metrics.

    Attributes:
        ks: The k of pass@k and, above 1, of majority votes.
        correct_threshold: A score from here on is a right answer.
        num_resamples: Behind each interval; 0 for no intervals.
        seed: Of the resamples.
        task_column: Column whose values get metrics of their own.
    """

    ks: Sequence[int] = (1,)
    correct_threshold: float = 0.5
    num_resamples: int = 1000
    seed: int = 0
    task_column: str | None = None


def group_metrics(groups: EvalGroups, settings: MetricSettings) -> dict[str, float]:
    """Return what the groups measure, by name; docs/evaluation.md has the table.

    Args:
        groups: Of at least one prompt, with at least one reward function.
        settings: What to report.

    Returns:
        Of all prompts, and under ``tasks/<value>/`` of those of each task. A mean over prompts has
        its interval beside it, as ``<name>/low`` and ``<name>/high``.
    """
    metrics = _metrics(groups, settings)
    if settings.task_column is None:
        return metrics
    tasks = [str(value) for value in groups.columns[settings.task_column]]
    for task in sorted(set(tasks)):
        of_task = groups.select([index for index, name in enumerate(tasks) if name == task])
        found = _metrics(of_task, settings)
        metrics |= {f"tasks/{task}/{name}": value for name, value in found.items()}
    return metrics


def spread_metrics(groups: EvalGroups) -> dict[str, float]:
    """Return TRL's metrics that are no means over prompts: deviations, and lengths in tokens.

    Args:
        groups: Of at least one prompt.

    Returns:
        Sample deviations over all scores, NaN with fewer than two. Lengths of the completions that
        ended are 0 if none did.
    """
    ended_B = groups.lengths_PG[~groups.truncated_PG].double()
    if not len(ended_B):
        ended_B = torch.zeros(1, dtype=torch.float64)
    return {
        "reward_std": _deviation(groups.reward_PG),
        **{f"rewards/{name}/std": _deviation(scores) for name, scores in groups.rewards.items()},
        "completions/min_length": float(groups.lengths_PG.min()),
        "completions/max_length": float(groups.lengths_PG.max()),
        "completions/mean_terminated_length": ended_B.mean().item(),
        "completions/min_terminated_length": ended_B.min().item(),
        "completions/max_terminated_length": ended_B.max().item(),
    }


def _metrics(groups: EvalGroups, settings: MetricSettings) -> dict[str, float]:
    metrics = {"num_prompts": float(groups.num_prompts)}
    for name, values_P in _measured_a_prompt(groups, settings):
        metrics[name] = values_P.nanmean().item()
        if settings.num_resamples:
            ends = bootstrap_interval(
                values_P, num_resamples=settings.num_resamples, seed=settings.seed
            )
            metrics[f"{name}/low"], metrics[f"{name}/high"] = ends
    for reward, scores_PG in groups.rewards.items():
        metrics[f"rewards/{reward}/scored"] = (~scores_PG.isnan()).double().mean().item()
    return metrics


def _measured_a_prompt(
    groups: EvalGroups, settings: MetricSettings
) -> Iterator[tuple[str, Tensor]]:
    """Yield what has one value a prompt, and therefore an interval.

    The first reward function is the one that judges: what is right by it needs no name.
    """
    yield "reward", _mean_a_prompt(groups.reward_PG)
    yield "completions/mean_length", _mean_a_prompt(groups.lengths_PG)
    yield "completions/clipped_ratio", _mean_a_prompt(groups.truncated_PG)
    for number, (reward, scores_PG) in enumerate(groups.rewards.items()):
        yield f"rewards/{reward}/mean", _mean_a_prompt(scores_PG)
        for name, values_P in _rightness(scores_PG, groups.answers.get(reward), settings):
            yield (f"rewards/{reward}/{name}" if number else name), values_P


def _rightness(
    scores_PG: Tensor, answers: list[list[Hashable]] | None, settings: MetricSettings
) -> Iterator[tuple[str, Tensor]]:
    scored_PG = ~scores_PG.isnan()
    correct_PG = scores_PG >= settings.correct_threshold  # False where NaN
    num_correct_P, num_scored_P = correct_PG.sum(dim=1), scored_PG.sum(dim=1)
    yield "accuracy", num_correct_P.double() / num_scored_P
    for k in settings.ks:
        yield f"pass@{k}", pass_at_k(num_correct_P, num_scored_P, k=k)
    for k in settings.ks:
        if answers is not None and k > 1:  # one vote is accuracy again
            yield f"maj@{k}", _majority(answers, correct_PG, scored_PG, k)


def _majority(
    answers: list[list[Hashable]], correct_PG: Tensor, scored_PG: Tensor, k: int
) -> Tensor:
    """Return each prompt's chance that ``k`` of its scored completions vote for what is right."""
    values = []
    for given, correct_G, scored_G in zip(answers, correct_PG, scored_PG, strict=True):
        kept = scored_G.nonzero()[:, 0].tolist()
        values.append(
            majority_at_k([given[i] for i in kept], [bool(correct_G[i]) for i in kept], k=k)
        )
    return torch.tensor(values, dtype=torch.float64)


def _mean_a_prompt(values_PG: Tensor) -> Tensor:
    return values_PG.double().nanmean(dim=1)


def _deviation(values_PG: Tensor) -> float:
    scores_B = values_PG[~values_PG.isnan()].double()
    return scores_B.std().item() if len(scores_B) > 1 else float("nan")
