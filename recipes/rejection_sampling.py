"""Rejection sampling: many replies a prompt, of which the right and the clean ones become data.

What it shows: stage 3 of DeepSeek-R1 (arXiv:2501.12948, section 2.3.3): the policy's own solutions,
filtered, without near-duplicates, the best of each prompt, balanced by difficulty; a dataset for
TRL's SFTTrainer with the origin of each row. What was sampled stays: other filters need no model.
How it departs from the paper: no judge beside the rewards; duplicates and difficulty are looked at.

Hardware, minutes, expected result: in the header of the YAML.

    accelerate launch recipes/rejection_sampling.py --config recipes/configs/NAME.yaml

Every option can be given on the command line too. ``--dry_run`` checks all of it, without a model.
Killed, it goes on where it was when the same command is given again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate.state import PartialState
from datasets import Dataset
from rich.console import Console
from trl import ModelConfig

from trl_grpo_ext.data import TaskArguments, load_task, task_problems
from trl_grpo_ext.files import write_summary
from trl_grpo_ext.hub.push import push_dataset
from trl_grpo_ext.model_cache import prepare_model
from trl_grpo_ext.peers import ending_together
from trl_grpo_ext.recipe import (
    RunArguments,
    minutes_since_start,
    read_options,
    run_problems,
    run_recipe,
)
from trl_grpo_ext.rejection.collect import collect_candidates, missing_prompts, start_processes
from trl_grpo_ext.rejection.dataset import refuse_nothing_kept, select_candidates
from trl_grpo_ext.rejection.option_checks import rejection_problems
from trl_grpo_ext.rejection.options import RejectionArguments
from trl_grpo_ext.rejection.provenance import made_with, prompt_ids
from trl_grpo_ext.rejection.samplers import choose_sampler, load_draw
from trl_grpo_ext.rejection.sampling import Sampler, make_sampler
from trl_grpo_ext.rejection.tally import print_tally
from trl_grpo_ext.report import library_versions
from trl_grpo_ext.rewards import build_rewards
from trl_grpo_ext.rewards.registry import log_name
from trl_grpo_ext.sampling.policy import policy_problems


@dataclass(frozen=True)
class Recipe:
    """Everything that a run was asked for, checked."""

    run: RunArguments
    task: TaskArguments
    model: ModelConfig
    options: RejectionArguments


def run(recipe: Recipe) -> int:
    """Sample what is not on disk yet, choose among all of it, write the dataset; return 0."""
    state = start_processes(use_cpu=recipe.options.use_cpu)
    rows = load_task(recipe.task).train
    with ending_together():
        folder = sample_all(recipe, rows, state)
        if state.is_main_process:
            choose(recipe, folder, num_prompts=rows.num_rows)
    state.destroy_process_group()
    return 0


def sample_all(recipe: Recipe, rows: Dataset, state: PartialState) -> Path:
    """Return the folder with the replies to all prompts."""
    options, task, model = recipe.options, recipe.task, recipe.model
    source, cache = recipe.run.model_source, recipe.run.model_cache_dir
    with state.local_main_process_first():
        base = prepare_model(str(model.model_name_or_path), source=source, cache_dir=cache)
    chosen = choose_sampler(options, model=base)

    def make() -> Sampler:
        draw, tokenizer = load_draw(chosen, base, model=model, options=options, state=state)
        rewards, _ = build_rewards(task.rewards)
        return make_sampler(draw, tokenizer, rows, rewards=rewards, options=options)

    made = made_with(options, model=model, weights=base, rewards=task.rewards, sampler=chosen.name)
    return collect_candidates(rows, options=options, made_with=made, make=make, state=state)


def choose(recipe: Recipe, folder: Path, *, num_prompts: int) -> None:
    """Write the dataset of what is kept, and say what became of the rest."""
    options, model = recipe.options, str(recipe.model.model_name_or_path)
    rewards, weights = build_rewards(recipe.task.rewards)
    tally = select_candidates(
        folder,
        num_prompts=num_prompts,
        options=options,
        weights=dict(zip(map(log_name, rewards), weights, strict=True)),
        provenance={"model": model, "seed": options.seed},
    )
    print_tally(tally, Console())
    refuse_nothing_kept(tally)
    about = {"model": model, "dataset": recipe.task.dataset, "seed": options.seed}
    measured = {"minutes": minutes_since_start(), "versions": library_versions()}
    summary = write_summary(options.output_dir, tally.summary() | about | measured)
    print(f"The dataset is in {summary.parent / 'dataset'}; {summary} has the numbers.")
    if options.push_to_hub:
        print(push_dataset(summary.parent / "dataset", **options.repository))


def read(argv: Sequence[str] | None) -> Recipe:
    """Return what YAML and command line ask for, checked before a model loads."""
    classes = (RunArguments, TaskArguments, ModelConfig, RejectionArguments)
    parsed, _ = read_options(argv, classes, check=problems)
    return Recipe(*parsed)


def problems(
    run: RunArguments, task: TaskArguments, model: ModelConfig, *options: RejectionArguments
) -> Iterator[str]:
    """Yield what cannot work."""
    yield from run_problems(run, model)
    yield from task_problems(task)
    yield from policy_problems(model)
    for given in options:
        yield from rejection_problems(given, model=str(model.model_name_or_path))


def check(recipe: Recipe) -> str:
    """Return what ``--dry_run`` prints."""
    rows, options, model = load_task(recipe.task).train, recipe.options, recipe.model
    name, rewards = str(model.model_name_or_path), recipe.task.rewards
    sampler = choose_sampler(options, model=name)
    made = made_with(options, model=model, weights=name, rewards=rewards, sampler=sampler.name)
    unknown = () if Path(name).is_dir() else ("weights",)  # it is not prepared yet
    missing = missing_prompts(options.output_dir, prompt_ids(rows), made, unknown=unknown)
    return (
        f"prompts: {rows.num_rows} x {options.num_generations} replies of at most "
        f"{options.max_completion_length} tokens; {rows.num_rows - len(missing)} prompts are "
        f"sampled already\nsampler: {sampler}\nfirst prompt: {rows[0]['prompt']!r}\n"
        "Dry run: everything was checked, no model was loaded."
    )


if __name__ == "__main__":
    sys.exit(run_recipe(run, read=read, check=check))
