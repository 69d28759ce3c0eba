"""The options of a reward model's training, and what cannot work in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from trl import ModelConfig

from trl_grpo_ext.data import TaskArguments, load_task, task_problems
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.model_cache import load_model_config, model_problems
from trl_grpo_ext.rewards.completion import completion_text
from trl_grpo_ext.rewards.models.sums import AfterError, Sum

ModelKind = Literal["outcome", "process"]


@dataclass
class RewardModelArguments:
    """What reward model to train, and on what; one YAML key a field."""

    kind: ModelKind = field(
        metadata={
            "help": "'outcome': one score a reply, trained on pairs of a right and a wrong one; "
            "'process': one a step, trained on solutions whose steps are judged (sums only)."
        }
    )
    num_layers: int | None = field(
        default=None,
        metadata={
            "help": "How many of the model's first layers the reward model keeps; all by default. "
            "Fewer are faster, and know less."
        },
    )
    num_trained_layers: int | None = field(
        default=None,
        metadata={
            "help": "How many of its last layers are trained, beside the head; all layers and the "
            "embeddings by default. The others stay as they are, and need no backward pass."
        },
    )
    num_candidates: int = field(
        default=8,
        metadata={"help": "Replies that the model itself writes to each prompt, to learn from."},
    )
    max_new_tokens: int = field(default=16, metadata={"help": "Tokens of such a reply at most."})
    temperature: float = field(
        default=1.0, metadata={"help": "Of these replies; that of the GRPO run is right."}
    )
    num_pairs: int = field(
        default=4,
        metadata={
            "help": "outcome: pairs of a right and a wrong reply that were sampled, a prompt at "
            "most. Where no reply is right, the gold answer stands in for it."
        },
    )
    num_near_misses: int = field(
        default=4,
        metadata={
            "help": "outcome: pairs of a right reply and the same with another last number, a "
            "prompt at most; without them little tells a wrong number from a right one."
        },
    )
    gold_reply: str = field(
        default="{answer}",
        metadata={
            "help": "outcome: the gold answer written out as a reply: {answer}, and {question} for "
            "what `question_pattern` finds in the prompt."
        },
    )
    question_pattern: str = field(
        default=".+",
        metadata={
            "help": "outcome: a regular expression; what it finds last in the prompt is {question}."
        },
    )
    num_solutions: int = field(
        default=2,
        metadata={
            "help": "process: solutions that are made for each prompt: a right one, and the "
            "others with an error at a random step."
        },
    )
    step_separator: str = field(
        default="\n",
        metadata={"help": "process: what ends a step; the reward needs the same."},
    )
    after_error: AfterError = field(
        default="wrong",
        metadata={
            "help": "process: the label of steps after the first wrong one: 'wrong' "
            "(Math-Shepherd), or 'alone' (each is judged as if the results before were right)."
        },
    )


def reward_model_problems(
    options: RewardModelArguments,
    task: TaskArguments,
    model: ModelConfig,
    *,
    source: str,
    cache_dir: str | None,
) -> Iterator[str]:
    """Yield everything that cannot work; data and the model's configuration are read.

    Args:
        options: Of the reward model.
        task: Its questions.
        model: The language model to start from.
        source: As for :func:`~trl_grpo_ext.model_cache.prepare_model`.
        cache_dir: As for that.
    """
    yield from training_problems(options)
    yield from data_problems(options, task)
    yield from base_problems(options, model, source=source, cache_dir=cache_dir)


def training_problems(options: RewardModelArguments) -> Iterator[str]:
    """Yield what cannot work in these options.

    Example:
        >>> next(training_problems(RewardModelArguments(kind="process", num_layers=0)))
        '`num_layers` is 0, which leaves no model. Use 1 or more, or leave it out for all.'
    """
    if options.kind not in ("outcome", "process"):
        yield (
            f"`kind` is {options.kind!r}, which is no kind of reward model. Use outcome (a score "
            "for a reply) or process (a score for each step)."
        )
    if options.num_layers is not None and options.num_layers < 1:
        yield (
            f"`num_layers` is {options.num_layers}, which leaves no model. Use 1 or more, or "
            "leave it out for all."
        )
    if options.num_trained_layers is not None and options.num_trained_layers < 0:
        yield (
            f"`num_trained_layers` is {options.num_trained_layers}, which is no number of layers. "
            "Use 0 (the head alone) or more, or leave it out for all."
        )
    for name, least in _LEAST.items():
        if getattr(options, name) < least:
            yield (
                f"`{name}` is {getattr(options, name)}, so there is nothing to make data from. "
                f"Use {least} or more."
            )
    if options.temperature <= 0:
        yield (
            f"`temperature` is {options.temperature}, so all candidates would be the same. Use "
            "what the GRPO run samples with, 1.0 by default."
        )
    try:
        re.compile(options.question_pattern)
    except re.error as error:
        yield (
            f"`question_pattern` is {options.question_pattern!r}, which is no regular expression "
            f"({error}), so it finds no question. Correct it, or leave it out for the last line."
        )
    if not options.step_separator:
        yield "`step_separator` is empty, so no step would end. Use what stands between steps."


def data_problems(options: RewardModelArguments, task: TaskArguments) -> Iterator[str]:
    """Yield what keeps data for a reward model of this kind from being made of this task."""
    if task.num_eval_prompts < 1 and task.eval_dataset_split is None:
        yield (
            "`num_eval_prompts` is 0, so nobody would know how good the reward model is on "
            "questions that it has not seen. Set it to some dozens."
        )
    if options.kind == "outcome":
        yield from task_problems(task)
        return
    if task.rewards:
        yield (
            "`rewards` is set, but the steps of sums are judged by arithmetic, so it would do "
            "nothing. Remove it."
        )
    try:
        loaded = load_task(task)
    except ConfigurationError as error:
        yield from error.problems
        return
    prompts = [*loaded.train["prompt"], *loaded.held_out["prompt"]]
    bad = sum(Sum.in_text(completion_text(prompt)) is None for prompt in prompts)
    if bad:
        yield (
            f"`dataset`={task.dataset!r} has no sum such as 3 + 4 - 5 in {bad} of {len(prompts)} "
            "prompts, and `kind: process` can judge the steps of sums alone. Use "
            "reasoning_gym:chain_sum, or train on step labels of your own with "
            "trl_grpo_ext.rewards.models.training.process_trainer."
        )


_LEAST = {
    "num_candidates": 0,
    "max_new_tokens": 1,
    "num_pairs": 0,
    "num_near_misses": 0,
    "num_solutions": 1,
}


def base_problems(
    options: RewardModelArguments, model: ModelConfig, *, source: str, cache_dir: str | None
) -> Iterator[str]:
    """Yield what keeps this model from becoming the reward model; its configuration is read.

    Args:
        options: Of the reward model.
        model: The language model to start from.
        source: As for :func:`~trl_grpo_ext.model_cache.prepare_model`.
        cache_dir: As for that.

    Raises:
        ModelPreparationError: Its configuration is not to be had.
    """
    if model.use_peft or model.load_in_4bit or model.load_in_8bit:
        yield (
            "`use_peft`, `load_in_4bit` or `load_in_8bit` is set, but this recipe trains all "
            "weights, and the rewards load a whole model. Remove it."
        )
    name = str(model.model_name_or_path)
    if options.num_layers is None or model_problems(name, source=source):
        return
    config = load_model_config(
        name, source=source, cache_dir=cache_dir, revision=model.model_revision
    )
    there = config.get_text_config().num_hidden_layers
    if options.num_layers > there:
        yield (
            f"`num_layers` is {options.num_layers}, but the model has {there} layers; further ones "
            "would be random. Use fewer, or leave it out for all."
        )
