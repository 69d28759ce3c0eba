"""The options of supervised fine-tuning on reasoning traces: one YAML key a field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

from trl_grpo_ext.checkpointing import LAST_GOOD
from trl_grpo_ext.data import TaskArguments, task_problems
from trl_grpo_ext.hub.options import repo_problems
from trl_grpo_ext.sft.solvers import SOLVERS, Solver

PLACEHOLDERS = ("{solution}", "{answer}")


@dataclass
class SFTArguments:
    """What is imitated; one YAML key a field."""

    traces: str | None = field(
        default=None,
        metadata={
            "help": "Conversations to imitate: a local file or folder, or a dataset on the Hub, "
            "with a column messages, or with prompt and completion. By default the solutions of "
            "the task's own training questions are (`solution_column` or `solver`)."
        },
    )
    traces_split: str = field(
        default="train", metadata={"help": "The split that holds the traces."}
    )
    solver: str | None = field(
        default=None,
        metadata={
            "help": "What writes the solution of a question, where there is no `solution_column`: "
            "'sums' for sums of integers, or an import path package.module:function (which runs "
            "the code there) from the text of a question to its solution, or None to leave it out."
        },
    )
    reply_template: str = field(
        default="<think>\n{solution}\n</think>\n<answer>{answer}</answer>",
        metadata={
            "help": "The reply that is imitated; {solution} and {answer} stand for those of the "
            "question. Traces are taken as they are."
        },
    )
    remove_from_solutions: str | None = field(
        default=None,
        metadata={
            "help": "A regular expression whose matches are taken out of solutions; '<<.*?>>' for "
            "the calculator's notes in GSM8K."
        },
    )
    opens_think: bool = field(
        default=False,
        metadata={
            "help": "Whether the chat template opens <think> for the model, as DeepSeek-R1's does: "
            "the template that is saved with the model then ends each prompt with it, and replies "
            "start inside it (`starts_in_thought` of the reward format)."
        },
    )
    num_traces: int | None = field(
        default=None, metadata={"help": "How many traces to train on; all by default."}
    )
    max_completion_length: int = field(
        default=256, metadata={"help": "Tokens of a reply by which accuracy is measured, at most."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Of these replies, where they are sampled."}
    )

    @property
    def solve(self) -> Solver | None:
        """What writes solutions, if something does."""
        return None if self.solver is None else find_solver(self.solver)


def find_solver(name: str) -> Solver:
    """Return a built-in solver, or what an import path leads to.

    Raises:
        ImportError: The path leads nowhere.
        AttributeError: As before.
        TypeError: It leads to something that cannot be called.
    """
    if name in SOLVERS:
        return SOLVERS[name]
    module, _, attribute = name.partition(":")
    solver: Solver = getattr(import_module(module), attribute)
    if not callable(solver):
        raise TypeError(f"{name} is a {type(solver).__name__}, which cannot be called")
    return solver


def sft_problems(task: TaskArguments, options: SFTArguments, *training: SFTConfig) -> Iterator[str]:
    """Yield what cannot work, without a model."""
    if task.dataset:
        yield from task_problems(task)
    elif options.traces is None:
        yield (
            "neither `dataset` nor `traces` is set, so there is nothing to train on. Set `dataset` "
            "to a task with solutions, or `traces` to conversations."
        )
    yield from _source_problems(task, options)
    for name in ("max_completion_length", "num_traces"):
        if (count := getattr(options, name)) is not None and count < 1:
            yield f"`{name}` is {count}. Use at least 1, or leave it out."
    if options.temperature <= 0:
        yield f"`temperature` is {options.temperature}. Use a number above 0."
    if options.remove_from_solutions is not None:
        yield from _pattern_problems(options.remove_from_solutions)
    for config in training:
        yield from _training_problems(task, options, config)
        if config.packing and config.max_length is None:
            yield (
                "`packing` is on but `max_length` is null, so it is open how long a packed row "
                "may be. Set `max_length` to the tokens of a row."
            )


def _pattern_problems(pattern: str) -> Iterator[str]:
    try:
        re.compile(pattern)
    except re.error as error:
        yield (
            f"`remove_from_solutions` is {pattern!r}, which is not a regular expression ({error}), "
            "so nothing can be taken out. Correct it, such as '<<.*?>>', or leave it out."
        )


def _training_problems(
    task: TaskArguments, options: SFTArguments, config: SFTConfig
) -> Iterator[str]:
    has_held_out = task.num_eval_prompts > 0 or task.eval_dataset_split is not None
    if config.eval_strategy != "no" and (options.traces is not None or not has_held_out):
        yield (
            "`eval_strategy` is set, but there are no held-out solutions whose loss could be "
            "measured: `traces` are all trained on, and a task needs `num_eval_prompts`. Set "
            "`eval_strategy: no`; recipes/evaluation.py measures accuracy."
        )
    if config.chat_template_path is not None and options.opens_think:
        yield (
            "`opens_think` and `chat_template_path` are set, but the template of that path is "
            "taken as it is. Remove one of them."
        )
    if config.push_to_hub:
        name = config.hub_model_id or Path(str(config.output_dir)).absolute().name
        yield from repo_problems(name, hub_token=config.hub_token)
        yield from _push_problems(config)
    checkpoint = config.resume_from_checkpoint
    if checkpoint not in (None, LAST_GOOD) and not Path(str(checkpoint)).is_dir():
        yield (
            f"`resume_from_checkpoint` is {checkpoint!r}, which is not a folder. Name a "
            f"checkpoint-N folder of the run, or {LAST_GOOD} for its newest whole one."
        )


def _push_problems(config: SFTConfig) -> Iterator[str]:
    strategy = HubStrategy(config.hub_strategy)
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        yield (
            f"`hub_strategy` is {strategy.value!r}, but recipes/sft.py uploads once, at its end, "
            "and no checkpoints. Set `hub_strategy: end`."
        )


def _source_problems(task: TaskArguments, options: SFTArguments) -> Iterator[str]:
    given = {
        "traces": options.traces,
        "solver": options.solver,
        "solution_column": task.solution_column,
    }
    named = [f"`{name}`" for name, value in given.items() if value is not None]
    if len(named) > 1:
        yield (
            f"{' and '.join(named)} are set, so it is open what is imitated. Keep one of them: "
            "conversations, or where the solutions of the task's questions come from."
        )
    if task.dataset and not named:
        yield (
            "none of `traces`, `solver` and `solution_column` is set, so there is nothing to "
            "imitate. Name the column that holds solutions, what writes them, or conversations."
        )
    if options.traces is None:
        yield from _template_problems(task, options.reply_template)
    if options.solver is not None:
        yield from _solver_problems(options.solver)


def _template_problems(task: TaskArguments, template: str) -> Iterator[str]:
    if PLACEHOLDERS[0] not in template:
        yield (
            f"`reply_template`={template!r} does not hold {{solution}}, so the model would never "
            "see one. Add {solution} where it belongs."
        )
    if PLACEHOLDERS[1] in template and task.answer_column is None:
        yield (
            f"`reply_template`={template!r} holds {{answer}}, but `answer_column` is null. Set "
            "`answer_column`, or leave {answer} out."
        )


def _solver_problems(name: str) -> Iterator[str]:
    try:
        find_solver(name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        yield (
            f"`solver` is {name!r}, which is no function ({type(error).__name__}: {error}), so no "
            f"solution can be written. Set it to one of {', '.join(SOLVERS)}, or to an import path "
            "package.module:function; add its folder to PYTHONPATH."
        )
