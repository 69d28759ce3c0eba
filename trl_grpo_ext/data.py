"""The task of a run, chosen by name from YAML: the prompts to train on and those held out."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from datasets import Dataset, Features, List, Value, concatenate_datasets

from trl_grpo_ext.data_checks import (
    cell_text,
    count_problems,
    reward_column_problems,
    setting_problems,
    source_problems,
)
from trl_grpo_ext.data_sources import read_sources
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.completion import Message
from trl_grpo_ext.rewards.registry import (
    TRL_ARGUMENTS,
    reward_problems,
)

if TYPE_CHECKING:
    from trl_grpo_ext.rewards.registry import RewardEntry
else:
    RewardEntry = str  # what the parser makes of a word on the command line

MESSAGES = List({"role": Value("string"), "content": Value("string")})


@dataclass
class TaskArguments:
    """What to train on, and how replies are scored; one YAML key a field."""

    dataset: str = field(
        default="",
        metadata={
            "help": "A reasoning-gym task ('reasoning_gym:chain_sum'), a local .jsonl, .json, "
            ".parquet or .csv file, a local folder, or the name of a dataset on the Hub."
        },
    )
    dataset_arguments: dict[str, object] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of `reasoning_gym.create_dataset` (such as `size`) or of "
            "`datasets.load_dataset` (such as `name`): a mapping, or JSON on the command line."
        },
    )
    dataset_split: str = field(
        default="train", metadata={"help": "The split that holds the training prompts."}
    )
    eval_dataset_split: str | None = field(
        default=None,
        metadata={"help": "The split to hold out from; by default they come off the training one."},
    )
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "The column with the question: a text, or a list of messages."},
    )
    answer_column: str | None = field(
        default="answer",
        metadata={"help": "The column with the gold answer; null for a task that has none."},
    )
    answer_pattern: str | None = field(
        default=None,
        metadata={
            "help": "A regular expression whose first group is the gold answer within the answer "
            "column; '#### (.+)' for GSM8K."
        },
    )
    solution_column: str | None = field(
        default=None,
        metadata={
            "help": "The column with a worked-out solution, which fine-tuning (recipes/sft.py) "
            "imitates; it may be the answer column."
        },
    )
    solution_pattern: str | None = field(
        default=None,
        metadata={
            "help": "A regular expression whose first group is the solution within its column; "
            "'(?s)(.*?)\\s*####' for GSM8K."
        },
    )
    keep_answers: str | None = field(
        default=None,
        metadata={
            "help": "A regular expression that a gold answer must match as a whole; rows with "
            "another answer are left out."
        },
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "The system message; a conversation that has its own keeps that."},
    )
    prompt_template: str = field(
        default="{prompt}",
        metadata={"help": "The user message; {prompt} stands for the text of the question."},
    )
    examples: list[dict[str, str]] | None = field(
        default=None,
        metadata={
            "help": "Turns in front of each question, to show how to reply: mappings with prompt, "
            "which gets `prompt_template` too, and reply."
        },
    )
    num_train_prompts: int | None = field(
        default=None, metadata={"help": "How many distinct prompts to train on; all by default."}
    )
    num_eval_prompts: int = field(
        default=0,
        metadata={
            "help": "How many distinct prompts to hold out. 0 holds out none, or the whole of "
            "`eval_dataset_split` where that is set."
        },
    )
    task_seed: int = field(
        default=42,
        metadata={"help": "Draws the questions of a generated task, and shuffles every task."},
    )
    rewards: list[RewardEntry] = field(
        default_factory=list,
        metadata={
            "help": "Rewards by built-in name or import path (which runs the code there): a name, "
            "or a mapping with name, weight and arguments."
        },
    )

    def __post_init__(self) -> None:
        """Bring what a command line gives into the form that YAML gives."""
        if isinstance(self.dataset_arguments, str):
            self.dataset_arguments = _parsed_json(self.dataset_arguments)
        if isinstance(self.rewards, str | Mapping):
            self.rewards = [self.rewards]

    @property
    def extracted_columns(self) -> list[tuple[str, str, str | None]]:
        """What is read out of columns of texts: its name, the column, and the pattern for it."""
        named = (
            ("answer", self.answer_column, self.answer_pattern),
            ("solution", self.solution_column, self.solution_pattern),
        )
        return [(name, column, pattern) for name, column, pattern in named if column is not None]


@dataclass(frozen=True)
class Task:
    """The rows of a run. No text of a prompt is in both sets, nor twice in one.

    Args:
        train: Columns ``prompt`` (a list of messages), ``answer`` (text; absent without an
            `answer_column`), ``solution`` (text; with a `solution_column` only), and the other
            columns of the source, which rewards may ask for.
        held_out: The same columns; no rows if nothing was asked to be held out.
    """

    train: Dataset
    held_out: Dataset


def load_task(arguments: TaskArguments) -> Task:
    """Return the training and the held-out rows, the same ones in every process.

    Prompts that repeat are dropped first, by their text, then the rest is shuffled by `task_seed`
    and split. Generated tasks and local files need no network.

    Raises:
        ConfigurationError: The data set is not found, cannot be read as the arguments say, or has
            too few distinct prompts.

    Example:
        >>> sums = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
        >>> task = load_task(
        ...     TaskArguments(
        ...         dataset="reasoning_gym:chain_sum", dataset_arguments=sums, num_eval_prompts=4
        ...     )
        ... )
        >>> task.held_out.num_rows, task.held_out.column_names
        (4, ['prompt', 'answer', 'reasoning_gym'])
    """
    problems = setting_problems(arguments) + _example_problems(arguments)
    if not arguments.dataset:
        raise ConfigurationError(problems)
    try:
        sources = _read_sources(arguments)
    except ConfigurationError as error:
        raise ConfigurationError(problems + error.problems) from error
    for source in sources:
        problems += [p for p in source_problems(source, arguments) if p not in problems]
    if problems:
        raise ConfigurationError(problems)
    return _split(sources, arguments)


def task_problems(arguments: TaskArguments) -> list[str]:
    """Return all that is wrong with the task, one message each, without loading a model.

    It loads the data, checks columns and counts, and builds the rewards.

    Example:
        >>> arguments = TaskArguments(dataset="sums.jsonl", rewards=["last_number"])
        >>> print(task_problems(arguments)[0])
        `dataset`='sums.jsonl' does not exist, so there are no prompts. Set `dataset` to a file \
or folder that is there, 'reasoning_gym:TASK', or a name on the Hub.
    """
    problems = reward_problems(arguments.rewards)
    try:
        task = load_task(arguments)
    except ConfigurationError as error:
        return error.problems + problems
    return problems or reward_column_problems(arguments, task.train.column_names)


def _split(sources: Sequence[Dataset], arguments: TaskArguments) -> Task:
    """Return the task, from one source, or from a training and an evaluation source."""
    train_indices = _first_of_each_text(sources[0], arguments)
    if len(sources) == 1:
        held_indices = train_indices[: arguments.num_eval_prompts]
        train_indices = train_indices[arguments.num_eval_prompts :]
    else:
        held_indices = _unseen(sources, arguments)[: arguments.num_eval_prompts or None]
    train_indices = train_indices[: arguments.num_train_prompts]
    if problems := count_problems(arguments, len(train_indices), len(held_indices)):
        raise ConfigurationError(problems)
    return Task(
        train=_task_rows(sources[0], arguments).select(train_indices),
        held_out=_task_rows(sources[-1], arguments).select(held_indices),
    )


def _first_of_each_text(source: Dataset, arguments: TaskArguments) -> list[int]:
    """Return the row numbers of the distinct prompts, shuffled by `task_seed`."""
    first: dict[str, int] = {}
    prompts = list(source[arguments.prompt_column])
    for index in _kept(source, arguments):
        first.setdefault(_text_key(prompts[index]), index)
    indices = list(first.values())
    random.Random(arguments.task_seed).shuffle(indices)
    return indices


def _kept(source: Dataset, arguments: TaskArguments) -> list[int]:
    """Return the row numbers whose gold answer is one to keep."""
    if arguments.keep_answers is None or arguments.answer_column is None:
        return list(range(source.num_rows))
    keep = re.compile(arguments.keep_answers)
    answers = source[arguments.answer_column]
    pattern = arguments.answer_pattern
    return [i for i, value in enumerate(answers) if keep.fullmatch(_extracted(value, pattern))]


def _unseen(sources: Sequence[Dataset], arguments: TaskArguments) -> list[int]:
    """Return the row numbers of the evaluation source whose text is not in the training source."""
    train, held_out = sources
    seen = {_text_key(prompt) for prompt in train[arguments.prompt_column]}
    prompts = list(held_out[arguments.prompt_column])
    return [
        index
        for index in _first_of_each_text(held_out, arguments)
        if _text_key(prompts[index]) not in seen
    ]


def _text_key(prompt: str | Sequence[Message]) -> str:
    """Return what two prompts share if they are the same text, up to white space."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    return " ".join(text.split())


def _task_rows(source: Dataset, arguments: TaskArguments) -> Dataset:
    """Return the rows as the trainer and the rewards take them."""
    prompts, kind = source[arguments.prompt_column], source.features[arguments.prompt_column]
    columns: dict[str, list[object]]
    columns = {"prompt": [_messages(prompt, arguments) for prompt in prompts]}
    features = Features({"prompt": MESSAGES if _is_text(kind) else kind})
    for name, column, pattern in arguments.extracted_columns:
        columns[name] = [_extracted(value, pattern) for value in source[column]]
        features[name] = Value("string")
    rows, others = Dataset.from_dict(columns, features=features), _other_columns(source, arguments)
    return concatenate_datasets([rows, source.select_columns(others)], axis=1) if others else rows


def _other_columns(source: Dataset, arguments: TaskArguments) -> list[str]:
    """Return the columns that rewards may ask for, without those that TRL itself passes."""
    used = {arguments.prompt_column, "prompt", "answer", "completion"}
    used |= {part for name, column, _ in arguments.extracted_columns for part in (name, column)}
    return [name for name in source.column_names if name not in used | TRL_ARGUMENTS]


def _messages(prompt: str | list[Message], arguments: TaskArguments) -> list[Message]:
    if isinstance(prompt, str):
        prompt = [*_example_turns(arguments), _question(prompt, arguments)]
    if arguments.system_prompt is None or prompt[0]["role"] == "system":
        return prompt
    return [{"role": "system", "content": arguments.system_prompt}, *prompt]


def _question(text: str, arguments: TaskArguments) -> Message:
    return {"role": "user", "content": arguments.prompt_template.replace("{prompt}", text)}


def _example_turns(arguments: TaskArguments) -> list[Message]:
    turns: list[Message] = []
    for example in arguments.examples or []:
        reply = {"role": "assistant", "content": example["reply"]}
        turns += [_question(example["prompt"], arguments), reply]
    return turns


def _example_problems(arguments: TaskArguments) -> list[str]:
    for example in arguments.examples or []:
        texts = example.values() if isinstance(example, Mapping) else ()
        if not texts or set(example) != {"prompt", "reply"} or not all(map(_is_str, texts)):
            return [
                f"`examples` holds {example!r}, which is no turn to show. Write mappings with two "
                "texts, such as {prompt: 2 + 3 =, reply: 2 + 3 = 5}."
            ]
    return []


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _extracted(value: object, pattern: str | None) -> str:
    """Return what is read out of a value of a column of texts."""
    text = cell_text(value)
    if pattern is None:
        return text
    match = re.search(pattern, text)
    assert match, "source_problems lets only matching texts through"
    return (match[1] or "").strip()


def _read_sources(arguments: TaskArguments) -> list[Dataset]:
    """Return the training source, and the evaluation source where a split is named for it."""
    splits = [arguments.dataset_split, arguments.eval_dataset_split]
    options = arguments.dataset_arguments
    return read_sources(
        arguments.dataset,
        splits=[split for split in splits if split is not None],
        options=options if isinstance(options, dict) else {},  # else reported as a setting
        seed=arguments.task_seed,
    )


def _parsed_json(text: str) -> dict[str, object] | str:
    """Return the mapping that the text stands for, or the text if it stands for none."""
    try:
        options = json.loads(text)
    except json.JSONDecodeError:
        return text
    return options if isinstance(options, dict) else text


def _is_text(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")
