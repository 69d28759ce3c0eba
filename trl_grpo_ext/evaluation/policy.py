"""How good a model is at a task, by itself: greedy accuracy and pass@k of its held-out prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_grpo_ext.data import TaskArguments, task_problems
from trl_grpo_ext.evaluation.estimators import bootstrap_interval, pass_at_k
from trl_grpo_ext.evaluation.heldout import CORRECT_THRESHOLD, Accuracy, evaluate_accuracy
from trl_grpo_ext.evaluation.measuring import refuse_outage
from trl_grpo_ext.rewards.registry import RewardFunction


@dataclass
class PolicyEvaluationArguments:
    """How a model is evaluated; one YAML key a field."""

    output_dir: str = field(metadata={"help": "Where summary.json and the replies are written."})
    seed: int = field(default=0, metadata={"help": "Of the sampled replies."})
    use_cpu: bool = field(
        default=False, metadata={"help": "Whether to stay on the CPU where there is a GPU too."}
    )
    num_samples: int = field(
        default=8,
        metadata={
            "help": "Replies sampled to each prompt, beside the greedy one; 0 for the greedy one "
            "alone."
        },
    )
    pass_k: list[int] | None = field(
        default=None,
        metadata={"help": "The k of pass@k; `num_samples` by default. pass@1 is the accuracy."},
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "Tokens of a reply at most; a longer one is cut off."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the sampled replies."})
    chat_template_kwargs: dict[str, object] | str | None = field(
        default=None, metadata={"help": "More arguments of the chat template: a mapping, or JSON."}
    )
    batch_size: int = field(
        default=64, metadata={"help": "Replies that one process generates at a time."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether the model may bring code of its own."}
    )
    max_unscored_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Largest share of the replies that may be without a score, for want of a "
            "service; beyond it there is no result."
        },
    )

    def __post_init__(self) -> None:
        """Bring what a command line gives into the form that YAML gives."""
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json.loads(self.chat_template_kwargs)

    @property
    def ks(self) -> list[int]:
        """The k of pass@k, in their order."""
        return sorted(set(self.pass_k or [self.num_samples] * (self.num_samples > 1)))


def policy_evaluation_problems(
    task: TaskArguments, *options: PolicyEvaluationArguments
) -> Iterator[str]:
    """Yield what cannot work, without a model."""
    if not task.rewards:
        yield (
            "`rewards` is empty, so nobody says which reply is right. List one, such as "
            "`- name: math`; the first one judges."
        )
    if not task.num_eval_prompts and task.eval_dataset_split is None:
        yield (
            "`num_eval_prompts` is 0, so no prompt is held out to be asked. Set it to the number "
            "of prompts, as it is in the training runs."
        )
    yield from task_problems(task)
    for one in options:
        yield from _number_problems(one)


def _number_problems(options: PolicyEvaluationArguments) -> Iterator[str]:
    least = {"num_samples": 0, "max_completion_length": 1, "batch_size": 1}
    for name, bound in least.items():
        if (value := getattr(options, name)) < bound:
            yield f"`{name}` is {value}. Use at least {bound}."
    if options.temperature <= 0:
        yield f"`temperature` is {options.temperature}. Use a number above 0."
    bad = [k for k in options.ks if not 1 <= k <= options.num_samples]
    if bad and options.num_samples >= 0:
        yield (
            f"`pass_k` has {', '.join(map(str, bad))}, but so many of {options.num_samples} "
            "sampled replies cannot be picked. Raise `num_samples`, or take it out."
        )


@dataclass(frozen=True)
class PolicyEvaluation:
    """What an evaluation measured.

    Attributes:
        metrics: By the names that evaluation in training has: ``greedy/accuracy``, ``accuracy``
            (of the sampled replies), ``pass@k``; each with its interval, ``.../low`` and
            ``.../high``.
        greedy: The greedy replies and their scores.
        sampled: The sampled ones; ``None`` if there are none.
    """

    metrics: dict[str, float]
    greedy: Accuracy
    sampled: Accuracy | None

    def to_json(self) -> dict[str, float | None]:
        """Return the metrics, ``None`` where nothing could be measured."""
        return {n: None if math.isnan(value) else value for n, value in self.metrics.items()}


def evaluate_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    is_correct: RewardFunction,
    *,
    options: PolicyEvaluationArguments,
    accelerator: Accelerator,
) -> PolicyEvaluation:
    """Return the greedy accuracy and pass@k of a model, the same for any number of processes.

    Args:
        model: On the device of the process, whole.
        tokenizer: Its tokenizer.
        rows: The prompts.
        is_correct: Says which replies are right.
        options: How many replies of which length.
        accelerator: Of the processes.

    Raises:
        RewardOutageError: More than ``max_unscored_fraction`` has no score.
    """

    def measured(num_samples: int) -> Accuracy:
        accuracy = evaluate_accuracy(
            model,
            tokenizer,
            rows,
            is_correct=is_correct,
            max_new_tokens=options.max_completion_length,
            num_samples=num_samples,
            temperature=options.temperature,
            seed=options.seed,
            batch_size=options.batch_size,
            chat_template_kwargs=cast("dict[str, Any] | None", options.chat_template_kwargs),
            accelerator=accelerator,
        )
        refuse_outage(accuracy, is_correct, rows, most=options.max_unscored_fraction)
        return accuracy

    greedy = measured(0)
    metrics = _with_interval("greedy/accuracy", _share_P(_scores_PG(greedy)))
    if not options.num_samples:
        return PolicyEvaluation(metrics, greedy, None)
    sampled = measured(options.num_samples)
    scores_PG = _scores_PG(sampled)
    metrics |= _with_interval("accuracy", _share_P(scores_PG))
    right_P = (scores_PG >= CORRECT_THRESHOLD).sum(dim=1)
    scored_P = (~scores_PG.isnan()).sum(dim=1)
    for k in options.ks:
        metrics |= _with_interval(f"pass@{k}", pass_at_k(right_P, scored_P, k=k))
    return PolicyEvaluation(metrics, greedy, sampled)


def replies_rows(rows: Dataset, evaluation: PolicyEvaluation) -> Iterator[dict[str, Any]]:
    """Yield each reply with its prompt and score: what is written beside the summary."""
    for decoding, accuracy in (("greedy", evaluation.greedy), ("sampled", evaluation.sampled)):
        if accuracy is None:
            continue
        size = len(accuracy.scores) // rows.num_rows
        for at, (text, score) in enumerate(zip(accuracy.completions, accuracy.scores, strict=True)):
            row = rows[at // size]
            yield {
                "prompt": row["prompt"],
                "answer": row.get("answer"),
                "decoding": decoding,
                "completion": text,
                "score": score,
            }


def _scores_PG(accuracy: Accuracy) -> Tensor:
    """Return the scores, one row a prompt; NaN where there is none."""
    scores = [torch.nan if score is None else score for score in accuracy.scores]
    return torch.tensor(scores, dtype=torch.float64).view(accuracy.num_prompts, -1)


def _share_P(scores_PG: Tensor) -> Tensor:
    """Return the share of right replies of each prompt; NaN where none has a score."""
    right_PG = (scores_PG >= CORRECT_THRESHOLD).double()
    return right_PG.masked_fill(scores_PG.isnan(), torch.nan).nanmean(dim=1)


def _with_interval(name: str, values_P: Tensor) -> dict[str, float]:
    low, high = bootstrap_interval(values_P)
    return {name: values_P.nanmean().item(), f"{name}/low": low, f"{name}/high": high}


def metric_lines(metrics: dict[str, float]) -> Sequence[str]:
    """Return a line a metric, for a terminal."""
    lines = []
    for name in [name for name in metrics if not name.endswith(("/low", "/high"))]:
        low, high = metrics[f"{name}/low"], metrics[f"{name}/high"]
        lines.append(f"{name}: {metrics[name]:.3f} ({low:.3f} to {high:.3f})")
    return lines
