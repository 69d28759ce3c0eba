"""Draws by vLLM's offline engine.

Written against the source of vLLM 0.22.0 and 0.31.0, the ends of the range that trl 1.16 supports
(``pip install 'trl[vllm]'``): ``vllm/entrypoints/llm.py``, ``vllm/sampling_params.py``,
``vllm/outputs.py`` and ``vllm/v1/engine/parallel_sampling.py``. vLLM is imported where it is used.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from accelerate.state import PartialState
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rejection.options import RejectionArguments, mapping
from trl_grpo_ext.rejection.sampling import Draw
from trl_grpo_ext.sampling import GroupSamples
from trl_grpo_ext.sampling.group_sampler import Prompt, prompt_token_ids

# Names of SamplingParams that are ours to set (a seed a prompt, token ids only), or that take
# objects, which no YAML holds.
_NOT_PASSED = frozenset(
    {
        *("n", "seed", "detokenize", "output_kind", "skip_clone"),
        *("stop", "include_stop_str_in_output"),
        *("structured_outputs", "repetition_detection"),
    }
)
_SEED_BITS = 62  # seeds are int64 in the engine, and each reply adds its index


def request_arguments(options: RejectionArguments) -> dict[str, Any]:
    """Return arguments of vLLM's ``SamplingParams``, but for the seed.

    Args:
        options: Of the run; its ``generation_kwargs`` override the others.

    Example:
        >>> options = RejectionArguments(output_dir="out", generation_kwargs={"min_p": 0.1})
        >>> request_arguments(options)["min_p"]
        0.1
    """
    return {
        "n": options.num_generations,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "max_tokens": options.max_completion_length,
        "detokenize": False,
        **mapping(options.generation_kwargs),
    }


def unknown_names(names: Sequence[str]) -> list[str]:
    """Return which of the names cannot be passed to vLLM's ``SamplingParams``; vLLM must be there.

    Args:
        names: Of ``generation_kwargs``.
    """
    from vllm import SamplingParams

    known = {name for name in inspect.signature(SamplingParams).parameters if name[0] != "_"}
    return sorted(set(names) - (known - _NOT_PASSED))


def refused_values(options: RejectionArguments) -> str | None:
    """Return what vLLM's ``SamplingParams`` say against these options; vLLM must be there.

    Args:
        options: Of the run, with known names in its ``generation_kwargs``.
    """
    from vllm import SamplingParams

    try:
        SamplingParams(**request_arguments(options))
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def prompt_seed(seed: int, prompt_index: int) -> int:
    """Return the seed of a prompt's requests: 62 bits of a hash.

    vLLM gives reply ``j`` the seed of its prompt plus ``j``, so that those of two prompts must lie
    far apart.

    Args:
        seed: Of the run.
        prompt_index: Number of the prompt in the task.

    Example:
        >>> prompt_seed(0, 1) == prompt_seed(0, 1) != prompt_seed(1, 0)
        True
    """
    digest = hashlib.sha256(f"{seed}/{prompt_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)


def load_engine(
    name: str, *, model: ModelConfig, options: RejectionArguments, state: PartialState
) -> Any:
    """Return vLLM's engine with the model: one a process, on the process's GPU.

    Processes that were launched together must all call it, since vLLM makes process groups over
    all of them; it then runs within the process, as in TRL's colocate mode. What they sample
    afterwards, and when, is up to each.

    Args:
        name: A folder of a model, or a name on the Hub.
        model: Revision and dtype; vLLM picks its attention itself.
        options: Of the run.
        state: Of the processes.
    """
    from vllm import LLM

    return LLM(
        model=name,
        revision=model.model_revision,
        tokenizer_revision=model.model_revision,
        trust_remote_code=options.trust_remote_code,
        dtype=model.dtype or "auto",
        tensor_parallel_size=options.vllm_tensor_parallel_size,
        gpu_memory_utilization=options.vllm_gpu_memory_utilization,
        max_model_len=options.vllm_max_model_length,
        distributed_executor_backend=_executor(state),
    )


def vllm_draw(
    engine: Any, tokenizer: PreTrainedTokenizerBase, *, options: RejectionArguments
) -> Draw:
    """Return a draw by vLLM: one request a prompt, with the tokens that ``group_sample`` gives it.

    The samples come without log-probabilities.

    Args:
        engine: From :func:`load_engine`.
        tokenizer: Of the model.
        options: Of the run.

    Raises:
        ConfigurationError: From the returned function: a prompt leaves no room for a reply.
        RuntimeError: From the returned function: vLLM gave a request up.
    """
    from vllm import SamplingParams

    def draw(prompts: Sequence[Prompt], indices: Sequence[int]) -> GroupSamples:
        template = mapping(options.chat_template_kwargs)
        prompt_ids = [prompt_token_ids(tokenizer, prompt, template) for prompt in prompts]
        _check_lengths(prompt_ids, indices, limit=engine.model_config.max_model_len)
        shared = request_arguments(options)
        outputs = engine.generate(
            [{"prompt_token_ids": ids} for ids in prompt_ids],
            [SamplingParams(**shared, seed=prompt_seed(options.seed, i)) for i in indices],
            use_tqdm=False,
        )
        replies = [reply for output in outputs for reply in output.outputs]
        return _samples(prompts, prompt_ids, replies, tokenizer, options.num_generations)

    return draw


def _samples(
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[list[int]],
    replies: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    group_size: int,
) -> GroupSamples:
    completion_ids = [list(reply.token_ids) for reply in replies]
    return GroupSamples(
        prompts=[prompt for prompt in prompts for _ in range(group_size)],
        prompt_ids=[ids for ids in prompt_ids for _ in range(group_size)],
        completion_ids=completion_ids,
        completions=tokenizer.batch_decode(completion_ids, skip_special_tokens=True),
        policy_logprobs=[],
        sampling_logprobs=[],
        finish_reasons=[_finish_reason(reply.finish_reason) for reply in replies],
        group_size=group_size,
    )


def _finish_reason(reason: str | None) -> Literal["stop", "length"]:
    if reason == "stop":
        return "stop"
    if reason == "length":
        return "length"
    raise RuntimeError(
        f"vLLM ended a reply with the reason {reason!r}, so it is not what the model would have "
        "said. See its log above, and start the same again: it goes on with this batch."
    )


def _check_lengths(
    prompt_ids: Sequence[Sequence[int]], indices: Sequence[int], *, limit: int
) -> None:
    for index, ids in zip(indices, prompt_ids, strict=True):
        if len(ids) >= limit:
            raise ConfigurationError(
                [
                    f"prompt {index} has {len(ids)} tokens, but vLLM holds {limit} of prompt and "
                    "reply, so there is no room for a reply. Raise `vllm_max_model_length` if the "
                    "model has more positions, or shorten the prompt."
                ]
            )


def _executor(state: PartialState) -> str | None:
    """Return how the engine is started, and tell vLLM which process this is, as TRL does."""
    if not torch.distributed.is_initialized():
        return None
    place = (state.process_index, state.local_process_index, state.num_processes)
    os.environ.update(zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), map(str, place), strict=True))
    return "external_launcher"
