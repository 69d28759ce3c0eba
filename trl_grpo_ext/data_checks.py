"""What can be wrong with a task: its settings, its columns and the values in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING

from datasets import Dataset

from trl_grpo_ext.rewards.registry import build_rewards, log_name, required_columns

if TYPE_CHECKING:
    from trl_grpo_ext.data import TaskArguments


def setting_problems(arguments: TaskArguments) -> list[str]:
    """Return what is wrong with the arguments whatever the data holds."""
    problems = [] if arguments.dataset else [_no_dataset()]
    if isinstance(arguments.dataset_arguments, str):
        problems.append(_no_mapping(arguments.dataset_arguments))
    if "{prompt}" not in arguments.prompt_template:
        problems.append(_no_placeholder(arguments.prompt_template))
    if arguments.num_train_prompts is not None and arguments.num_train_prompts < 1:
        problems.append(_bad_count("num_train_prompts", arguments.num_train_prompts, least=1))
    if arguments.num_eval_prompts < 0:
        problems.append(_bad_count("num_eval_prompts", arguments.num_eval_prompts, least=0))
    return problems + _pattern_problems(arguments) + _keep_problems(arguments)


def _keep_problems(arguments: TaskArguments) -> list[str]:
    if arguments.keep_answers is None:
        return []
    if arguments.answer_column is None:
        return [
            f"`keep_answers` is {arguments.keep_answers!r}, but `answer_column` is null, so there "
            "are no answers to choose by. Set `answer_column`, or remove `keep_answers`."
        ]
    try:
        re.compile(arguments.keep_answers)
    except re.error as error:
        return [
            f"`keep_answers` is {arguments.keep_answers!r}, which is not a regular expression "
            f"({error}), so no row can be chosen. Correct it, or remove it to keep every row."
        ]
    return []


def _pattern_problems(arguments: TaskArguments) -> list[str]:
    given = {
        "answer": (arguments.answer_pattern, arguments.answer_column),
        "solution": (arguments.solution_pattern, arguments.solution_column),
    }
    found = [
        _pattern_problem(name, pattern, column)
        for name, (pattern, column) in given.items()
        if pattern is not None
    ]
    return [problem for problem in found if problem is not None]


def _pattern_problem(name: str, pattern: str, column: str | None) -> str | None:
    if column is None:
        return _pattern_without_column(name, pattern)
    try:
        num_groups = re.compile(pattern).groups
    except re.error as error:
        return _bad_pattern(name, pattern, f"is not a regular expression ({error})")
    return None if num_groups else _bad_pattern(name, pattern, "has no group in parentheses")


def source_problems(source: Dataset, arguments: TaskArguments) -> list[str]:
    """Return what is wrong with the columns of a source and the values in them."""
    wanted = {"prompt_column": arguments.prompt_column}
    wanted |= {f"{name}_column": column for name, column, _ in arguments.extracted_columns}
    missing = {k: v for k, v in wanted.items() if v and v not in source.column_names}
    if missing:
        return [_no_column(key, name, source.column_names) for key, name in missing.items()]
    return _prompt_problems(source, arguments) + _unmatched_problems(source, arguments)


def _prompt_problems(source: Dataset, arguments: TaskArguments) -> list[str]:
    prompts = list(source[arguments.prompt_column])
    bad = [index for index, prompt in enumerate(prompts) if not _is_prompt(prompt)]
    if bad:
        return [_no_prompts(arguments.prompt_column, bad, len(prompts))]
    if arguments.prompt_template != "{prompt}" and not all(isinstance(p, str) for p in prompts):
        return [_template_for_messages(arguments)]
    return []


def _is_prompt(prompt: object) -> bool:
    """Return whether the value is a text with something in it, or a conversation."""
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return isinstance(prompt, list) and bool(prompt) and all(map(_is_message, prompt))


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str)


def _unmatched_problems(source: Dataset, arguments: TaskArguments) -> list[str]:
    """Return whether a pattern, if it is one, leaves texts out."""
    problems = []
    for name, column, pattern in arguments.extracted_columns:
        if pattern is None or _pattern_problem(name, pattern, column):
            continue
        texts = [cell_text(value) for value in source[column]]
        if bad := [index for index, text in enumerate(texts) if not re.search(pattern, text)]:
            problems.append(_unmatched(name, pattern, bad, len(texts)))
    return problems


def cell_text(value: object) -> str:
    """Return the text in a value of a column: empty where there is none."""
    return "" if value is None else str(value)


def count_problems(arguments: TaskArguments, num_train: int, num_held_out: int) -> list[str]:
    """Return whether fewer distinct prompts are there than were asked for."""
    wanted_train, wanted_eval = arguments.num_train_prompts or 1, arguments.num_eval_prompts
    if arguments.eval_dataset_split is not None:
        wanted_eval = max(wanted_eval, 1)
    if num_train >= wanted_train and num_held_out >= wanted_eval:
        return []
    return [_too_few(arguments, num_train, num_held_out)]


def too_few_prompts(train_dataset: object, *, batch_size: int, group_size: int) -> str | None:
    """Return whether the rows do not fill one generation batch, so that TRL trains on nothing.

    Args:
        train_dataset: As given to the trainer; a stream, which has no length, is not judged.
        batch_size: Completions of a generation batch, over all processes.
        group_size: Completions a prompt.

    Example:
        >>> too_few_prompts(["a", "b"], batch_size=16, group_size=8) is None
        True
        >>> too_few_prompts(["a"], batch_size=16, group_size=8).partition(",")[0]
        '`train_dataset` has 1 row'
    """
    wanted = batch_size // group_size
    if not isinstance(train_dataset, Sized) or (num_rows := len(train_dataset)) >= wanted:
        return None
    return (
        f"`train_dataset` has {num_rows} row{'' if num_rows == 1 else 's'}, but a generation batch "
        f"takes {wanted} different prompts ({batch_size} completions / "
        f"`num_generations`={group_size}), and TRL leaves out what does not fill one, so nothing "
        "would be trained on. Add prompts, or lower `per_device_train_batch_size`, "
        "`gradient_accumulation_steps` or `steps_per_generation` (or `generation_batch_size`, if "
        "that is set) until they fill one."
    )


def reward_column_problems(arguments: TaskArguments, columns: Sequence[str]) -> list[str]:
    """Return which rewards, all of which can be built, need a column that the task lacks."""
    functions, _ = build_rewards(arguments.rewards)
    return [
        _no_reward_column(log_name(reward), missing, columns)
        for reward in functions
        if (missing := sorted(required_columns(reward) - set(columns)))
    ]


def _no_mapping(options: str) -> str:
    return (
        f"`dataset_arguments`={options!r} is not a mapping, so it cannot be passed on. Write names "
        "and values in the YAML, or JSON such as '{\"size\": 500}' on the command line."
    )


def _no_placeholder(template: str) -> str:
    return (
        f"`prompt_template`={template!r} does not hold {{prompt}}, so the model would never see "
        "the question. Add {prompt} where the question belongs."
    )


def _template_for_messages(arguments: TaskArguments) -> str:
    return (
        f"`prompt_template`={arguments.prompt_template!r} is set, but the column "
        f"'{arguments.prompt_column}' holds conversations, which are kept as they are. Leave "
        "`prompt_template` out, or set `prompt_column` to a column of texts."
    )


def _bad_count(key: str, count: int, *, least: int) -> str:
    return (
        f"`{key}`={count} is below {least}, so the data cannot be split. Set `{key}` to "
        f"{least} or more."
    )


def _bad_pattern(name: str, pattern: str, fault: str) -> str:
    example = {"answer": "'#### (.+)'", "solution": r"'(?s)(.*?)\s*####'"}[name]
    return (
        f"`{name}_pattern`={pattern!r} {fault}, so no {name} can be extracted. Correct it, "
        f"such as {example}, or leave it out to take the whole column."
    )


def _pattern_without_column(name: str, pattern: str) -> str:
    return (
        f"`{name}_pattern`={pattern!r} is set but `{name}_column` is null, so there is nothing to "
        f"extract from. Set `{name}_column`, or leave `{name}_pattern` out."
    )


def _unmatched(name: str, pattern: str, bad: Sequence[int], total: int) -> str:
    return (
        f"`{name}_pattern`={pattern!r} is not found in {len(bad)} of {total} rows (the first is "
        f"row {bad[0]}), so these have no {name}. Correct `{name}_pattern`, or remove the rows."
    )


def _no_dataset() -> str:
    return (
        "`dataset` is not set, so there are no prompts. Set it to a file or folder, "
        "'reasoning_gym:TASK', or a name on the Hub."
    )


def _no_column(key: str, name: str, columns: Sequence[str]) -> str:
    return (
        f"`{key}`={name!r} is not a column of the dataset, so its rows cannot be used. Set "
        f"`{key}` to one of: {', '.join(columns)}."
    )


def _no_prompts(column: str, bad: Sequence[int], total: int) -> str:
    return (
        f"the column '{column}' holds neither a text nor messages with a role in {len(bad)} of "
        f"{total} rows (the first is row {bad[0]}), so there is nothing to ask. Remove these rows, "
        "or set `prompt_column` to another column."
    )


def _too_few(arguments: TaskArguments, num_train: int, num_held_out: int) -> str:
    wanted = "all" if arguments.num_train_prompts is None else str(arguments.num_train_prompts)
    return (
        f"`dataset`={arguments.dataset!r} leaves {num_train} distinct prompts to train on "
        f"(`num_train_prompts`: {wanted}) and {num_held_out} to hold out (`num_eval_prompts`: "
        f"{arguments.num_eval_prompts}); prompts with the same text count once, and none may be in "
        "both sets. Lower one of the two, or draw or add more rows (`size` in "
        "`dataset_arguments` for a reasoning-gym task)."
    )


def _no_reward_column(reward: str, missing: Sequence[str], columns: Sequence[str]) -> str:
    return (
        f"reward '{reward}' needs the columns {', '.join(missing)}, which the task does not have "
        f"(it has {', '.join(columns)}; the `answer_column` is renamed to answer), so it cannot "
        "be called. Add the columns to the dataset, or correct the reward's `arguments`."
    )
