"""What is refused before a model loads."""

from __future__ import annotations

from typing import Any

import pytest

from trl_grpo_ext.evaluation.options import (
    EvaluationOptions,
    eval_ks,
    evaluation_problems,
    long_best_problem,
    unnamed_best_problem,
)


def problems(
    *, num_generations_eval: int | None = None, best: str | None = None, **options: Any
) -> list[str]:
    return list(
        evaluation_problems(
            EvaluationOptions(**options),
            num_generations=8,
            num_generations_eval=num_generations_eval,
            metric_for_best_model=best,
        )
    )


def test_defaults_are_fine() -> None:
    assert problems() == []
    assert problems(best="eval_accuracy") == []
    assert problems(best="pass@8") == []
    assert problems(eval_decoding="both", best="eval_greedy/accuracy", num_generations_eval=4) == []
    assert problems(eval_decoding="greedy", num_generations_eval=1) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_decoding": "beam"}, "`eval_decoding` is 'beam', which is not known. Use one of: s"),
        ({"eval_bootstrap": -1}, "`eval_bootstrap` is -1, which is no number of resamples. Use"),
        ({"eval_correct_threshold": float("nan")}, "is NaN, so no score would be right. Use a"),
        ({"eval_pass_k": [1, 16]}, "`eval_pass_k` has 16, but evaluation has 8 completions a"),
        ({"eval_pass_k": [8], "num_generations_eval": 4}, "Set `num_generations_eval` to at lea"),
        ({"eval_pass_k": 4}, "`eval_pass_k` is 4, which is no list of numbers of completions. Us"),
        ({"eval_pass_k": [0]}, "`eval_pass_k` is [0], which is no list"),
        ({"eval_pass_k": []}, "`eval_pass_k` is [], which is no list"),
        ({"eval_pass_k": [True]}, "`eval_pass_k` is [True], which is no list"),
        ({"best": "eval_pass@4"}, "reports pass@k for k in [1, 8], so there would be no best mod"),
        ({"best": "maj@2", "eval_pass_k": [4]}, "Add 2 to `eval_pass_k`, or name another metric."),
        ({"best": "maj@1"}, "reports maj@k for k in [8], so there would be"),
        (
            {"eval_decoding": "greedy", "num_generations_eval": 4},
            "`num_generations_eval` is 4: greedy completions of one prompt are all the same. Set",
        ),
        ({"eval_decoding": "greedy", "eval_pass_k": [2]}, "evaluation has 1 completion a prompt"),
    ],
)
def test_what_cannot_work_is_named(options: dict[str, Any], message: str) -> None:
    found = problems(**options)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("metric", "keys"),
    [
        ("pass@2", "easy_pass@2, not_so_hard_pass@2"),
        ("eval_pass@2", "easy_pass@2, not_so_hard_pass@2"),
        ("esay_pass@2", "easy_pass@2, not_so_hard_pass@2"),
        ("easypass@2", "easy_easypass@2, not_so_hard_easypass@2"),
        ("loss", "easy_loss, not_so_hard_loss"),
        ("tasks/sum/maj@4", "easy_tasks/sum/maj@4, not_so_hard_tasks/sum/maj@4"),
    ],
)
def test_metric_of_the_best_model_without_the_name_of_a_set_is_told(metric: str, keys: str) -> None:
    problem = unnamed_best_problem(metric, sets={"easy": 1, "not_so_hard": 2})
    assert problem == (
        f"`metric_for_best_model` is {metric!r}, but `eval_dataset` has named sets (easy, "
        "not_so_hard), whose metrics begin with their name, so there would be no best model. "
        f"Use one of: {keys}."
    )


@pytest.mark.parametrize("metric", ["easy_pass@2", "eval_not_so_hard_tasks/sum/maj@4"])
def test_metric_of_the_best_model_with_the_name_of_a_set_is_fine(metric: str) -> None:
    assert unnamed_best_problem(metric, sets=["easy", "not_so_hard"]) is None


def test_metric_of_the_best_model_has_no_name_of_the_first_reward() -> None:
    problem = long_best_problem("eval_tasks/a/rewards/r[1]/maj@4/low", first_reward="r[1]")
    assert problem is not None
    assert "'r[1]' is the first reward function, by which accuracy," in problem
    assert problem.endswith("Use `metric_for_best_model: eval_tasks/a/maj@4/low`.")
    for metric in ("rewards/r[1]/mean", "rewards/r1/maj@4", "maj@4", "loss"):
        assert long_best_problem(metric, first_reward="r[1]") is None


def test_ks_are_sorted_and_fit_the_group() -> None:
    options = EvaluationOptions(eval_pass_k=[4, 1, 4, 2])
    assert eval_ks(options, group_size=4) == [1, 2, 4]
    assert eval_ks(options, group_size=1) == [1]
