"""What every recipe does around its few lines: read the YAML, check all of it, stop well."""

from __future__ import annotations

import difflib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import psutil
import torch
import yaml
from datasets import Dataset
from transformers import Trainer
from trl import ModelConfig, TrlParser

from trl_grpo_ext.checkpointing import LAST_GOOD
from trl_grpo_ext.config import ExtGRPOConfig
from trl_grpo_ext.data import Task, TaskArguments, load_task, task_problems
from trl_grpo_ext.errors import ConfigurationError, ExtGRPOError
from trl_grpo_ext.evaluation import Accuracy
from trl_grpo_ext.memory import MemoryEstimate, available_memory_bytes, estimate_memory
from trl_grpo_ext.memory import ReferenceKind as MemoryReference
from trl_grpo_ext.memory.shape import model_on_meta
from trl_grpo_ext.model_cache import load_model_config, model_problems
from trl_grpo_ext.peers import is_told_elsewhere
from trl_grpo_ext.reference.build import check_options
from trl_grpo_ext.reference.options import ReferenceSettings
from trl_grpo_ext.report import Example, library_versions
from trl_grpo_ext.rewards.combine import unknown_reward_problems
from trl_grpo_ext.rewards.registry import build_rewards, log_name, reward_problems

_NUM_EXAMPLES = 6
_LAUNCHER_THREADS = "1"  # what `accelerate launch` sets OMP_NUM_THREADS to unless told otherwise


@dataclass
class RunArguments:
    """How the run as a whole goes; one YAML key a field."""

    model_source: str = field(
        default="auto",
        metadata={
            "help": "Where the model comes from: 'auto' (a local folder, or else the Hub), or "
            "'package' (a package of the Python index that carries it; no Hub needed)."
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
            "help": "Replies to each held-out prompt that accuracy is measured on, sampled at the "
            "training temperature; 0 for the one greedy reply."
        },
    )
    measure_accuracy: bool = field(
        default=True,
        metadata={
            "help": "Whether training recipes measure accuracy on the held-out prompts, before and "
            "after."
        },
    )
    cpu_threads: int | None = field(
        default=None,
        metadata={
            "help": "CPU threads of each process; by default what OMP_NUM_THREADS says, but all "
            "cores, shared out, where `accelerate launch` set it to 1."
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

    given: frozenset[str]

    @property
    def settings(self) -> dict[str, object]:
        """Every option that YAML or command line set, by its key: what a report shows."""
        return given_settings(self.run, self.task, self.model, self.training, given=self.given)


class Checked(Protocol):
    """What a recipe was asked for, whatever it is."""

    @property
    def run(self) -> RunArguments:
        """How the run as a whole goes."""


_Recipe = TypeVar("_Recipe", bound=Checked)


def given_settings(*parts: Any, given: frozenset[str]) -> dict[str, object]:
    """Return those options that were given, by their key; a token is not shown."""
    shown = given - {"hub_token"}
    return {
        f.name: getattr(part, f.name) for part in parts for f in fields(part) if f.name in shown
    }


def read_recipe(argv: Sequence[str] | None = None) -> Recipe:
    """Return what YAML (``--config FILE``) and command line ask for; the command line wins.

    Args:
        argv: The arguments after the program's name; ``sys.argv[1:]`` if not given.

    Raises:
        ConfigurationError: keys that do not exist, settings that cannot work, data, columns or
            rewards that are not there: all at once, before a model loads.
    """
    (run, task, model, training), given = read_options(argv, _OPTION_CLASSES, check=_problems)
    return Recipe(run, task, model, training, given=given)


def read_options(
    argv: Sequence[str] | None,
    option_classes: Sequence[Any],
    *,
    check: Callable[..., Iterable[str]],
) -> tuple[list[Any], frozenset[str]]:
    """Return the options of YAML and command line as one object a class, and the keys given.

    Args:
        argv: The arguments after the program's name; ``sys.argv[1:]`` if not given.
        option_classes: Dataclasses: :class:`RunArguments` first, those of the training last.
        check: Gets the objects, without the last where that one's own checks refuse it, and
            returns what cannot work.

    Raises:
        ConfigurationError: All that cannot work, at once.
    """
    _silence_known_warnings()
    arguments = list(sys.argv[1:] if argv is None else argv)
    keys = _yaml_keys(arguments)
    problems = _unknown_keys(keys, option_classes)
    parsed = _parsed(arguments, option_classes, problems)
    problems += check(*parsed)
    problems += _folder_problems(*parsed)
    if problems:
        raise ConfigurationError(problems)
    set_cpu_threads(parsed[0].cpu_threads)
    flags = {a[2:].partition("=")[0] for a in arguments if a.startswith("--")}
    return parsed, keys | flags


def run_recipe(
    run: Callable[[_Recipe], int],
    argv: Sequence[str] | None = None,
    *,
    read: Callable[[Sequence[str] | None], _Recipe] | None = None,
    check: Callable[[_Recipe], str] | None = None,
) -> int:
    """Read the recipe and run it, or only check it (``--dry_run``).

    Args:
        run: Does what the recipe says, and returns the exit code.
        argv: As for :func:`read_recipe`.
        read: Another reader than :func:`read_recipe`, for a recipe with other options.
        check: What ``--dry_run`` does then, in place of :func:`check_recipe`.

    Returns:
        The exit code: that of ``run``, or 1 with the error on standard error, without a traceback,
        if it is one that this package raises on purpose; once, whatever the number of processes;
        130 after Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # So that Ctrl-C reaches the run and not the launcher, `make` has the launcher ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        recipe = cast(Any, read or read_recipe)(argv)
        if recipe.run.dry_run:
            sys.stdout.write(cast(Any, check or check_recipe)(recipe) + "\n")
            return 0
        return run(recipe)
    except ExtGRPOError as error:
        if not is_told_elsewhere(error):
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    except KeyboardInterrupt:  # outside of training, which saves first
        sys.stderr.write("Interrupted. What is on disk stays; the same command starts again.\n")
        return 128 + signal.SIGINT


def check_recipe(recipe: Recipe) -> str:
    """Return what ``--dry_run`` prints: the task, and the memory that the run will need.

    Raises:
        ModelPreparationError: the model's configuration is not to be had.
        ReferenceModelError: the model has no such modules to keep, or no layers of such a rank.
    """
    task = load_task(recipe.task)
    estimate = estimate_run_memory(recipe, task)
    available = available_memory_bytes()
    fits = estimate.total_bytes <= available
    verdict = "fits" if fits else "does NOT fit: lower the batch or the lengths"
    return "\n".join(
        [
            f"training prompts: {task.train.num_rows}, held out: {task.held_out.num_rows}",
            f"columns: {', '.join(task.train.column_names)}",
            f"first prompt: {task.train[0]['prompt']!r}",
            "rewards: " + ", ".join(str(reward) for reward in recipe.task.rewards),
            "",
            estimate.to_table(),
            f"available now: {available / 2**30:.1f} GiB, so it {verdict}.",
            "Not counted: adapters (LoRA), a 4-bit policy, sharding over processes, vLLM.",
            *_not_asked(recipe),
            "Dry run: the rest was checked, no model was loaded."
            if _not_asked(recipe)
            else "Dry run: everything was checked, no model was loaded.",
        ]
    )


def _not_asked(recipe: Recipe) -> list[str]:
    names = [r.get("name") if isinstance(r, Mapping) else r for r in recipe.task.rewards]
    if "api" not in names:
        return []
    return ["Not asked: the reward services (`trl-grpo-ext check-reward --config ...` does that)."]


def estimate_run_memory(recipe: Recipe, task: Task) -> MemoryEstimate:
    """Return the memory that a process will need, from the model's configuration alone."""
    training = recipe.training
    config = load_model_config(
        str(recipe.model.model_name_or_path),
        source=recipe.run.model_source,
        cache_dir=recipe.run.model_cache_dir,
        revision=recipe.model.model_revision,
        trust_remote_code=training.trust_remote_code,
    )
    settings = ReferenceSettings.of(training, kind="quantized")
    if settings.keep_modules or settings.rank:
        check_options(
            model_on_meta(config), keep_modules=settings.keep_modules, rank=settings.rank or 0
        )
    reference: MemoryReference = "none"
    if training.beta:
        chosen = "adapter" if recipe.model.use_peft else training.reference
        reference = "resident" if chosen == "auto" else chosen
    return estimate_memory(
        config,
        micro_batch_size=training.per_device_train_batch_size,
        generation_batch_size=cast(int, training.generation_batch_size) // training.world_size,
        num_prompt_tokens=_longest_prompt(task),
        num_completion_tokens=cast(int, training.max_completion_length),
        dtype_bytes=2 if recipe.model.dtype in ("bfloat16", "float16") else 4,
        compute_dtype_bytes=2 if training.bf16 or training.fp16 else None,
        gradient_checkpointing=training.gradient_checkpointing,
        reference=reference,
        storage=settings.storage,
    )


def _longest_prompt(task: Task) -> int:
    """Tokens, about: one every 3 characters, and 16 for the chat template."""
    prompts = list(task.train["prompt"])
    return max(sum(len(str(message["content"])) for message in p) for p in prompts) // 3 + 16


def set_cpu_threads(num_threads: int | None) -> None:
    """Give torch its CPU threads: as asked, or all cores where the launcher left it a single one.

    Args:
        num_threads: Of this process, at least 1; ``None`` shares the cores out between the
            processes of a machine if `accelerate launch` set ``OMP_NUM_THREADS`` to 1.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if num_threads is None and launched and os.environ.get("OMP_NUM_THREADS") == _LAUNCHER_THREADS:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        num_threads = max(1, _num_cores() // processes)
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def _num_cores() -> int:
    """Those that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compare_replies(held_out: Dataset, before: Accuracy, after: Accuracy) -> list[Example]:
    """Return the first replies to the first held-out prompts, before and after training.

    None if accuracy was not measured.
    """
    if not after.completions:
        return []
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


def summarize(
    trainer: Trainer, run: RunArguments, before: Accuracy, after: Accuracy
) -> dict[str, object]:
    """Return what summary.json holds of a training run."""
    return {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "num_eval_prompts": before.num_scored_prompts,
        "eval_samples": run.eval_samples,
        "num_processes": trainer.accelerator.num_processes,
        "steps": trainer.state.global_step,
        "minutes": minutes_since_start(),
        "seed": trainer.args.seed,
        "versions": library_versions(),
    }


def minutes_since_start() -> float:
    """Return the minutes since this process was started, imports included."""
    return float(time.time() - psutil.Process().create_time()) / 60


def _parsed(arguments: list[str], option_classes: Sequence[Any], problems: list[str]) -> list[Any]:
    """The options, by class; without the last, whose problems are added, if that one is refused."""
    parser = TrlParser(cast(Any, option_classes))
    known = {f.name for options in option_classes for f in fields(options)}
    if "use_cpu" in known and not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True)
    try:
        return list(parser.parse_args_and_config(arguments, fail_with_unknown_args=False))
    except ConfigurationError as error:
        problems += error.problems
    except ValueError as error:  # a flag that does not exist
        raise ConfigurationError([*problems, str(error)]) from error
    others = TrlParser(cast(Any, option_classes[:-1]))
    return list(others.parse_args_and_config(arguments, return_remaining_strings=True)[:-1])


def _silence_known_warnings() -> None:
    # trl 1.16.0 reads and sets `gradient_checkpointing`, which transformers 5.23 calls
    # `activation_checkpointing`; a user of a recipe can do nothing about it.
    # Remove when trl uses the new name.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)


def _problems(
    run: RunArguments, task: TaskArguments, model: ModelConfig, *training: ExtGRPOConfig
) -> Iterator[str]:
    yield from run_problems(run, model)
    if not task.rewards:
        yield (
            "`rewards` is empty, so nothing would be learned. List at least one, such as "
            "`- name: last_number`."
        )
    yield from task_problems(task)
    rewards = [] if reward_problems(task.rewards) else build_rewards(task.rewards)[0]
    names = list(map(log_name, rewards))
    for config in training:
        gates, limits = config.reward_gates, config.reward_clip
        if names:
            yield from unknown_reward_problems(gates, limits, names=names)
        yield from _training_problems(model, config)


def run_problems(run: RunArguments, model: ModelConfig) -> Iterator[str]:
    """Yield what cannot work in the choice of a model and in how the run goes."""
    if model.model_name_or_path is None:
        yield (
            "`model_name_or_path` is not set, so there is no model to train. Name a local folder "
            "or a Hub model."
        )
    else:
        yield from model_problems(model.model_name_or_path, source=run.model_source)
    if run.eval_samples < 0:
        yield (
            f"`eval_samples` is {run.eval_samples}, which is no number of replies. Use a positive "
            "number, or 0 for one greedy reply a prompt."
        )
    if run.cpu_threads is not None and run.cpu_threads < 1:
        yield f"`cpu_threads` is {run.cpu_threads}. Use at least 1, or leave it out."


def _folder_problems(*parsed: Any) -> Iterator[str]:
    for folder in (o.output_dir for o in parsed if getattr(o, "output_dir", None)):
        above = (path for path in (Path(folder), *Path(folder).absolute().parents))
        there = next(path for path in above if os.path.exists(path))
        if not (there.is_dir() and os.access(there, os.W_OK)):
            what = "may not be written to" if there.is_dir() else "is a file"
            yield (
                f"`output_dir` is {folder}, but {there} {what}, so nothing could be saved. Name "
                "another folder."
            )


def _training_problems(model: ModelConfig, training: ExtGRPOConfig) -> Iterator[str]:
    checkpoint = training.resume_from_checkpoint
    if checkpoint not in (None, LAST_GOOD) and not Path(str(checkpoint)).is_dir():
        yield (
            f"`resume_from_checkpoint` is {checkpoint!r}, which is not a folder. Name a "
            f"checkpoint-N folder of the run, or {LAST_GOOD} for its newest whole one."
        )
    if training.reward_weights is not None:
        yield (
            "`reward_weights` is set, but a recipe takes weights from `rewards`. Remove it, and "
            "give each reward its `weight`."
        )
    adapter = model.use_peft or model.load_in_4bit or model.load_in_8bit
    if adapter and training.beta and training.reference not in ("auto", "adapter"):
        yield (
            f"`reference` is {training.reference!r}, but the policy is an adapter or quantized "
            "(`use_peft`, `load_in_4bit`, `load_in_8bit`): with the adapter switched off it is its "
            "own exact reference. Set `reference: auto`."
        )


def _yaml_keys(arguments: list[str]) -> frozenset[str]:
    """The keys of the YAML that ``--config`` names."""
    if any(argument.startswith("--config=") for argument in arguments):
        raise ConfigurationError(["`--config=FILE` is not understood. Write `--config FILE`."])
    if "--config" not in arguments:
        return frozenset()
    following = arguments[arguments.index("--config") + 1 :]
    if not following:
        raise ConfigurationError(["`--config` needs a file. Recipes' YAMLs: recipes/configs/."])
    path = Path(following[0])
    if not path.is_file():
        raise ConfigurationError(
            [f"`--config` {path} is not a file. Recipes' YAMLs are in recipes/configs/."]
        )
    try:
        keys = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigurationError([f"{path} is not YAML: {error}"]) from error
    if not isinstance(keys, dict):
        raise ConfigurationError([f"{path} is not a mapping of option: value."])
    return frozenset(map(str, keys))


def _unknown_keys(keys: frozenset[str], option_classes: Sequence[Any]) -> list[str]:
    """What to say of the keys that no option has."""
    known = {f.name for options in option_classes for f in fields(options)} | {"env"}
    return [_unknown_key(key, known) for key in sorted(keys - known)]


def _unknown_key(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, sorted(known), n=1)
    hint = f" Did you mean `{close[0]}`?" if close else " Remove it, or look it up with --help."
    return f"the YAML sets `{key}`, which is not an option, so it would do nothing.{hint}"
