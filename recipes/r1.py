"""DeepSeek-R1's three stages from one YAML: SFT, GRPO, rejection sampling and SFT again.

What it shows: the whole recipe (arXiv:2501.12948, section 2.3), with an evaluation after each
stage, in one table and one plot. Each stage is a recipe of its own, run as a program; one that is
complete is skipped, so that the same command goes on where an earlier one was stopped.
How it departs from the paper: one task; the last SFT ends it, no second round of GRPO follows.

Hardware, minutes, expected result: in the header of each YAML in recipes/configs/.

    accelerate launch recipes/r1.py --config recipes/configs/r1_mini.yaml

``--dry_run`` checks the settings of all stages and loads no model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from trl import ModelConfig

from trl_grpo_ext.data import TaskArguments
from trl_grpo_ext.pipeline.options import R1Arguments, r1_problems
from trl_grpo_ext.pipeline.results import (
    metric_names,
    summarize_stages,
    table_rows,
    write_results,
)
from trl_grpo_ext.pipeline.running import Peers, check_stage, run_stage
from trl_grpo_ext.pipeline.stages import Stage, distinct, make_stages
from trl_grpo_ext.recipe import (
    RunArguments,
    given_settings,
    read_options,
    run_problems,
    run_recipe,
)

RECIPES = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """Everything that a run was asked for."""

    run: RunArguments
    options: R1Arguments
    stages: list[Stage]


def run(recipe: Recipe) -> int:
    """Run the stages that are not complete; return 0, or the exit code of one that failed."""
    peers, stages = Peers(), recipe.stages
    complete = [stage.is_complete() for stage in stages] if peers.is_first else []
    if peers.is_first and not all(complete):
        print("Checking the settings of all stages.", flush=True)
        for stage in distinct(stages):
            check_stage(stage, RECIPES)
    missing = complete.index(False) if False in complete else len(stages)
    for number, stage in enumerate(stages):
        port = peers.agreed_port(stage, needed=number >= missing)
        if peers.is_first:
            what = "is complete" if port is None else f"runs, in {stage.folder}"
            print(f"Stage {number + 1} of {len(stages)}, {stage.name}, {what}.", flush=True)
        if port is None:
            continue
        if peers.is_first:
            stage.write_settings()
        if code := run_stage(stage, RECIPES, port=port):
            return code
    if peers.is_first:
        finish(recipe, num_processes=peers.num_processes)
    return 0


def finish(recipe: Recipe, *, num_processes: int) -> None:
    """Write and print the table of all stages."""
    folder = Path(recipe.options.output_dir)
    summary = summarize_stages(recipe.stages, seed=recipe.options.seed, num_processes=num_processes)
    report = write_results(folder, summary, recipe.stages)
    shown = Table("model", *metric_names(summary["metrics"]), "minutes")
    for row in table_rows(summary):
        shown.add_row(*map(str, row))
    Console().print(shown)
    print(f"All stages are complete, in {folder}. Read {report}.")


def read(argv: Sequence[str] | None) -> Recipe:
    """Return what YAML and command line ask for; each stage's recipe checks its own options."""
    classes = (RunArguments, TaskArguments, ModelConfig, R1Arguments)
    (run, task, model, options), given = read_options(argv, classes, check=problems)
    shared = given_settings(run, task, model, given=given - {"dry_run"})
    return Recipe(run, options, make_stages(options, shared))


def problems(
    run: RunArguments, task: TaskArguments, model: ModelConfig, options: R1Arguments
) -> Iterator[str]:
    """Yield what cannot work."""
    yield from run_problems(run, model)
    yield from r1_problems(options)


def check(recipe: Recipe) -> str:
    """Return what ``--dry_run`` prints."""
    parts = [
        f"== {stage.name}: recipes/{stage.recipe}.py, in {stage.folder}"
        f"{', complete' if stage.is_complete() else ''}\n{check_stage(stage, RECIPES)}"
        for stage in distinct(recipe.stages)
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(run_recipe(run, read=read, check=check))
