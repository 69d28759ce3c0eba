"""What is imitated: conversations, one row an assistant's turn, so that the loss is on that alone.

TRL masks the prompt of a row with ``prompt`` and ``completion`` whatever the chat template is; its
``assistant_only_loss`` needs a template that marks the assistant's turns. A turn with all that came
before it as its prompt is also what the model will see when it is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features

from trl_grpo_ext.data import MESSAGES, Task, TaskArguments, load_task
from trl_grpo_ext.data_sources import read_sources
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.completion import Message
from trl_grpo_ext.sft.options import SFTArguments
from trl_grpo_ext.sft.solvers import Solver

Turn = tuple[list[Message], Message]


@dataclass(frozen=True)
class Traces:
    """What to train on, and what was left out.

    Attributes:
        rows: Columns ``prompt`` and ``completion``, lists of messages; a completion has one.
        num_unsolved: Questions without a solution.
        num_held_out: Turns that answer a question that is held out.
    """

    rows: Dataset
    num_unsolved: int = 0
    num_held_out: int = 0

    def __str__(self) -> str:
        """Return one line for a terminal."""
        reasons = {"no solution": self.num_unsolved, "the question is held out": self.num_held_out}
        left = "".join(f"; {count} left out: {why}" for why, count in reasons.items() if count)
        return f"{self.rows.num_rows} traces{left}"


def load_traces(
    options: SFTArguments, arguments: TaskArguments, *, seed: int = 0
) -> tuple[Traces, Task]:
    """Return what is imitated, and the task with the questions that are held out.

    Args:
        options: As for :func:`make_traces`, like ``seed``.
        arguments: Of the task.
        seed: Of the shuffle.

    Raises:
        ConfigurationError: As :func:`~trl_grpo_ext.data.load_task` and :func:`make_traces`.
    """
    task = load_questions(arguments)
    return make_traces(options, task, template=arguments.prompt_template, seed=seed), task


def load_questions(arguments: TaskArguments) -> Task:
    """Return the task, or one without rows where `dataset` is not set and traces are all there is.

    Raises:
        ConfigurationError: As :func:`~trl_grpo_ext.data.load_task`.
    """
    if arguments.dataset:
        return load_task(arguments)
    nothing = Dataset.from_dict({"prompt": []}, features=Features(prompt=MESSAGES))
    return Task(train=nothing, held_out=nothing)


def make_traces(
    options: SFTArguments, task: Task, *, template: str = "{prompt}", seed: int = 0
) -> Traces:
    """Return the turns to imitate, the same in every process.

    Args:
        options: Where they come from: ``traces``, else the solutions of the task's own questions.
        task: The questions. A trace in which somebody asks one that is held out is left out.
        template: ``prompt_template`` of the task; traces may ask without it.
        seed: Shuffles traces that are read, before the first ``num_traces`` are taken.

    Raises:
        ConfigurationError: There is none, or a row is no conversation.
    """
    if options.traces is None:
        turns, num_unsolved = _solved(task.train, options, most=options.num_traces)
        made = Traces(_rows(turns), num_unsolved=num_unsolved)
    else:
        turns = _read(options)
        held_out = {text for row in task.held_out for text in _forms(row["prompt"], template)}
        kept = [turn for turn in turns if not held_out & set(_asked(turn[0]))]
        rows = _rows(kept).shuffle(seed=seed)
        made = Traces(rows, num_held_out=len(turns) - len(kept))
    if not made.rows.num_rows:
        raise ConfigurationError([_nothing(made)])
    wanted = min(options.num_traces or made.rows.num_rows, made.rows.num_rows)
    return Traces(made.rows.select(range(wanted)), made.num_unsolved, made.num_held_out)


def solved_rows(rows: Dataset, options: SFTArguments) -> Dataset:
    """Return the turns that answer the questions of a task, without those that have no solution."""
    return _rows(_solved(rows, options)[0])


def _solved(
    rows: Dataset, options: SFTArguments, *, most: int | None = None
) -> tuple[list[Turn], int]:
    """Return the turns of the first questions that have a solution, and how many had none."""
    turns: list[Turn] = []
    num_unsolved, solve = 0, options.solve
    for row in rows:
        if len(turns) == most:
            break
        if solution := _solution(row, options, solve):
            reply = options.reply_template.replace("{answer}", str(row.get("answer")))
            reply = reply.replace("{solution}", solution)
            turns.append((row["prompt"], {"role": "assistant", "content": reply}))
        else:
            num_unsolved += 1
    return turns, num_unsolved


def _solution(row: Mapping[str, Any], options: SFTArguments, solve: Solver | None) -> str | None:
    text = row["solution"] if solve is None else solve(_asked(row["prompt"])[-1])
    if not text or options.remove_from_solutions is None:
        return text
    return re.sub(options.remove_from_solutions, "", text).strip()


def _read(options: SFTArguments) -> list[Turn]:
    try:
        (rows,) = read_sources(
            str(options.traces), splits=[options.traces_split], options={}, seed=0
        )
    except ConfigurationError as error:  # which names the option that tasks come from
        told = [problem.replace("`dataset`", "`traces`") for problem in error.problems]
        raise ConfigurationError(told) from error
    names = set(rows.column_names)
    if "messages" not in names and not {"prompt", "completion"} <= names:
        raise ConfigurationError([_no_conversations(options, rows.column_names)])
    turns: list[Turn] = []
    for number, row in enumerate(rows):
        try:
            turns += _turns(_conversation(row))
        except (KeyError, TypeError) as error:
            raise ConfigurationError([_bad_row(options, number, error)]) from error
    return turns


def _conversation(row: Mapping[str, Any]) -> tuple[list[Message], int]:
    """Return the messages of a row, and how many of them are given and not imitated."""
    if "messages" in row:
        return _messages(row["messages"], role="user"), 0
    prompt = _messages(row["prompt"], role="user")
    return prompt + _messages(row["completion"], role="assistant"), len(prompt)


def _messages(value: object, *, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, Sequence):
        raise TypeError(f"{type(value).__name__} is neither a text nor a list of messages")
    return [_message(message) for message in value]


def _message(message: Mapping[str, Any]) -> Message:
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not isinstance(content, str):
        raise TypeError("a message has a role or a content that is no text")
    return {"role": role, "content": content}


def _turns(conversation: tuple[list[Message], int]) -> Iterator[Turn]:
    messages, num_given = conversation
    for at, message in enumerate(messages):
        if at >= num_given and at and message["role"] == "assistant":
            yield messages[:at], message


def _rows(turns: Sequence[Turn]) -> Dataset:
    columns = {"prompt": [p for p, _ in turns], "completion": [[reply] for _, reply in turns]}
    return Dataset.from_dict(columns, features=Features(prompt=MESSAGES, completion=MESSAGES))


def _asked(prompt: Sequence[Message]) -> list[str]:
    """Return all that was asked, up to white space; an empty text if nothing was."""
    asked = [str(message["content"]) for message in prompt if message["role"] == "user"]
    return [" ".join(text.split()) for text in asked or [""]]


def _forms(prompt: Sequence[Message], template: str) -> list[str]:
    """Return a question as the task asks it, and without the task's template."""
    asked = str(prompt[-1]["content"])
    before, _, behind = template.partition("{prompt}")
    bare = asked.removeprefix(before).removesuffix(behind)
    return [" ".join(text.split()) for text in (asked, bare)]


def _nothing(made: Traces) -> str:
    return (
        f"no trace is left to train on ({made}). Check `traces`, `traces_split`, `solver` and "
        "`solution_column`: a conversation needs a user's message and an assistant's reply."
    )


def _no_conversations(options: SFTArguments, columns: Sequence[str]) -> str:
    return (
        f"`traces`={options.traces!r} has neither a column messages nor prompt and completion (it "
        f"has {', '.join(columns)}), so there is nothing to imitate. Rename its columns, or set "
        "`dataset`, `prompt_column` and `solution_column` if it holds questions and solutions."
    )


def _bad_row(options: SFTArguments, number: int, error: Exception) -> str:
    return (
        f"`traces`={options.traces!r} holds no conversation in row {number} "
        f"({type(error).__name__}: {error}), so it cannot be imitated. Give each message a role "
        "and a content, both texts; images and tool calls are not trained on here."
    )
