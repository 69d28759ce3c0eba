"""Evaluation: the greedy accuracy and pass@k of a model on a task's held-out prompts.

What it shows: what a stage of training was worth, by the task's own reward, with intervals.
The held-out prompts are those of the training recipes if the same task is written in the YAML.

    accelerate launch recipes/evaluation.py --config YOUR.yaml

Every option of the YAML can be given on the command line too. ``--dry_run`` checks all of it and
loads no model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from trl import ModelConfig

from trl_grpo_ext.data import TaskArguments, load_task
from trl_grpo_ext.evaluation.policy import (
    PolicyEvaluationArguments,
    evaluate_policy,
    metric_lines,
    policy_evaluation_problems,
    replies_rows,
)
from trl_grpo_ext.files import write_summary
from trl_grpo_ext.model_cache import prepare_model
from trl_grpo_ext.peers import ending_together
from trl_grpo_ext.recipe import (
    RunArguments,
    minutes_since_start,
    read_options,
    run_problems,
    run_recipe,
)
from trl_grpo_ext.report import library_versions
from trl_grpo_ext.rewards import build_rewards
from trl_grpo_ext.sampling.policy import load_policy, policy_problems


@dataclass(frozen=True)
class Recipe:
    """Everything that a run was asked for, checked."""

    run: RunArguments
    task: TaskArguments
    model: ModelConfig
    options: PolicyEvaluationArguments


def run(recipe: Recipe) -> int:
    """Sample, judge, write what was measured; return 0."""
    options = recipe.options
    accelerator = Accelerator(
        cpu=options.use_cpu or not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],  # for the slowest one
    )
    rows = load_task(recipe.task).held_out
    with ending_together():
        with accelerator.local_main_process_first():
            path = prepare_model(
                str(recipe.model.model_name_or_path),
                source=recipe.run.model_source,
                cache_dir=recipe.run.model_cache_dir,
            )
        policy, tokenizer = load_policy(
            path,
            model=recipe.model,
            trust_remote_code=options.trust_remote_code,
            device=accelerator.device,
        )
        (judge, *_), _ = build_rewards(recipe.task.rewards)
        found = evaluate_policy(
            policy, tokenizer, rows, judge, options=options, accelerator=accelerator
        )
        if accelerator.is_main_process:
            folder = Path(options.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "replies.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in replies_rows(rows, found))
            about = {
                "model": recipe.model.model_name_or_path,
                "dataset": recipe.task.dataset,
                "num_eval_prompts": rows.num_rows,
                "num_samples": options.num_samples,
                "num_processes": accelerator.num_processes,
                "minutes": minutes_since_start(),
                "seed": options.seed,
                "versions": library_versions(),
            }
            summary = write_summary(folder, {"metrics": found.to_json(), **about})
            print("\n".join(metric_lines(found.metrics)), f"{summary} has the numbers.", sep="\n")
    accelerator.end_training()
    return 0


def read(argv: Sequence[str] | None) -> Recipe:
    """Return what YAML and command line ask for, checked before a model loads."""
    classes = (RunArguments, TaskArguments, ModelConfig, PolicyEvaluationArguments)
    parsed, _ = read_options(argv, classes, check=problems)
    return Recipe(*parsed)


def problems(
    run: RunArguments, task: TaskArguments, model: ModelConfig, *options: PolicyEvaluationArguments
) -> Iterator[str]:
    """Yield what cannot work."""
    yield from run_problems(run, model)
    yield from policy_problems(model)
    yield from policy_evaluation_problems(task, *options)


def check(recipe: Recipe) -> str:
    """Return what ``--dry_run`` prints."""
    rows, options = load_task(recipe.task).held_out, recipe.options
    return (
        f"held-out prompts: {rows.num_rows}, each with 1 greedy reply and {options.num_samples} "
        f"sampled ones of at most {options.max_completion_length} tokens\n"
        f"first prompt: {rows[0]['prompt']!r}\n"
        "Dry run: everything was checked, no model was loaded."
    )


if __name__ == "__main__":
    sys.exit(run_recipe(run, read=read, check=check))
