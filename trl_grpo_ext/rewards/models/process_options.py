"""What cannot work in the arguments of a process reward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import get_args

from trl_grpo_ext.rewards.api.settings import APISettings
from trl_grpo_ext.rewards.missing import missing_problems
from trl_grpo_ext.rewards.models.settings import (
    ModelSettings,
    kind_problems,
    model_problems,
    read_config,
)
from trl_grpo_ext.rewards.models.steps import Aggregate, score_label

# `pooling` is of models that score a text at one token.
LOCAL_OPTIONS = frozenset(known.name for known in fields(ModelSettings)) - {"model", "pooling"}
SERVED_OPTIONS = APISettings.names() | {"task", "tokenizer", "max_tokens"}


@dataclass(frozen=True, kw_only=True)
class ProcessArguments:
    """The arguments of ``ProcessModelReward`` that are to be checked, under their names."""

    model: object
    step_separator: object = "\n\n"
    step_tag: object = None
    aggregate: object = "min"
    label: object = None
    process_advantages: object = False
    on_missing: object = None
    is_served: bool = False
    options: Mapping[str, object] = field(default_factory=dict)


def argument_problems(given: ProcessArguments) -> Iterator[str]:
    """Yield what cannot work; neither weights are read nor a service is asked.

    Example:
        >>> given = ProcessArguments(model="prm", is_served=True, step_tag="<extra_0>", label=-1)
        >>> print(*argument_problems(given))  # doctest: +ELLIPSIS
        `label`=-1 is no label of a model, so there would be no score. Set it to a ...
    """
    yield from _value_problems(given)
    if given.on_missing is not None:
        yield from missing_problems(given.on_missing)
    yield from _unknown_options(given)
    if given.is_served:
        yield from _served_problems(given)


def label_problems(settings: ModelSettings, *, label: int | None) -> Iterator[str]:
    """Yield what is wrong with the label, and with the model that has it."""
    if problems := list(model_problems(settings)):
        yield from problems
        return
    config = read_config(settings.model)
    if problems := list(kind_problems(config, name=settings.model, kind="token")):
        yield from problems
        return
    num_labels = int(config.num_labels)
    if score_label(label, num_labels=num_labels) is None:
        chosen = "is not set" if label is None else f"is {label}"
        yield (
            f"`label` {chosen}, but `model`={settings.model!r} has {num_labels} labels, so it is "
            "not clear which probability is the score. Set it to that of a right step, from 0 to "
            f"{num_labels - 1}."
        )


def _value_problems(given: ProcessArguments) -> Iterator[str]:
    if not _is_text(given.model):
        yield (
            f"`model`={given.model!r} is no name, so there is nothing that scores. Set it to a "
            "folder or a name of the Hub, or with `base_url` to the name that the service knows."
        )
    if not _is_text(given.step_separator):
        yield (
            f"`step_separator`={given.step_separator!r} is no text, so the steps of an answer "
            "cannot be told apart. Set it to what the policy writes between two steps, such as "
            '"\\n\\n".'
        )
    if given.step_tag is not None and not _is_text(given.step_tag):
        yield (
            f"`step_tag`={given.step_tag!r} is no text, so no step would have an end to be scored "
            "at. Set it to what the model was trained with, or leave it out for the separator."
        )
    if given.aggregate not in get_args(Aggregate):
        yield (
            f"`aggregate`={given.aggregate!r} is not known, so the scores of steps cannot become "
            f"one reward. Choose {', '.join(get_args(Aggregate))}."
        )
    if given.label is not None and not _is_count(given.label):
        yield (
            f"`label`={given.label!r} is no label of a model, so there would be no score. Set it "
            "to a whole number from 0, or leave it out for a model with one or two."
        )
    if not isinstance(given.process_advantages, bool):
        yield (
            f"`process_advantages`={given.process_advantages!r} is neither true nor false, so it "
            "is not clear what is wanted. Set it to one of them."
        )


def _unknown_options(given: ProcessArguments) -> Iterator[str]:
    known, other = LOCAL_OPTIONS, SERVED_OPTIONS
    where, advice = (
        "runs in this process",
        "Remove it, or set `base_url` for a model that is served",
    )
    if given.is_served:
        known, other = other, known
        where, advice = "is served (`base_url`)", "Remove it, or remove `base_url`"
    for name in given.options:
        if name in known:
            continue
        if name in other:
            yield f"`{name}` has no effect on a model that {where}. {advice}."
            continue
        close = get_close_matches(name, known, n=1)
        suggestion = f"Use `{close[0]}`, or remove it." if close else "Remove it."
        yield f"`{name}` is not an option of this reward, so it would have no effect. {suggestion}"


def _served_problems(given: ProcessArguments) -> Iterator[str]:
    max_tokens, tokenizer = given.options.get("max_tokens"), given.options.get("tokenizer")
    if max_tokens is not None and not (_is_count(max_tokens) and max_tokens != 0):
        yield f"`max_tokens`={max_tokens!r} lets no text through. Set it to a number above 0."
    if tokenizer is not None:
        if not _is_text(tokenizer):
            yield (
                f"`tokenizer`={tokenizer!r} is no name, so no text could become token ids. Set it "
                "to a folder or a name of the Hub, or leave it out to send text."
            )
        return
    if given.step_tag is None or (isinstance(given.step_tag, str) and not given.step_tag.strip()):
        yield (
            f"`base_url` is set and `step_tag` is {given.step_tag!r}, but white space in a text is "
            "not a token of its own, so the service could not tell where a step ends. Set "
            '`step_tag` to the special token of the model, such as "<extra_0>", or `tokenizer` to '
            "that of the model, so that token ids are sent."
        )
    if max_tokens is not None:
        yield (
            "`max_tokens` is set without `tokenizer`, so nobody here can count them. Set "
            "`tokenizer` to that of the model, or remove `max_tokens`."
        )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
