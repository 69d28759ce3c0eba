"""Where rows come from: a generated task, a local file or folder, or the Hub."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.gym_scorer import create_task
from trl_grpo_ext.rewards.reasoning_gym import COLUMN, scorer_row

REASONING_GYM = "reasoning_gym:"
FILE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

# Seen with reasoning-gym 0.1.25: the same seed gives other questions in another process, so that
# two ranks would train on different data. The first five iterate over sets of strings.
HASH_ORDERED_TASKS = frozenset(
    {
        "isomorphic_strings",
        "knight_swap",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)
UNSEEDED_TASKS = frozenset({"codeio"})


def read_sources(
    dataset: str, *, splits: Sequence[str], options: Mapping[str, object], seed: int
) -> list[Dataset]:
    """Return the rows of each split, as the source holds them.

    Args:
        dataset: ``reasoning_gym:TASK``, a local file or folder, or a name on the Hub.
        splits: One or more; ``["train"]`` for a generated task.
        options: Keyword arguments of ``reasoning_gym.create_dataset``, where they override the
            seed, or of ``datasets.load_dataset``.
        seed: Draws the questions of a generated task.

    Returns:
        One data set a split; the columns of a generated task are ``prompt``, ``answer`` and
        ``reasoning_gym``, with what the reward of that name needs.

    Raises:
        ConfigurationError: It is not there, or cannot be read with these options.

    Example:
        >>> (sums,) = read_sources(
        ...     "reasoning_gym:chain_sum", splits=["train"], options={"size": 3}, seed=0
        ... )
        >>> sums.num_rows, sums.column_names
        (3, ['prompt', 'answer', 'reasoning_gym'])
    """
    if dataset.startswith(REASONING_GYM):
        return [_read_reasoning_gym(dataset, splits=splits, options={"seed": seed, **options})]
    return [_read_split(dataset, split=split, options=options) for split in splits]


def _read_split(dataset: str, *, split: str, options: Mapping[str, object]) -> Dataset:
    path = Path(dataset).expanduser()
    try:
        if path.exists():
            return _read_local(path, split=split, options=options)
        if _looks_local(dataset):
            raise ConfigurationError([_no_such_file(dataset)])
        return load_dataset(dataset, split=split, streaming=False, **options)
    except ConfigurationError:
        raise
    except (DatasetsError, OSError, TypeError, ValueError) as error:
        raise ConfigurationError([_unreadable(dataset, split, error)]) from error


def _read_local(path: Path, *, split: str, options: Mapping[str, object]) -> Dataset:
    if (path / "dataset_dict.json").exists():
        return load_from_disk(str(path / split))
    if (path / "state.json").exists():
        return load_from_disk(str(path))
    if path.is_dir():
        return load_dataset(str(path), split=split, streaming=False, **options)
    builder = FILE_BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ConfigurationError([_unknown_suffix(path)])
    return load_dataset(builder, data_files=str(path), split=split, streaming=False, **options)


def _looks_local(dataset: str) -> bool:
    return dataset.startswith((".", "/", "~")) or Path(dataset).suffix.lower() in FILE_BUILDERS


def _read_reasoning_gym(
    dataset: str, *, splits: Sequence[str], options: Mapping[str, object]
) -> Dataset:
    name = dataset.removeprefix(REASONING_GYM)
    gym = _import_reasoning_gym(dataset)
    if problems := _reasoning_gym_problems(gym, name, splits=splits, options=options):
        raise ConfigurationError(problems)
    try:
        items = create_task(name, options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigurationError([_refused(name, options, error)]) from error
    return Dataset.from_list([_reasoning_gym_row(name, options, item) for item in items])


def _reasoning_gym_row(
    task: str, options: Mapping[str, object], item: Mapping[str, object]
) -> dict[str, str]:
    answer = item["answer"]
    return {
        "prompt": str(item["question"]),
        "answer": "" if answer is None else str(answer),
        COLUMN: scorer_row(task, options, item),
    }


def _import_reasoning_gym(dataset: str) -> ModuleType:
    try:
        return importlib.import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        raise ConfigurationError([_not_installed(dataset)]) from error


def _reasoning_gym_problems(
    gym: ModuleType, name: str, *, splits: Sequence[str], options: Mapping[str, object]
) -> list[str]:
    tasks = gym.factory.DATASETS
    if name not in tasks:
        return [_unknown_task(name, list(tasks))]
    accepted = sorted(option.name for option in fields(tasks[name][1]))
    unknown = sorted(set(options) - set(accepted))
    problems = [_unknown_options(name, unknown, accepted)] if unknown else []
    if list(splits) != ["train"]:
        problems.append(_no_splits(splits))
    if name in UNSEEDED_TASKS or (name in HASH_ORDERED_TASKS and _hashes_at_random()):
        problems.append(_not_reproducible(name))
    return problems


def _hashes_at_random() -> bool:
    """Return whether sets of strings are ordered differently in every process."""
    if not sys.flags.hash_randomization:
        return False
    return os.environ.get("PYTHONHASHSEED", "random") == "random"


def _no_such_file(dataset: str) -> str:
    return (
        f"`dataset`={dataset!r} does not exist, so there are no prompts. Set `dataset` to a file "
        "or folder that is there, 'reasoning_gym:TASK', or a name on the Hub."
    )


def _unknown_suffix(path: Path) -> str:
    return (
        f"`dataset`='{path}' is a file of an unknown kind, so it cannot be read. Set `dataset` to "
        f"a file that ends in one of {', '.join(FILE_BUILDERS)}."
    )


def _unreadable(dataset: str, split: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return (
        f"`dataset`={dataset!r} could not be loaded with the split '{split}' "
        f"({type(error).__name__}: {reason}), so there are no prompts. Correct `dataset`, "
        "`dataset_arguments` or the split, or, without a network, set `dataset` to a local file."
    )


def _not_installed(dataset: str) -> str:
    return (
        f"`dataset`={dataset!r} needs reasoning-gym, which is not installed, so no question can "
        "be drawn. Run: pip install reasoning-gym gguf"
    )


def _unknown_task(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=3)
    suggestion = f"{', '.join(close)}" if close else "chain_sum"
    return (
        f"`dataset`='{REASONING_GYM}{name}' names no task of reasoning-gym, so no question can be "
        f"drawn. Set it to one of its {len(known)} tasks, such as {suggestion}."
    )


def _unknown_options(name: str, unknown: Sequence[str], accepted: Sequence[str]) -> str:
    return (
        f"`dataset_arguments` holds {', '.join(unknown)}, which the reasoning-gym task '{name}' "
        f"does not accept, so no question can be drawn. It accepts {', '.join(accepted)}."
    )


def _refused(name: str, options: Mapping[str, object], error: Exception) -> str:
    return (
        f"the reasoning-gym task '{name}' refused {dict(options)} ({type(error).__name__}: "
        f"{error}), so no question can be drawn. Correct `dataset_arguments`."
    )


def _no_splits(splits: Sequence[str]) -> str:
    return (
        f"`dataset_split` and `eval_dataset_split` ask for {', '.join(splits)}, but a "
        "reasoning-gym task has no splits. Leave both out, and set `num_eval_prompts` to hold "
        "prompts out."
    )


def _not_reproducible(name: str) -> str:
    remedy = "Write its questions to a .jsonl file once and set `dataset` to that."
    if name in HASH_ORDERED_TASKS:
        remedy = f"Set PYTHONHASHSEED=0 in the environment. Or: {remedy}"
    return (
        f"the reasoning-gym task '{name}' draws other questions in every process, whatever the "
        f"seed, so ranks and resumed runs would see different data. {remedy}"
    )
