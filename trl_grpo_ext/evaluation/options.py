"""The options of evaluation during training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

from trl_grpo_ext.evaluation.heldout import CORRECT_THRESHOLD

EvalDecoding = Literal["sampled", "greedy", "both"]


@dataclass
class EvaluationOptions:
    """How ``trainer.evaluate()`` measures; docs/evaluation.md has the metrics."""

    eval_decoding: EvalDecoding = field(
        default="sampled",
        metadata={
            "help": "How evaluation draws completions: 'sampled' (as in training, "
            "num_generations_eval a prompt), 'greedy' (the likeliest token each time, one "
            "completion a prompt), or 'both' (metrics of the greedy ones begin with greedy/)."
        },
    )
    eval_pass_k: list[int] | None = field(
        default=None,
        metadata={
            "help": "The k of pass@k and of majority votes at k, each at most "
            "num_generations_eval; by default 1 and num_generations_eval."
        },
    )
    eval_correct_threshold: float = field(
        default=CORRECT_THRESHOLD,
        metadata={"help": "In evaluation, a score from here on is a right answer."},
    )
    eval_bootstrap: int = field(
        default=1000,
        metadata={
            "help": "Resamples behind each 95 % confidence interval of evaluation (.../low and "
            ".../high); 0 switches intervals off."
        },
    )
    eval_task_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the eval set with the name of each prompt's task; the metrics are "
            "also reported for each of its values, as tasks/<value>/..."
        },
    )


def eval_ks(options: EvaluationOptions, *, group_size: int) -> list[int]:
    """Return the k of pass@k, in their order, for groups of this size.

    By default 1 and the size; none for a group of one, whose pass@1 is the accuracy.

    Example:
        >>> eval_ks(EvaluationOptions(), group_size=8)
        [1, 8]
        >>> eval_ks(EvaluationOptions(), group_size=1)
        []
        >>> eval_ks(EvaluationOptions(eval_pass_k=[4, 2]), group_size=1)
        []
    """
    if options.eval_pass_k is None:
        return [1, group_size] if group_size > 1 else []
    return sorted({k for k in options.eval_pass_k if k <= group_size})


def evaluation_problems(
    options: EvaluationOptions,
    *,
    num_generations: int,
    num_generations_eval: int | None,
    metric_for_best_model: str | None,
) -> Iterator[str]:
    """Yield what cannot work in the options of evaluation.

    Args:
        options: As a YAML gave them.
        num_generations: Completions a prompt in training.
        num_generations_eval: Completions a prompt in evaluation, as it was set.
        metric_for_best_model: As it was set.
    """
    if options.eval_decoding not in get_args(EvalDecoding):
        yield (
            f"`eval_decoding` is {options.eval_decoding!r}, which is not known. "
            f"Use one of: {', '.join(get_args(EvalDecoding))}."
        )
    if options.eval_bootstrap < 0:
        yield (
            f"`eval_bootstrap` is {options.eval_bootstrap}, which is no number of resamples. "
            "Use 1000, or 0 for no intervals."
        )
    if options.eval_correct_threshold != options.eval_correct_threshold:
        yield (
            "`eval_correct_threshold` is NaN, so no score would be right. Use a score, such as 0.5."
        )
    group_size = num_generations_eval or num_generations
    if options.eval_decoding == "greedy":
        yield from _greedy_problems(options, num_generations_eval)
        group_size = 1
    yield from _k_problems(options, group_size, metric_for_best_model)


def _greedy_problems(options: EvaluationOptions, num_generations_eval: int | None) -> Iterator[str]:
    if num_generations_eval is not None and num_generations_eval > 1:
        yield (
            f"`eval_decoding` is 'greedy', but `num_generations_eval` is {num_generations_eval}: "
            "greedy completions of one prompt are all the same. Set `num_generations_eval: 1`, or "
            "`eval_decoding: both`."
        )


def _k_problems(
    options: EvaluationOptions, group_size: int, metric_for_best_model: str | None
) -> Iterator[str]:
    given: object = options.eval_pass_k
    if given is not None and not (
        isinstance(given, list) and given and all(type(k) is int and k >= 1 for k in given)
    ):
        yield (
            f"`eval_pass_k` is {given!r}, which is no list of numbers of completions. "
            "Use such as [1, 4], or leave it out."
        )
        return
    if large := [k for k in options.eval_pass_k or [] if k > group_size]:
        yield (
            f"`eval_pass_k` has {', '.join(map(str, large))}, but evaluation has {group_size} "
            f"completion{'' if group_size == 1 else 's'} a prompt, of which so many cannot be "
            f"picked. Set `num_generations_eval` to at least {max(large)} (with `eval_decoding: "
            "sampled` or both), or remove what is larger."
        )
    yield from _best_model_problems(
        metric_for_best_model or "", eval_ks(options, group_size=group_size)
    )


def best_key(metric_for_best_model: str) -> str:
    """Return the name under which ``transformers`` looks that metric up.

    Example:
        >>> best_key("pass@8"), best_key("eval_pass@8")
        ('eval_pass@8', 'eval_pass@8')
    """
    return f"eval_{metric_for_best_model.removeprefix('eval_')}"


def unnamed_best_problem(metric_for_best_model: str, *, sets: Iterable[str]) -> str | None:
    """Return what is wrong with the metric of the best model where the eval sets have names.

    Every metric of such an evaluation begins with the name of its set.

    Example:
        >>> unnamed_best_problem("easy_pass@2", sets=["easy", "hard"]) is None
        True
        >>> unnamed_best_problem("pass@2", sets=["easy", "hard"]).partition("Use ")[2]
        'one of: easy_pass@2, hard_pass@2.'
    """
    metric, names = metric_for_best_model.removeprefix("eval_"), list(sets)
    if any(metric.startswith(f"{name}_") for name in names):
        return None
    short = re.sub(r".*_(?=(accuracy|(pass|maj)@\d+)$)", "", metric)  # of a name that is misspelt
    return (
        f"`metric_for_best_model` is {metric_for_best_model!r}, but `eval_dataset` has named sets "
        f"({', '.join(names)}), whose metrics begin with their name, so there would be no best "
        f"model. Use one of: {', '.join(f'{name}_{short}' for name in names)}."
    )


def long_best_problem(metric_for_best_model: str, *, first_reward: str) -> str | None:
    """Return what is wrong with a metric of the first reward that goes by its short name only.

    Example:
        >>> long_best_problem("rewards/exact/mean", first_reward="exact") is None
        True
        >>> long_best_problem("rewards/exact/pass@4", first_reward="exact").partition("Use ")[2]
        '`metric_for_best_model: pass@4`.'
    """
    long = re.escape(f"rewards/{first_reward}/")
    if not re.search(rf"{long}(accuracy|(pass|maj)@\d+)(/low|/high)?$", metric_for_best_model):
        return None
    return (
        f"`metric_for_best_model` is {metric_for_best_model!r}, but '{first_reward}' is the first "
        "reward function, by which accuracy, pass@k and maj@k are reported without its name, so "
        "there would be no best model. Use `metric_for_best_model: "
        f"{re.sub(long, '', metric_for_best_model)}`."
    )


def _best_model_problems(metric: str, ks: list[int]) -> Iterator[str]:
    asked = re.search(r"(pass|maj)@(\d+)$", metric)
    if asked is None or "greedy/" in metric:
        return
    reported = [k for k in ks if k > 1 or asked[1] == "pass"]
    if int(asked[2]) not in reported:
        yield (
            f"`metric_for_best_model` is {metric!r}, but evaluation reports {asked[1]}@k for k in "
            f"{reported}, so there would be no best model. Add {asked[2]} to `eval_pass_k`, or "
            "name another metric."
        )
