"""What every recipe script does before and around its few lines: read the YAML, check all of it, stop well."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, TrlParser

from trl_grpo_ext.config import ExtGRPOConfig
from trl_grpo_ext.data import TaskArguments, load_task, task_problems
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.evaluation import Accuracy
from trl_grpo_ext.memory import MemoryEstimate, available_memory_bytes, estimate_memory
from trl_grpo_ext.model_cache import load_model_config, model_problems
from trl_grpo_ext.report import Example

EXIT_INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended

_NUM_EXAMPLES = 6
_LAUNCHER_THREADS = "1"  # what `accelerate launch` sets OMP_NUM_THREADS to unless told otherwise


@dataclass
class RunArguments:
    """How the run as a whole goes; one YAML key a field."""

    model_source: str = field(
        default="auto",
        metadata={
            "help": "Where the model comes from: 'auto' (a local folder, or else the Hub), or 'package' (a package of "
            "the Python index that carries it; no Hub needed)."
        },
    )
    model_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where a packaged model is prepared, once; ~/.cache/trl_grpo_ext by default."
        },
    )
    eval_samples: int = field(
        default=4,
        metadata={
            "help": "Replies a held-out prompt that accuracy is measured on, sampled at the training temperature; 0 "
            "for the one greedy reply."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Check configuration, data, rewards and memory, and end before a model loads."
        },
    )


_OPTION_CLASSES: Any = (RunArguments, TaskArguments, ModelConfig, ExtGRPOConfig)


@dataclass(frozen=True)
class Recipe:
    """Everything that a run was asked for, checked."""

    run: RunArguments
    task: TaskArguments
    model: ModelConfig
    training: ExtGRPOConfig

    @property
    def settings(self) -> dict[str, object]:
        """Every option that differs from its default, by its YAML key; what a report shows."""
        parts = (self.run, self.task, self.model, self.training)
        return {key: value for part in parts for key, value in _changed(part).items()}


def read_recipe(argv: Sequence[str] | None = None) -> Recipe:
    """Return what YAML (``--config FILE``) and command line ask for; the command line wins.

    Args:
        argv: The arguments after the program's name; ``sys.argv[1:]`` if not given.

    Raises:
        ConfigurationError: keys that do not exist, settings that cannot work, data, columns or
            rewards that are not there: all at once, before a model loads.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    problems = _unknown_keys(arguments)
    use_all_cores()
    parser = TrlParser(_OPTION_CLASSES)
    if not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True)
    try:
        run, task, model, training = parser.parse_args_and_config(
            arguments, fail_with_unknown_args=False
        )
    except ConfigurationError as error:
        raise ConfigurationError(problems + error.problems) from error
    problems += _recipe_problems(run, task, model, training)
    if problems:
        raise ConfigurationError(problems)
    return Recipe(run, task, model, training)


def check_recipe(recipe: Recipe) -> str:
    """Return what ``--dry_run`` prints: the task and the memory that the run will need. No weight
    is loaded.

    Raises:
        ConfigurationError: the model's configuration cannot be had.
    """
    task = load_task(recipe.task)
    estimate = estimate_run_memory(recipe)
    available = available_memory_bytes()
    verdict = (
        "fits"
        if estimate.total_bytes <= available
        else "does NOT fit: lower the batch or the lengths"
    )
    return "\n".join(
        [
            f"training prompts: {task.train.num_rows}, held out: {task.held_out.num_rows}",
            f"columns: {', '.join(task.train.column_names)}",
            f"first prompt: {task.train[0]['prompt']!r}",
            "rewards: " + ", ".join(str(reward) for reward in recipe.task.rewards),
            "",
            estimate.to_table(),
            f"available now: {available / 2**30:.1f} GiB, so it {verdict}.",
            "Dry run: everything was checked, no model was loaded.",
        ]
    )


def estimate_run_memory(recipe: Recipe) -> MemoryEstimate:
    """Return the memory that one process of the run will need, from the model's configuration alone."""
    training = recipe.training
    config = load_model_config(
        _model_name(recipe.model),
        source=recipe.run.model_source,
        cache_dir=recipe.run.model_cache_dir,
        revision=recipe.model.model_revision,
        trust_remote_code=training.trust_remote_code,
    )
    kinds = {"auto": "none" if recipe.model.use_peft else "resident"}
    reference = kinds.get(training.reference, training.reference) if training.beta else "none"
    return estimate_memory(
        config,
        micro_batch_size=training.per_device_train_batch_size,
        generation_batch_size=training.generation_batch_size // training.world_size,
        num_prompt_tokens=recipe_prompt_tokens(recipe.task),
        num_completion_tokens=training.max_completion_length,
        dtype_bytes=2 if recipe.model.dtype in ("bfloat16", "float16") else 4,
        gradient_checkpointing=training.gradient_checkpointing,
        reference=reference,  # type: ignore[arg-type]
    )


def recipe_prompt_tokens(task: TaskArguments) -> int:
    """Return about how many tokens the longest prompt has: a token every 3 characters, and 16 for the template."""
    rows = load_task(task).train
    longest = max(
        sum(len(str(message["content"])) for message in prompt) for prompt in rows["prompt"]
    )
    return longest // 3 + 16


class InterruptCallback(TrainerCallback):  # type: ignore[misc]
    """On Ctrl-C, finish the step, save a checkpoint and stop; a second Ctrl-C stops at once.

    Attributes:
        interrupted: Whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = signal.default_int_handler

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen for Ctrl-C."""
        self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the trainer to save and to stop if Ctrl-C was pressed in any process."""
        if self._anywhere():
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give Ctrl-C back."""
        signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, self._previous)
        self.interrupted = True
        print(
            "\nInterrupted: finishing this step, then saving a checkpoint. Press Ctrl-C again to stop at once.",
            file=sys.stderr,
            flush=True,
        )

    def _anywhere(self) -> bool:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flags: list[bool] = [False] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(flags, self.interrupted)
            self.interrupted = any(flags)
        return self.interrupted


def use_all_cores() -> None:
    """Share the cores between the processes of this machine, where the launcher left torch a single one."""
    if (
        os.environ.get("OMP_NUM_THREADS") == _LAUNCHER_THREADS
        and "ACCELERATE_MIXED_PRECISION" in os.environ
    ):
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def compare_replies(held_out: Dataset, before: Accuracy, after: Accuracy) -> list[Example]:
    """Return the first replies to the first held-out prompts, before and after training."""
    each = len(after.completions) // max(held_out.num_rows, 1)
    rows = held_out.select(range(min(_NUM_EXAMPLES, held_out.num_rows)))
    return [
        Example(
            prompt=row["prompt"][-1]["content"],
            answer=row.get("answer", ""),
            before=before.completions[index * each],
            after=after.completions[index * each],
        )
        for index, row in enumerate(rows)
    ]


def how_to_resume(output_dir: Path) -> str:
    """Return what to tell a user whose run stopped after it saved a checkpoint."""
    checkpoint = get_last_checkpoint(str(output_dir))
    return (
        f"Saved {checkpoint}. To go on, run the same command with --resume_from_checkpoint {checkpoint} (or `make "
        f'quickstart ARGS="--resume_from_checkpoint {checkpoint}"`).'
    )


def _model_name(model: ModelConfig) -> str:
    return str(model.model_name_or_path)


def _changed(options: Any) -> dict[str, object]:
    """Fields whose value is not the default; a factory's default counts as one."""
    fresh = {
        f.name: f.default_factory() for f in fields(options) if f.default_factory is not MISSING
    }
    defaults = {f.name: f.default for f in fields(options)} | fresh
    # `fields` gives no secret: tokens are read from the environment, never from an option, and the one option that
    # could hold one is left out.
    names = [f.name for f in fields(options) if f.init and f.name != "hub_token"]
    return {n: getattr(options, n) for n in names if getattr(options, n) != defaults[n]}


def _recipe_problems(
    run: RunArguments, task: TaskArguments, model: ModelConfig, training: ExtGRPOConfig
) -> Iterator[str]:
    if model.model_name_or_path is None:
        yield "`model_name_or_path` is not set, so there is no model to train. Name a local folder or a Hub model."
    else:
        yield from model_problems(model.model_name_or_path, source=run.model_source)
    if run.eval_samples < 0:
        yield f"`eval_samples` is {run.eval_samples}. Use a positive number, or 0 for one greedy reply a prompt."
    if not task.rewards:
        yield "`rewards` is empty, so nothing would be learned. List at least one, such as `- name: last_number`."
    checkpoint = training.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        yield f"`resume_from_checkpoint` is {checkpoint!r}, which is not a folder. Name one checkpoint-N of the run."
    yield from task_problems(task)


def _unknown_keys(arguments: list[str]) -> list[str]:
    """Keys of the YAML that no option has, with the closest that one does."""
    if "--config" not in arguments:
        return []
    path = Path(arguments[arguments.index("--config") + 1])
    if not path.is_file():
        raise ConfigurationError(
            [f"`--config` {path} is not a file. Recipes' YAMLs are in recipes/configs/."]
        )
    keys = yaml.safe_load(path.read_text())
    if not isinstance(keys, dict):
        raise ConfigurationError([f"{path} is not a mapping of option: value."])
    known = {f.name for options in _OPTION_CLASSES for f in fields(options)} | {"env"}
    return [_unknown_key(key, known, path) for key in keys if key not in known]


def _unknown_key(key: object, known: set[str], path: Path) -> str:
    close = difflib.get_close_matches(str(key), sorted(known), n=1)
    hint = f" Did you mean `{close[0]}`?" if close else " Remove it, or look it up with --help."
    return f"{path} sets `{key}`, which is not an option, so it would do nothing.{hint}"
