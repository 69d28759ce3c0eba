"""A reward model, trained on a task's own questions: one score a reply, or one a step.

What it shows: the policy's replies, judged by a verifier, become pairs for an outcome model
(arXiv:2203.02155) or steps with labels for a process model (arXiv:2305.20050), which the rewards
`outcome_model` and `process_model` load; accuracy on held-out questions.
How it departs from the papers: no person judges; near misses and made solutions are added.
Hardware, minutes, expected result: in the header of each YAML.

    accelerate launch recipes/reward_model.py --config recipes/configs/reward_model_sums.yaml
    accelerate launch recipes/reward_model.py --config recipes/configs/process_model_sums.yaml
``--dry_run`` checks all of it and loads no model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, RewardConfig

from trl_grpo_ext.cpu_linear import use_onednn
from trl_grpo_ext.data import TaskArguments, load_task
from trl_grpo_ext.model_cache import prepare_model
from trl_grpo_ext.recipe import (
    RunArguments,
    given_settings,
    minutes_since_start,
    read_options,
    run_problems,
    run_recipe,
)
from trl_grpo_ext.rewards import build_rewards
from trl_grpo_ext.rewards.models.training import build_trainer, load_with_head
from trl_grpo_ext.rewards.models.training_data import make_rows
from trl_grpo_ext.rewards.models.training_options import (
    RewardModelArguments,
    reward_model_problems,
)
from trl_grpo_ext.rewards.models.training_report import headline, measure, write_training_report


@dataclass(frozen=True)
class Recipe:
    """Everything that a run was asked for, checked."""

    run: RunArguments
    options: RewardModelArguments
    task: TaskArguments
    model: ModelConfig
    training: RewardConfig
    given: frozenset[str]


def run(recipe: Recipe) -> int:
    """Make the data, train, measure on held-out questions, write the report; return 0."""
    with PartialState().local_main_process_first():
        base = prepare_model(
            recipe.model.model_name_or_path,
            source=recipe.run.model_source,
            cache_dir=recipe.run.model_cache_dir,
        )
    train, held_out = make_data(recipe, base)
    model, tokenizer = load_with_head(
        base,
        kind=recipe.options.kind,
        num_layers=recipe.options.num_layers,
        num_trained_layers=recipe.options.num_trained_layers,
        seed=recipe.training.seed,
        revision=recipe.model.model_revision,
    )
    trainer = build_trainer(model, tokenizer, train, options=recipe.options, args=recipe.training)
    trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        folder = recipe.training.output_dir
        measures = measure(folder, held_out, options=recipe.options)
        print(headline(measures))
        about = {
            "kind": recipe.options.kind,
            "model": recipe.model.model_name_or_path,
            "num_train_rows": train.num_rows,
            "num_processes": recipe.training.world_size,
            "steps": trainer.state.global_step,
            "minutes": minutes_since_start(),
            "seed": recipe.training.seed,
        }
        history = trainer.state.log_history
        report = write_training_report(
            folder, measures, about, history, settings=settings(recipe), options=recipe.options
        )
        print(f"The reward model and its report are in {folder}. Read {report}.")
    return 0


def make_data(recipe: Recipe, base: str) -> tuple[Dataset, Dataset]:
    """Return what to train on, and the same made of the held-out questions."""
    task, seed = load_task(recipe.task), recipe.training.seed
    revision = {"revision": recipe.model.model_revision}
    policy = AutoModelForCausalLM.from_pretrained(base, dtype="float32", **revision)
    use_onednn(policy.to(recipe.training.device).eval())
    tokenizer = AutoTokenizer.from_pretrained(base, **revision)
    judges = build_rewards(recipe.task.rewards)[0] if recipe.task.rewards else [None]
    sources = {"options": recipe.options, "is_correct": judges[0]}
    train = make_rows(policy, tokenizer, task.train, seed=seed, **sources)
    return train, make_rows(policy, tokenizer, task.held_out, seed=seed + 1, **sources)


def settings(recipe: Recipe) -> dict[str, object]:
    """Return every option that was given, by its key."""
    parts = (recipe.run, recipe.options, recipe.task, recipe.model, recipe.training)
    return given_settings(*parts, given=recipe.given)


def read(argv: Sequence[str] | None) -> Recipe:
    """Return what YAML and command line ask for, checked before a model loads."""
    classes = (RunArguments, RewardModelArguments, TaskArguments, ModelConfig, RewardConfig)
    parsed, given = read_options(argv, classes, check=problems)
    return Recipe(*parsed, given=given)


def problems(
    run: RunArguments,
    options: RewardModelArguments,
    task: TaskArguments,
    model: ModelConfig,
    *_: RewardConfig,
) -> Iterator[str]:
    """Yield what cannot work."""
    yield from run_problems(run, model)
    where = {"source": run.model_source, "cache_dir": run.model_cache_dir}
    yield from reward_model_problems(options, task, model, **where)


def check(recipe: Recipe) -> str:
    """Return what ``--dry_run`` prints."""
    task = load_task(recipe.task)
    return (
        f"training prompts: {task.train.num_rows}, held out: {task.held_out.num_rows}\n"
        f"first prompt: {task.train[0]['prompt']!r}\n"
        "Dry run: everything was checked, no model was loaded."
    )


if __name__ == "__main__":
    sys.exit(run_recipe(run, read=read, check=check))
