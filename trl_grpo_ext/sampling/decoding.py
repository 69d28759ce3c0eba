"""Completions token by token: each prompt computed once, finished completions gone at once.

Shapes: ``B`` completions that are still growing, ``T`` completion tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from trl_grpo_ext.attention import text_config
from trl_grpo_ext.memory import kv_cache_bytes
from trl_grpo_ext.sampling.cuda_graphs import capture_problem
from trl_grpo_ext.sampling.draw import Draw
from trl_grpo_ext.sampling.prompt_states import prefilled, shares_prompts
from trl_grpo_ext.sampling.settings import SamplingSettings
from trl_grpo_ext.sampling.streams import CompletionKey, uniforms

_CACHE_SHARE = 0.7  # of the free memory of a CUDA device, for keys, values and logits
_LOGIT_BYTES = 64  # [bytes] an entry of the vocabulary: logits, their sorted copies and their sums


@dataclass
class Completion:
    """One completion.

    Attributes:
        ids: Its tokens; the stop token is the last one.
        policy_logprobs: Log-probability of each token under the temperature alone (1 if greedy).
        sampling_logprobs: Log-probability of each under everything that shaped the draw.
        stopped: Whether it ended with a stop token, not at the limit.
    """

    ids: list[int] = field(default_factory=list)
    policy_logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    stopped: bool = False


class SamplingStopped(Exception):  # noqa: N818 - not an error: it was asked for
    """Sampling ended before its completions did, because ``should_stop`` said so."""


def progress_bar(total: int, *, shown: bool) -> tqdm[NoReturn]:
    """Return a bar that counts completions."""
    return tqdm(total=total, desc="sampling", unit="completion", disable=not shown, leave=None)


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[CompletionKey],
    *,
    settings: SamplingSettings,
    seed: int,
    step: int,
    max_live_tokens: int | None = None,
    fixed_shapes: bool | None = None,
    on_finished: Callable[[int, Completion], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: bool = False,
) -> list[Completion]:
    """Return one completion for each entry of ``prompts``.

    Equal prompts are computed once, wherever they stand. The random numbers of a completion depend
    on the seed, the step and its key alone; so does the completion, up to the rounding of the
    model, which differs a little with the shape of the batch.

    Args:
        model: A causal language model; the training modes of its modules are kept.
        prompts: Token ids, one list a completion.
        keys: One a completion, all different.
        settings: What shapes the draw, and when a completion ends.
        seed: Of the random numbers.
        step: Of the training; another one gives other random numbers.
        max_live_tokens: Tokens whose keys and values are kept at a time: each prompt once, and
            ``max_new_tokens`` for each completion. What does not fit waits for the next wave. By
            default what fits into the memory of a CUDA device, elsewhere all.
        fixed_shapes: Whether the steps stay in the same memory, so that CUDA graphs repeat them; by
            default where those can be captured. Completions that end then leave the batch when they
            are half of it.
        on_finished: Called with the index of a completion, and with it, as soon as it ends.
        should_stop: Asked between tokens; sampling ends when it says yes.
        progress: Whether to show a bar that counts completions.

    Returns:
        The completions, in the order of ``prompts``.

    Raises:
        ValueError: a prompt is empty or too long for the model, keys repeat, the model has no
            key-value cache, or one completion needs more than ``max_live_tokens``.
        SamplingStopped: ``should_stop`` said yes.
    """
    _check(model, prompts, keys, settings)
    if not prompts:
        return []
    longest = max(map(len, prompts)) + settings.max_new_tokens
    shares = shares_prompts(model, longest=longest)
    cap = _tokens_that_fit(model, settings) if max_live_tokens is None else max_live_tokens
    budget = _Budget(settings.max_new_tokens, cap, shares, strict=max_live_tokens is not None)
    if fixed_shapes is None:
        fixed_shapes = capture_problem(model) is None
    finished: dict[int, Completion] = {}
    with (
        _evaluation_mode(model),
        progress_bar(len(prompts), shown=progress) as bar,
    ):

        def finish(index: int, completion: Completion) -> None:
            finished[index] = completion
            bar.update()
            if on_finished is not None:
                on_finished(index, completion)

        for wave in budget.waves(_grouped(prompts)):
            indices = [index for group in wave for index in group.indices]
            uniforms_BT = uniforms(seed, step, [keys[i] for i in indices], settings.max_new_tokens)
            _sample_wave(
                model,
                wave,
                settings,
                uniforms_BT=uniforms_BT,
                shares=shares,
                fixed_shapes=fixed_shapes,
                finish=finish,
                should_stop=should_stop,
            )
    return [finished[index] for index in range(len(prompts))]


@dataclass(frozen=True)
class _Group:
    """Completions of one prompt, by their index."""

    prompt: Sequence[int]
    indices: list[int]


def _grouped(prompts: Sequence[Sequence[int]]) -> list[_Group]:
    groups: dict[tuple[int, ...], _Group] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), _Group(prompt, [])).indices.append(index)
    return list(groups.values())


# --- waves -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Budget:
    """Cuts groups into waves that keep below the cap; whole groups where they fit."""

    new_tokens: int
    cap: int | None
    shares: bool  # whether a prompt is kept once a group, not once a completion
    strict: bool  # whether one completion above the cap is an error

    def waves(self, groups: Sequence[_Group]) -> Iterator[list[_Group]]:
        wave: list[_Group] = []
        for part in [part for group in groups for part in self._parts(group)]:
            if wave and self.cap is not None and self._cost([*wave, part]) > self.cap:
                yield wave
                wave = []
            wave.append(part)
        yield wave

    def _parts(self, group: _Group) -> Iterator[_Group]:
        size = len(group.indices)
        if self.cap is not None and self._cost([group]) > self.cap:
            own = self.new_tokens + (0 if self.shares else len(group.prompt))
            size = max((self.cap - (len(group.prompt) if self.shares else 0)) // own, 1)
        if self.strict and self.cap is not None and self._cost([_part(group, 0, 1)]) > self.cap:
            raise ValueError(
                f"`max_live_tokens` is {self.cap}, but one completion of prompt "
                f"{group.indices[0]} needs {len(group.prompt)} + {self.new_tokens} tokens. Raise "
                "it, or lower the number of tokens that a completion may have."
            )
        for start in range(0, len(group.indices), size):
            yield _part(group, start, start + size)

    def _cost(self, groups: Sequence[_Group]) -> int:
        return sum(
            len(group.prompt) * (1 if self.shares else len(group.indices))
            + self.new_tokens * len(group.indices)
            for group in groups
        )


def _part(group: _Group, start: int, stop: int) -> _Group:
    return _Group(group.prompt, group.indices[start:stop])


def _tokens_that_fit(model: PreTrainedModel, settings: SamplingSettings) -> int | None:
    """Number of tokens whose keys and values fit into the free memory of a CUDA device."""
    if model.device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    kv_bytes = kv_cache_bytes(model.config, num_tokens=1, dtype_bytes=model.dtype.itemsize)
    # The logits of a completion are there once, whatever its length.
    logit_bytes = _LOGIT_BYTES * text_config(model).vocab_size / settings.max_new_tokens
    return int(free * _CACHE_SHARE / (kv_bytes + logit_bytes))


# --- one wave --------------------------------------------------------------------------------


def _sample_wave(
    model: PreTrainedModel,
    groups: Sequence[_Group],
    settings: SamplingSettings,
    *,
    uniforms_BT: Tensor,
    shares: bool,
    fixed_shapes: bool,
    finish: Callable[[int, Completion], None],
    should_stop: Callable[[], bool] | None,
) -> None:
    indices = [index for group in groups for index in group.indices]
    prompts = [group.prompt for group in groups]
    sizes = [len(group.indices) for group in groups]
    fixed_tokens = settings.max_new_tokens if fixed_shapes else None
    state, logits_BV = prefilled(model, prompts, sizes, shares=shares, fixed_tokens=fixed_tokens)
    rows = [prompt for prompt, size in zip(prompts, sizes, strict=True) for _ in range(size)]
    draw = Draw(settings, rows, num_tokens=logits_BV.shape[1], device=logits_BV.device)
    uniforms_TB = uniforms_BT.to(logits_BV.device).T
    growing = [Completion() for _ in indices]
    for length in range(1, settings.max_new_tokens + 1):
        drawn_B, values = draw(logits_BV, uniforms_TB[length - 1])
        _append(growing, values, settings.stop_ids)
        is_last = length == settings.max_new_tokens
        for index, completion in zip(indices, growing, strict=True):
            if completion.stopped or is_last:
                finish(index, completion)
        left = [] if is_last else [i for i, row in enumerate(growing) if not row.stopped]
        if not left:
            return
        if len(left) < len(growing):
            indices, growing = [indices[i] for i in left], [growing[i] for i in left]
            kept = torch.tensor(left, device=drawn_B.device)
            drawn_B, uniforms_TB = drawn_B[kept], uniforms_TB[:, kept]
            state.keep(kept)
            draw.keep(kept)
        if should_stop is not None and should_stop():
            raise SamplingStopped
        draw.extend(drawn_B)
        logits_BV = state.step(drawn_B)


def _append(
    growing: Sequence[Completion], values: Sequence[Sequence[float]], stop_ids: frozenset[int]
) -> None:
    for row, token, policy, sampling in zip(growing, *values, strict=True):
        if math.isnan(policy):
            raise ValueError(
                f"the model's logits after {len(row.ids)} tokens of a completion are not finite, "
                "so nothing can be drawn. Look at the loss and the gradient norm of the steps "
                "before, and lower the learning rate."
            )
        if math.isnan(sampling):
            raise ValueError(
                f"the generation options leave no token to draw after {len(row.ids)} tokens of a "
                "completion. Look at `suppress_tokens`, `bad_words_ids` and `sequence_bias` in "
                "`generation_kwargs`."
            )
        row.ids.append(int(token))
        row.policy_logprobs.append(policy)
        row.sampling_logprobs.append(sampling)
        row.stopped = token in stop_ids


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards each module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[CompletionKey],
    settings: SamplingSettings,
) -> None:
    check_prompts(model, prompts, max_new_tokens=settings.max_new_tokens)
    if len(keys) != len(prompts):
        raise ValueError(f"there are {len(keys)} `keys` for {len(prompts)} prompts; give one each.")
    if len(set(keys)) < len(keys):
        raise ValueError(
            "`keys` has a key twice, so that two completions would come from the same random "
            "numbers; give each its own."
        )


def check_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int
) -> None:
    """Raise a ``ValueError`` that names the first prompt that the model cannot go on from."""
    config = text_config(model)
    limit = getattr(config, "max_position_embeddings", None)
    learned = not hasattr(config, "rope_parameters")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(
                f"`prompts[{index}]` has no token, so there is nothing to go on from; "
                "leave it out, or start it with the tokenizer's `bos_token`."
            )
        needed = len(prompt) + (max_new_tokens if learned else 0)
        if limit is not None and needed > limit:
            new = f" + {max_new_tokens} new ones" if learned else ""
            shorter = ", or lower `max_completion_length` (`max_new_tokens`)" if learned else ""
            raise ValueError(
                f"`prompts[{index}]` has {len(prompt)} tokens{new}, but the model has {limit} "
                "positions (`max_position_embeddings`), and what lies beyond was never trained. "
                f"Shorten the prompt{shorter}."
            )
