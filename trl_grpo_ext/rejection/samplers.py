"""Which sampler a run has: vLLM, or our own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.state import PartialState
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rejection.collect import candidates_folder
from trl_grpo_ext.rejection.options import RejectionArguments, mapping
from trl_grpo_ext.rejection.sampling import Draw, group_draw
from trl_grpo_ext.rejection.shards import read_made_with
from trl_grpo_ext.rejection.vllm_sampling import (
    load_engine,
    refused_values,
    unknown_names,
    vllm_draw,
)
from trl_grpo_ext.sampling.policy import load_policy

_OR_OURS = "or set `sampler: group_sample`"


class Chosen(NamedTuple):
    """A sampler.

    Attributes:
        name: ``group_sample`` or ``vllm``.
        why: It is that one; goes on the sentence.
    """

    name: str
    why: str

    def __str__(self) -> str:
        """Return both, for one line of a log."""
        return f"{self.name}, {self.why}"


class Obstacle(NamedTuple):
    """Why vLLM cannot sample.

    Attributes:
        found: The fact, in the middle of a sentence.
        remedy: What to do, as a sentence.
    """

    found: str
    remedy: str


def choose_sampler(options: RejectionArguments, *, model: str) -> Chosen:
    """Return the sampler of a run.

    Args:
        options: Of the run.
        model: A folder or a name on the Hub.
    """
    if options.sampler != "auto":
        return Chosen(options.sampler, "as `sampler` says")
    if before := read_made_with(candidates_folder(options.output_dir)).get("sampler"):
        return Chosen(str(before), "which made the replies that are there already")
    obstacle = next(obstacles(options, model=model), None)
    if obstacle is not None:
        return Chosen("group_sample", f"and not vLLM: {obstacle.found}")
    return Chosen("vllm", "which is installed, and there is a CUDA device")


def refusals(options: RejectionArguments, *, model: str) -> Iterator[str]:
    """Yield why vLLM cannot sample, in three parts.

    Args:
        options: Of the run.
        model: A folder or a name on the Hub.
    """
    for found, remedy in obstacles(options, model=model):
        yield f"{found}, so vLLM cannot sample. {remedy}"


def obstacles(options: RejectionArguments, *, model: str) -> Iterator[Obstacle]:
    """Yield what keeps vLLM from sampling.

    Args:
        options: Of the run.
        model: A folder or a name on the Hub.
    """
    yield from _missing(options)
    if options.max_live_tokens is not None:
        yield Obstacle(
            "`max_live_tokens` is set, which vLLM has no use for",
            f"Remove it (`vllm_gpu_memory_utilization` says what vLLM may hold), {_OR_OURS}.",
        )
    if (Path(model) / "adapter_config.json").is_file():
        yield Obstacle(
            f"{model} is the folder of an adapter, without the model's weights",
            f"Merge it into them (PEFT's `merge_and_unload`, then `save_pretrained`), {_OR_OURS}.",
        )
    yield from _sharding(options.vllm_tensor_parallel_size)
    if next(_missing(options), None) is None:
        yield from _refused_options(options)


def load_draw(
    sampler: Chosen,
    name: str,
    *,
    model: ModelConfig,
    options: RejectionArguments,
    state: PartialState,
) -> tuple[Draw, PreTrainedTokenizerBase]:
    """Return what samples, and the tokenizer of its model; say which sampler it is, and why.

    Args:
        sampler: From :func:`choose_sampler`.
        name: A folder or a name on the Hub.
        model: Revision, dtype and attention.
        options: Of the run.
        state: Of the processes.

    Raises:
        ConfigurationError: vLLM is to go on with its replies, but cannot sample here.
    """
    state.print(f"Sampling with {sampler}.")
    if sampler.name != "vllm":
        trusted = options.trust_remote_code
        policy, tokenizer = load_policy(
            name, model=model, trust_remote_code=trusted, device=state.device
        )
        return group_draw(policy, tokenizer, options=options), tokenizer
    if problems := list(refusals(options, model=name)):
        raise ConfigurationError(problems)
    tokenizer = AutoTokenizer.from_pretrained(
        name, revision=model.model_revision, trust_remote_code=options.trust_remote_code
    )
    engine = load_engine(name, model=model, options=options, state=state)
    return vllm_draw(engine, tokenizer, options=options), tokenizer


def _missing(options: RejectionArguments) -> Iterator[Obstacle]:
    if find_spec("vllm") is None:
        yield Obstacle(
            "vLLM is not installed", f"Install it (pip install 'trl[vllm]'), {_OR_OURS}."
        )
    if options.use_cpu:
        yield Obstacle("`use_cpu` is set", f"Remove it, {_OR_OURS}.")
    elif not torch.cuda.is_available():
        yield Obstacle("there is no CUDA device", f"Run it where there is one, {_OR_OURS}.")


def _sharding(size: int) -> Iterator[Obstacle]:
    if size > 1 and "LOCAL_RANK" in os.environ:
        yield Obstacle(
            f"`vllm_tensor_parallel_size` is {size} and processes were launched together, each "
            "with an engine on a GPU of its own",
            "Set it to 1, or start one process (`accelerate launch --num_processes 1`).",
        )
    elif size > 1 and torch.cuda.is_available() and torch.cuda.device_count() < size:
        yield Obstacle(
            f"`vllm_tensor_parallel_size` is {size} and there are {torch.cuda.device_count()} "
            "CUDA devices",
            "Lower it.",
        )


def _refused_options(options: RejectionArguments) -> Iterator[Obstacle]:
    try:
        unknown = unknown_names(list(mapping(options.generation_kwargs)))
    except ImportError as error:
        yield Obstacle(f"vLLM cannot be imported ({error})", f"Install it anew, {_OR_OURS}.")
        return
    if unknown:
        yield Obstacle(
            f"`generation_kwargs` has {', '.join(unknown)}, "
            "which vLLM's `SamplingParams` do not have",
            f"Remove it, {_OR_OURS}.",
        )
    elif said := refused_values(options):
        yield Obstacle(
            f"vLLM's `SamplingParams` refuse the options of the sampling ({said})",
            f"Change them, {_OR_OURS}.",
        )
