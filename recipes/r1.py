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
from trl_grpo_ext.pipeline.options import R1Arguments, adapter_problems, r1_problems
from trl_grpo_ext.pipeline.results import (
    metric_names,
    summarize_stages,
    table_rows,
    write_results,
)
from trl_grpo_ext.pipeline.running import Peers, check_stage, run_stage
from trl_grpo_ext.pipeline.stages import (
    Stage,
    distinct,
    make_stages,
    missing_stages,
    set_aside_outdated,
)
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
    missing = missing_stages(stages) if peers.is_first else []
    checked(stages, peers, needed=bool(missing))
    for path in set_aside_outdated(missing):
        print(f"Made from an earlier output, so moved to {path}.", flush=True)
    for number, stage in enumerate(stages, start=1):
        if stage in missing:
            stage.write_settings()  # before the others hear of the stage
        port = peers.agreed_port(stage.name, needed=stage in missing)
        if peers.is_first:
            what = "is complete" if port is None else f"runs, in {stage.folder}"
            print(f"Stage {number} of {len(stages)}, {stage.name}, {what}.", flush=True)
        if port is None:
            continue
        if code := run_stage(stage, RECIPES, port=port):
            return code
    if peers.is_first:
        finish(recipe, num_processes=peers.num_processes)
    return 0


def checked(stages: Sequence[Stage], peers: Peers, *, needed: bool) -> list[str]:
    """Check the settings of all stages before one runs; return what each dry run says."""
    if peers.is_first and needed:
        print("Checking the settings of all stages.", flush=True)
    found = []
    for stage in distinct(stages):
        port = peers.agreed_port(f"check of {stage.name}", needed=needed)
        if port is not None:
            found.append(check_stage(stage, RECIPES, port=port))
    return found


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
    yield from adapter_problems("the YAML", vars(model))
    yield from r1_problems(options)


def check(recipe: Recipe) -> str:
    """Return what ``--dry_run`` prints."""
    found = checked(recipe.stages, Peers(), needed=True)
    parts = zip(distinct(recipe.stages), found, strict=True)
    return "\n".join(
        f"== {stage.name}: recipes/{stage.recipe}.py, in {stage.folder}"
        f"{', complete' if stage.is_complete() else ''}\n{said}"
        for stage, said in parts
    )


if __name__ == "__main__":
    sys.exit(run_recipe(run, read=read, check=check))
