"""Supervised fine-tuning on reasoning traces: the model imitates solutions that think first.

What it shows: stages 1 and 3 of DeepSeek-R1 (arXiv:2501.12948, sections 2.3.1 and 2.3.3): a few
traces teach the form of thinking, later the model's own best replies teach what they hold.
TRL's SFTTrainer trains; the loss is on the assistant's turns alone, whatever the chat template is.
How it departs from the paper: traces are a task's worked-out solutions, or any conversations.

Hardware, minutes, expected result: in the header of each YAML in recipes/configs/.

    accelerate launch recipes/sft.py --config recipes/configs/sft_sums.yaml

Every option of the YAML can be given on the command line too. ``--dry_run`` checks all of it and
loads no model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from accelerate import PartialState
from trl import ModelConfig, SFTConfig, SFTTrainer

from trl_grpo_ext.data import Task, TaskArguments
from trl_grpo_ext.evaluation import Accuracy
from trl_grpo_ext.evaluation.measuring import measure_accuracy
from trl_grpo_ext.model_cache import prepare_model
from trl_grpo_ext.recipe import (
    RunArguments,
    compare_replies,
    given_settings,
    read_options,
    run_problems,
    run_recipe,
    summarize,
)
from trl_grpo_ext.report import write_report
from trl_grpo_ext.rewards import build_rewards
from trl_grpo_ext.sft.options import SFTArguments, sft_problems
from trl_grpo_ext.sft.pushing import push_at_end, take_push
from trl_grpo_ext.sft.traces import Traces, load_traces, solved_rows
from trl_grpo_ext.sft.training import build_trainer, checkpoint_to_resume


@dataclass(frozen=True)
class Recipe:
    """Everything that a run was asked for, checked."""

    run: RunArguments
    options: SFTArguments
    task: TaskArguments
    model: ModelConfig
    training: SFTConfig
    given: frozenset[str]

    @property
    def settings(self) -> dict[str, object]:
        """Every option that YAML or command line set, by its key."""
        parts = (self.run, self.options, self.task, self.model, self.training)
        return given_settings(*parts, given=self.given)


def run(recipe: Recipe) -> int:
    """Measure, train, measure, write everything to the output folder; return the exit code."""
    traces, task = load_traces(recipe.options, recipe.task, seed=recipe.training.seed)
    asked = take_push(recipe.training)
    trainer = make_trainer(recipe, traces, task)
    trainer.accelerator.print(f"Training on {traces}.")
    before = measure(trainer, recipe, task)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(recipe.training))
    trainer.save_model()
    after = measure(trainer, recipe, task)
    if trainer.is_world_process_zero():
        report = write_report(
            recipe.training.output_dir,
            summary={"num_traces": traces.rows.num_rows}
            | summarize(trainer, recipe.run, before, after),
            log_history=trainer.state.log_history,
            settings=recipe.settings,
            examples=compare_replies(task.held_out, before, after),
        )
        print(f"The model and its report are in {report.parent}. Read {report}.")
        push_at_end(trainer, asked=asked, settings=recipe.settings)
    return 0


def make_trainer(recipe: Recipe, traces: Traces, task: Task) -> SFTTrainer:
    """Return the trainer; the main process of each machine prepares the model first."""
    with PartialState().local_main_process_first():
        path = prepare_model(
            recipe.model.model_name_or_path,
            source=recipe.run.model_source,
            cache_dir=recipe.run.model_cache_dir,
        )
    evaluates = recipe.training.eval_strategy != "no"
    return build_trainer(
        path,
        traces.rows,
        model=recipe.model,
        args=recipe.training,
        opens_think=recipe.options.opens_think,
        eval_rows=solved_rows(task.held_out, recipe.options) if evaluates else None,
    )


def measure(trainer: SFTTrainer, recipe: Recipe, task: Task) -> Accuracy:
    """Return the accuracy on the held-out prompts, by the first reward, if there is one."""
    rewards, _ = build_rewards(recipe.task.rewards or ["last_number"])
    measured = recipe.task.rewards and recipe.run.measure_accuracy
    return measure_accuracy(
        trainer,
        task.held_out if measured else task.held_out.select([]),
        rewards[0],
        max_new_tokens=recipe.options.max_completion_length,
        num_samples=recipe.run.eval_samples,
        temperature=recipe.options.temperature,
    )


def read(argv: Sequence[str] | None) -> Recipe:
    """Return what YAML and command line ask for, checked before a model loads."""
    classes = (RunArguments, SFTArguments, TaskArguments, ModelConfig, SFTConfig)
    parsed, given = read_options(argv, classes, check=problems)
    return Recipe(*parsed, given=given)


def problems(
    run: RunArguments, options: SFTArguments, task: TaskArguments, model: ModelConfig, *training
) -> Iterator[str]:
    """Yield what cannot work."""
    yield from run_problems(run, model)
    yield from sft_problems(task, options, *training)


def check(recipe: Recipe) -> str:
    """Return what ``--dry_run`` prints."""
    traces, _ = load_traces(recipe.options, recipe.task, seed=recipe.training.seed)
    first = traces.rows[0]
    return (
        f"{traces}\nfirst prompt: {first['prompt']!r}\nfirst reply: {first['completion']!r}\n"
        "Dry run: everything was checked, no model was loaded."
    )


if __name__ == "__main__":
    sys.exit(run_recipe(run, read=read, check=check))
