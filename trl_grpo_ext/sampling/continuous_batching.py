"""Completions by transformers' continuous batching: a paged cache, and a batch that stays full.

The engine of ``model.generate_batch``, in a thread of its own: a prompt is computed once and forked
into its completions, and as soon as one of them ends, the next request takes its place. With flash
attention on a CUDA device it also captures CUDA graphs.

For use inside training, the engine is built and torn down within a call. Its cache is as large as
the completions need, and at most half of the free memory, because the logits of a step and the
CUDA graphs come on top. Graphs are captured when a batch first has their size, not all beforehand,
because they would be captured anew with each call.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import (
    WorkloadHints,
    get_device_and_memory_breakdown,
)
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from trl_grpo_ext.attention import text_config
from trl_grpo_ext.memory import kv_cache_bytes
from trl_grpo_ext.sampling.decoding import (
    Completion,
    SamplingStopped,
    check_prompts,
    progress_bar,
)
from trl_grpo_ext.sampling.settings import SamplingSettings

_PAGE = 256  # tokens a page of the cache; flash attention takes multiples of 256
_CACHE_SHARE = 0.5  # of the free memory at most
_KEPT_FREE = 0.15  # share of the cache below which the engine starts no further prompt
_PREFILL_TOKENS = 8192  # tokens a batch at most
_MASKED_PREFILL_TOKENS = 2048  # the same where each of them has a row of an attention mask
_MAX_REQUESTS = 1024  # completions that grow at a time: each has its logits

# They act on the logits alone. The others read the tokens so far or the position, which the engine
# hands to no processor, or numbers on the CPU, which a CUDA graph cannot.
_HONOURED = frozenset(
    {
        *("max_new_tokens", "stop_ids", "temperature", "top_k", "top_p", "min_p", "typical_p"),
        "epsilon_cutoff",
    }
)
_WARPERS_NOT_HONOURED = frozenset({"top_h", "eta_cutoff"})  # a greedy draw does not use them
_LAYERS = {"full_attention", "sliding_attention"}


def sample_continuously(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    settings: SamplingSettings,
    on_finished: Callable[[int, Completion], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = False,
) -> list[Completion]:
    """Return one completion for each entry of ``prompts``, sampled by continuous batching.

    Equal prompts are computed once, wherever they stand. (Those of 1, 257, 513, ... tokens are not
    forked but computed for each completion.) The random numbers come from a seed that is drawn
    from torch's CPU generator, once a call; otherwise the generators stay as they are. Which
    completion they give depends on all others of the call.

    The engine reports one log-probability a token, after everything that shaped the draw:
    ``sampling_logprobs``. Where the temperature alone shaped it, or nothing because it was greedy,
    ``policy_logprobs`` is the same. Where more did (``top_k``, ``top_p``, ``min_p``, ...) it is NaN
    for each token, because it is not known: compute it with a forward pass.

    Args:
        model: A causal language model for which :func:`continuous_batching_problem` is ``None``.
            Its dtype, configuration and training modes are kept, also if this raises. It computes
            with flash attention if that is installed, on CUDA in 16 bits.
        prompts: Token ids, one list a completion.
        settings: What shapes the draw, and when a completion ends.
        on_finished: Called with the index of a completion, and with it, as soon as it ends.
        should_stop: Asked between tokens; sampling ends when it says yes.
        progress: Whether to show a bar that counts completions.

    Returns:
        The completions, in the order of ``prompts``.

    Raises:
        ValueError: a prompt is empty or too long for the model, a setting is not honoured, or the
            model cannot be sampled in this way.
        SamplingStopped: ``should_stop`` said yes.
        RuntimeError: a completion failed, with what stopped the engine as its cause.
    """
    _check(model, prompts, settings)
    if not prompts:
        return []
    requests = _requests(prompts)
    finished: dict[int, Completion] = {}
    seed = int(torch.randint(2**62, ()))
    with (
        _unchanged(model),
        progress_bar(len(prompts), shown=progress) as bar,
    ):

        def finish(index: int, completion: Completion) -> None:
            finished[index] = completion
            bar.update()
            if on_finished is not None:
                on_finished(index, completion)

        _run(model, requests, settings, seed=seed, finish=finish, should_stop=should_stop)
    return [finished[index] for index in range(len(prompts))]


def unsupported_by_continuous_batching(settings: SamplingSettings) -> list[str]:
    """Return the names of the settings that continuous batching would not honour.

    Example:
        >>> settings = SamplingSettings(max_new_tokens=8, top_p=0.9, repetition_penalty=1.1)
        >>> unsupported_by_continuous_batching(settings)
        ['repetition_penalty']
    """
    without_effect = _WARPERS_NOT_HONOURED if settings.temperature == 0 else frozenset()
    return [
        field.name
        for field in fields(settings)
        if field.name not in _HONOURED | without_effect
        and getattr(settings, field.name) != field.default
    ]


def continuous_batching_problem(model: PreTrainedModel) -> str | None:
    """Return why continuous batching cannot sample from the model; ``None`` if it can.

    Ask it of the model as it is when it samples: on its device, and after accelerate has prepared
    it. The last of the checks is a forward pass of one token. The CPU serves too, slowly.
    """
    config = text_config(model)
    if not hasattr(model, "init_continuous_batching") or model.config.is_encoder_decoder:
        return f"{type(model).__name__} is not a decoder-only model that generates"
    if any(isinstance(p, DTensor) or p.numel() == 0 for p in model.parameters()):
        return "its weights are sharded"
    if len({p.device for p in model.parameters()}) > 1:
        return "its weights are on several devices"
    if others := set(getattr(config, "layer_types", None) or ()) - _LAYERS:
        return f"it has layers of another kind than attention ({', '.join(sorted(others))})"
    name = str(config._attn_implementation)
    if name not in ("sdpa", "eager", "paged|eager") and not _is_flash(name):
        return f"its attention implementation is {name!r}, not 'sdpa', 'eager' or flash attention"
    if getattr(model, "_cached_continuous_batching_manager", None) is not None:
        return "it keeps an engine: call `destroy_cached_continuous_batching_manager()`"
    return _cache_problem(model)


def continuous_batching_drawback(model: PreTrainedModel) -> str | None:
    """Return why continuous batching is slow for the model; ``None`` if it is fast.

    Without flash attention, each new token is compared with the keys of all completions, and those
    of the others are masked: the cost grows with the square of the batch.
    """
    name = str(text_config(model)._attn_implementation)
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}, not on CUDA"
    if _is_flash(name) or _switches_to_flash(model):
        return None
    if model.dtype not in (torch.float16, torch.bfloat16):
        return f"flash attention does not compute in {_short(model.dtype)}"
    return "flash attention is not installed"


# --- the engine ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    """A prompt, and the indices of the completions that it is forked into."""

    prompt: list[int]
    indices: list[int]

    @property
    def name(self) -> str:
        return str(self.indices[0])

    def index_by_name(self) -> dict[str, int]:
        """Index of the completion by the name that the engine gives it."""
        first, *others = self.indices
        names = [self.name, *(f"{self.name}__child#{i}" for i in range(len(others)))]
        return dict(zip(names, [first, *others], strict=True))


def _requests(prompts: Sequence[Sequence[int]]) -> list[_Request]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(index)
    requests = []
    for prompt, indices in groups.items():
        # transformers 5.23 computes a prompt without its last token, then forks. If it finds the
        # pages before that token in its cache, or if there are none, nothing is left to compute,
        # and a batch of nothing raises "cannot reshape tensor of 0 elements" (scheduler.py,
        # `_schedule_request`; not reported). Remove when a fork of a one-token prompt works.
        forks = (len(prompt) - 1) % _PAGE != 0
        members = [indices] if forks else [[index] for index in indices]
        requests += [_Request(list(prompt), each) for each in members]
    return requests


def _run(
    model: PreTrainedModel,
    requests: Sequence[_Request],
    settings: SamplingSettings,
    *,
    seed: int,
    finish: Callable[[int, Completion], None],
    should_stop: Callable[[], bool] | None,
) -> None:
    """Sample all requests, or raise a ``RuntimeError``."""
    generator: Any = model
    manager = generator.init_continuous_batching(
        generation_config=_generation_config(settings),
        continuous_batching_config=_engine_config(model, requests, settings, seed),
        workload_hints=_workload(requests, settings),
    )
    try:
        manager.start()
        error = _collect(manager, requests, settings, finish, should_stop)
    finally:  # all is sampled by now, or shall not be
        manager.stop(block=True, hard_stop=True)
        manager.destroy()
    if error is not None:
        _raise(error, manager.background_thread_status.fatal_error)


def _collect(
    manager: Any,
    requests: Sequence[_Request],
    settings: SamplingSettings,
    finish: Callable[[int, Completion], None],
    should_stop: Callable[[], bool] | None,
) -> str | None:
    """Hand every completion over as it ends; return what went wrong."""
    waiting: dict[str, int] = {}
    for request in requests:
        manager.num_return_sequences = len(request.indices)
        manager.add_request(request.prompt, request_id=request.name)
        waiting.update(request.index_by_name())
    total = len(waiting)
    while waiting:
        if should_stop is not None and should_stop():
            raise SamplingStopped
        result = manager.get_result(timeout=1.0)
        if result is None:
            if manager.is_running():
                continue
            return f"the engine stopped with {len(waiting)} of {total} completions missing"
        index = waiting.pop(result.request_id)
        if error := _failure(result):
            return f"completion {index} failed: {error}"
        finish(index, _completion(result, settings))
    return None


def _failure(result: Any) -> str | None:
    if result.error is not None:
        return str(result.error)
    if not result.generated_tokens or len(result.generated_tokens) != len(result.logprobs):
        num_tokens, num_logprobs = len(result.generated_tokens), len(result.logprobs)
        return f"the engine returned {num_tokens} tokens and {num_logprobs} log-probabilities"
    if any(math.isnan(logprob) for logprob in result.logprobs):
        return "the model's logits are not finite"
    return None


def _completion(result: Any, settings: SamplingSettings) -> Completion:
    cpu = torch.device("cpu")
    shaped = settings.processors(prompt_length=0, device=cpu) or settings.warpers(cpu)
    return Completion(
        ids=list(result.generated_tokens),
        policy_logprobs=[math.nan if shaped else logprob for logprob in result.logprobs],
        sampling_logprobs=list(result.logprobs),
        stopped=result.generated_tokens[-1] in settings.stop_ids,
    )


def _raise(error: str, cause: Exception | None) -> None:
    if cause is not None:
        traceback.clear_frames(cause.__traceback__)  # or they would hold the cache
    raise RuntimeError(
        f"continuous batching: {error}. A group that misses a completion has no advantages, so the "
        "step cannot go on. See the cause; if it is memory, sample fewer or shorter completions a "
        "step, else set `group_sampler: shared_prefill`."
    ) from cause


# --- its configuration -----------------------------------------------------------------------


def _generation_config(settings: SamplingSettings) -> GenerationConfig:
    options: dict[str, Any] = {}
    if settings.temperature != 0:
        names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff")
        options = {name: getattr(settings, name) for name in names}
    return GenerationConfig(
        do_sample=settings.temperature != 0,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=sorted(settings.stop_ids) or -1,
        **options,
    )


def _engine_config(
    model: PreTrainedModel, requests: Sequence[_Request], settings: SamplingSettings, seed: int
) -> ContinuousBatchingConfig:
    is_flash = _is_flash(str(text_config(model)._attn_implementation)) or _switches_to_flash(model)
    prompt_tokens = sum(len(request.prompt) for request in requests)
    num_growing = min(sum(len(request.indices) for request in requests), _MAX_REQUESTS)
    most = _PREFILL_TOKENS if is_flash else _MASKED_PREFILL_TOKENS
    batch_tokens = max(min(prompt_tokens, most), num_growing)
    num_blocks = _blocks_needed(requests, settings.max_new_tokens)
    needed_bytes = _engine_bytes(
        model,
        cache_tokens=num_blocks * _PAGE,
        batch_tokens=batch_tokens,
        num_growing=num_growing,
        num_masks=0 if is_flash else 2,
    )
    return ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=num_blocks if needed_bytes < _CACHE_SHARE * _free_bytes() else None,
        max_batch_tokens=batch_tokens,
        max_requests_per_batch=num_growing,
        max_memory_percent=_CACHE_SHARE,
        safety_margin=_KEPT_FREE,
        return_logprobs=True,
        auto_switch_to_flash=_switches_to_flash(model),
        seed=seed,
    )


def _workload(requests: Sequence[_Request], settings: SamplingSettings) -> WorkloadHints:
    return WorkloadHints(
        max_prompt_length=max(len(request.prompt) for request in requests),
        max_generated_length=settings.max_new_tokens,
        num_requests=sum(len(request.indices) for request in requests),
    )


def _blocks_needed(requests: Sequence[_Request], max_new_tokens: int) -> int:
    """Pages for all completions at full length, so that none is put off or computed again."""
    needed = 0
    for request in requests:
        shared = (len(request.prompt) - 1) // _PAGE
        own = math.ceil((len(request.prompt) + max_new_tokens) / _PAGE) - shared
        needed += shared + own * len(request.indices)
    return math.ceil(needed / (1 - _KEPT_FREE)) + 1


def _engine_bytes(
    model: PreTrainedModel,
    *,
    cache_tokens: int,
    batch_tokens: int,
    num_growing: int,
    num_masks: int,
) -> float:
    """An upper bound of what the engine reckons with; where it reckons with more, it raises."""
    config = text_config(model)
    item = model.dtype.itemsize
    head: int = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    heads_bytes = 4 * config.num_attention_heads * head * item  # keys and values of one layer
    kv_bytes = kv_cache_bytes(config, num_tokens=cache_tokens, dtype_bytes=item)
    mask_bytes = num_masks * batch_tokens * (cache_tokens + batch_tokens) * item
    generator: Any = model
    num_logits = num_growing if generator._supports_logits_to_keep() else batch_tokens
    logit_bytes = num_logits * (4 * config.vocab_size + config.hidden_size * item)
    token_bytes = heads_bytes + config.hidden_size * item + 512
    states_bytes = cache_tokens * token_bytes + batch_tokens * (token_bytes + 4096)
    return 1.25 * float(kv_bytes + states_bytes + mask_bytes + logit_bytes)


def _free_bytes() -> int:
    _, total, reserved, allocated = get_device_and_memory_breakdown()
    return int(total - max(reserved, allocated))


# --- the model -------------------------------------------------------------------------------


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards modes, attention implementations and random numbers are as they were.

    The engine calls ``model.eval()``, switches the attention and seeds torch's generators.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs = [config for m in model.modules() if (config := getattr(m, "config", None))]
    names = [(c, c._attn_implementation) for c in configs if isinstance(c, PreTrainedConfig)]
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for config, name in names:
                if config._attn_implementation != name:
                    config._attn_implementation = name
            for module, training in modes:
                module.training = training


def _check(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: SamplingSettings
) -> None:
    check_prompts(model, prompts, max_new_tokens=settings.max_new_tokens)
    if names := unsupported_by_continuous_batching(settings):
        raise ValueError(
            f"continuous batching does not honour {', '.join(f'`{name}`' for name in names)}, so "
            "completions would not be what they ask for. Remove them, or set "
            "`group_sampler: shared_prefill`."
        )
    if problem := continuous_batching_problem(model):
        raise ValueError(
            f"continuous batching cannot sample from this model: {problem}. Set "
            "`group_sampler: shared_prefill`."
        )


def _cache_problem(model: PreTrainedModel) -> str | None:
    """The paged cache has the dtype of the weights, and takes nothing else."""
    token_11 = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    cache = _DtypeRecorder(config=model.config)
    with _unchanged(model), torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        model.eval()
        model(input_ids=token_11, past_key_values=cache, use_cache=True)
    if not cache.dtypes:
        return "it has no cache of keys and values"
    if others := cache.dtypes - {model.dtype}:
        return (
            f"its weights are {_short(model.dtype)} but it computes in "
            f"{', '.join(sorted(map(_short, others)))}, as under autocast"
        )
    return None


class _DtypeRecorder(DynamicCache):
    """A cache that knows which dtypes came in; under autocast it would store another one."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.dtypes: set[torch.dtype] = set()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.dtypes |= {key_states.dtype, value_states.dtype}
        return super().update(key_states, value_states, *args, **kwargs)


def _is_flash(name: str) -> bool:
    return bool(is_flash_attention_requested(requested_attention_implementation=name))


def _switches_to_flash(model: PreTrainedModel) -> bool:
    """Whether the engine may take flash attention: only what is installed, nothing from the Hub."""
    return (
        model.device.type == "cuda"
        and model._supports_flash_attn
        and model.dtype in (torch.float16, torch.bfloat16)
        and bool(is_flash_attn_2_available() or is_flash_attn_3_available())
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
