"""What cannot work in the options of rejection sampling, told before a model loads."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import get_args

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.hub.options import repo_problems
from trl_grpo_ext.rejection.balance import Balance
from trl_grpo_ext.rejection.options import (
    DATASET_FORMATS,
    MAPPINGS,
    SAMPLERS,
    RejectionArguments,
    mapping,
)
from trl_grpo_ext.rejection.samplers import choose_sampler, refusals
from trl_grpo_ext.rejection.selection import Prefer
from trl_grpo_ext.sampling import SamplingSettings

_SHARES = (
    *("min_pass_rate", "max_pass_rate", "max_repetition", "min_script_share"),
    *("max_unscored_fraction", "vllm_gpu_memory_utilization"),
)
_LEAST = {
    "num_generations": 1,
    "prompts_per_batch": 1,
    "best_n": 1,
    "similarity_ngram_size": 1,
    "max_characters": 1,
    "max_tokens": 1,
    "max_live_tokens": 1,
    "vllm_max_model_length": 1,
    "vllm_tensor_parallel_size": 1,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "prefer": get_args(Prefer),
    "balance": get_args(Balance),
    "dataset_format": DATASET_FORMATS,
    "sampler": SAMPLERS,
}


def rejection_problems(options: RejectionArguments, *, model: str = "") -> Iterator[str]:
    """Yield what cannot work in these options.

    Args:
        options: Of the run.
        model: A folder or a name on the Hub.

    Example:
        >>> next(rejection_problems(RejectionArguments(output_dir="out", best_n=0)))
        '`best_n` is 0, so nothing would be kept or sampled. Use 1 or more.'
    """
    for name, least in _LEAST.items():
        if getattr(options, name) is not None and getattr(options, name) < least:
            yield (
                f"`{name}` is {getattr(options, name)}, so nothing would be kept or sampled. Use "
                f"{least} or more."
            )
    for name in _SHARES:
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 1:
            yield f"`{name}` is {value}, which is no share, so it means nothing. Use 0 to 1."
    for name, known in _CHOICES.items():
        if getattr(options, name) not in known:
            yield (
                f"`{name}` is {getattr(options, name)!r}, which is not known, so it is open what "
                f"to do. Use {' or '.join(known)}."
            )
    yield from _window_problems(options)
    yield from _sampling_problems(options)
    yield from _sampler_problems(options, model)
    yield from _rule_problems(options)
    if options.push_to_hub:
        yield from repo_problems(options.repository["repo_id"], option="hub_dataset_id")


def _window_problems(options: RejectionArguments) -> Iterator[str]:
    if options.max_tokens is not None and options.max_tokens < options.min_tokens:
        yield (
            f"`max_tokens`={options.max_tokens} is below `min_tokens`={options.min_tokens}, so no "
            "reply has the right length. Swap them, or leave `max_tokens` out."
        )
    if not math.isfinite(options.correct_threshold):
        yield (
            f"`correct_threshold` is {options.correct_threshold}, which tells no right reply from "
            "a wrong one. Use the least score of a right one, such as 0.5."
        )
    if options.max_pass_rate < options.min_pass_rate:
        yield (
            f"`max_pass_rate`={options.max_pass_rate} is below `min_pass_rate`="
            f"{options.min_pass_rate}, so no prompt is left. Swap them, or leave one out."
        )
    if not options.max_similarity > 0:
        yield (
            f"`max_similarity` is {options.max_similarity}, so all replies to a prompt would be "
            "near-duplicates. Use a number above 0, such as 0.8."
        )


def _sampling_problems(options: RejectionArguments) -> Iterator[str]:
    temperature = mapping(options.generation_kwargs).get("temperature", options.temperature)
    if not (isinstance(temperature, int | float) and temperature > 0):
        yield (
            f"`temperature` is {temperature}, so all replies to a prompt would be the "
            "same. Use what GRPO sampled with, 1.0 by default."
        )
    mappings = {name: getattr(options, name) for name in MAPPINGS}
    for name in (name for name, value in mappings.items() if isinstance(value, str)):
        yield (
            f"`{name}` is {mappings[name]!r}, which is no mapping, so it cannot be passed on. "
            "Write names and values in the YAML, or JSON on the command line."
        )


def _sampler_problems(options: RejectionArguments, model: str) -> Iterator[str]:
    if options.sampler == "vllm":
        yield from refusals(options, model=model)
    if choose_sampler(options, model=model).name == "vllm":
        return
    values = {**options.sampling(), **mapping(options.generation_kwargs)}
    values.pop("generation_kwargs")
    try:
        SamplingSettings.from_values(values)
    except (TypeError, ValueError) as error:
        yield f"the options of the sampling cannot work: {error}"


def _rule_problems(options: RejectionArguments) -> Iterator[str]:
    for pattern in options.forbidden_patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield (
                f"`forbidden_patterns` holds {pattern!r}, which is no regular expression "
                f"({error}), so it finds nothing. Correct it."
            )
            return
    try:
        options.rules()
    except ConfigurationError as error:
        yield from error.problems
