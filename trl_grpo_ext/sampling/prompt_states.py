"""What a model keeps of prompts and completions: once a group where it can, else once a row.

Shapes: ``P`` distinct prompts, ``B`` completions that are still growing, ``L`` tokens of the
longest prompt and its completion so far, ``V`` vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from trl_grpo_ext.attention import route_attention, shared_prefix_inputs, shared_prefix_problem
from trl_grpo_ext.errors import SharedPrefixError
from trl_grpo_ext.sampling.cuda_graphs import RepeatedPass
from trl_grpo_ext.sampling.group_cache import FixedGroupCache, GroupCache

logger = logging.get_logger(__name__)


class State(Protocol):
    """What the model knows of the rows."""

    def step(self, tokens_B: Tensor) -> Tensor:
        """Take the next token of each row, and return the logits ``(B, V)`` after it."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Forget every row but these, indices in growing order."""
        ...


class _SharedPrompts:
    """Keys and values of a prompt are kept once, whatever the size of its group."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sizes: Sequence[int],
        cache: GroupCache,
    ):
        self._model, self._prompts, self._cache = model, prompts, cache
        lengths_P = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        self._ends_P = lengths_P.cumsum(0) - 1
        self._sizes_P = torch.tensor(sizes, device=model.device)
        self._positions_B = lengths_P.repeat_interleave(self._sizes_P)

    def prefill(self) -> Tensor:
        """All prompts, one after the other in one row."""
        ids = [token for prompt in self._prompts for token in prompt]
        positions = [position for prompt in self._prompts for position in range(len(prompt))]
        device = self._model.device
        self._cache.advance()
        logits_PV = self._forward(
            torch.tensor([ids], device=device),
            torch.tensor([positions], device=device),
            logits_to_keep=self._ends_P,
        )[0]
        if not self._cache.num_bytes:
            raise SharedPrefixError("the model does not hand `shared_prefix` to its attention.")
        return logits_PV.repeat_interleave(self._sizes_P, dim=0)

    def step(self, tokens_B: Tensor) -> Tensor:
        self._cache.advance()
        logits_BV = self._forward(tokens_B[:, None], self._positions_B[:, None])[:, 0]
        self._positions_B = self._positions_B + 1
        return logits_BV

    def keep(self, rows: Tensor) -> None:
        self._cache.keep(rows)
        self._positions_B = self._positions_B[rows]

    def _forward(self, input_ids: Tensor, position_ids: Tensor, **options: Any) -> Tensor:
        inputs = shared_prefix_inputs(input_ids, position_ids, self._cache)
        logits: Tensor = self._model(**inputs, **options).logits
        return logits


class _FixedRows(_SharedPrompts):
    """The same, step after step in the same memory, so that a CUDA graph can repeat the pass.

    Rows that have ended are computed on until they are half of all: each change of shape costs a
    capture.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sizes: Sequence[int],
        cache: FixedGroupCache,
    ):
        super().__init__(model, prompts, sizes, cache)
        self._fixed = cache
        self._tokens_B = torch.zeros_like(self._positions_B)
        self._growing = torch.arange(len(self._tokens_B), device=self._tokens_B.device)
        self._pass = RepeatedPass(model)

    def step(self, tokens_B: Tensor) -> Tensor:
        self._fixed.advance()
        self._tokens_B[self._growing] = tokens_B
        logits_BV = self._pass(self._decode, version=self._fixed.version)
        self._positions_B += 1
        return logits_BV[self._growing]

    def keep(self, rows: Tensor) -> None:
        self._growing = self._growing[rows]
        if 2 * len(self._growing) <= len(self._tokens_B):
            super().keep(self._growing)
            self._tokens_B = self._tokens_B[self._growing]
            self._growing = torch.arange(len(self._growing), device=rows.device)

    def _decode(self) -> Tensor:
        return self._forward(self._tokens_B[:, None], self._positions_B[:, None])[:, 0]


class _ExpandedPrompts:
    """Every row has the keys and values of its prompt, in the cache that is the model's own."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], sizes: Sequence[int]
    ):
        self._model, self._prompts = model, prompts
        self._cache = DynamicCache(config=model.config)
        longest, device = max(map(len, prompts)), model.device
        masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self._mask_BL = torch.tensor(masks, device=device)
        groups = torch.arange(len(prompts), device=device)
        self._group_of_B = groups.repeat_interleave(torch.tensor(sizes, device=device))

    def prefill(self) -> Tensor:
        """The prompts side by side, padded on the left."""
        longest = self._mask_BL.shape[1]
        padded = [[0] * (longest - len(prompt)) + [*prompt] for prompt in self._prompts]
        logits_PV = self._forward(torch.tensor(padded, device=self._model.device))
        if self._cache.get_seq_length() == 0:
            raise _no_cache(self._model)
        self.keep(self._group_of_B)
        return logits_PV[self._group_of_B]

    def step(self, tokens_B: Tensor) -> Tensor:
        ones = self._mask_BL.new_ones(len(self._mask_BL), 1)
        self._mask_BL = torch.cat([self._mask_BL, ones], dim=1)
        return self._forward(tokens_B[:, None])

    def keep(self, rows: Tensor) -> None:
        self._cache.reorder_cache(cast(torch.LongTensor, rows))  # every kind of layer has it
        self._mask_BL = self._mask_BL[rows]

    def _forward(self, input_ids: Tensor) -> Tensor:
        positions_BL = (self._mask_BL.cumsum(dim=1) - 1).clamp(min=0)
        logits: Tensor = self._model(
            input_ids=input_ids,
            attention_mask=self._mask_BL,
            position_ids=positions_BL[:, -input_ids.shape[1] :],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]


def prefilled(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sizes: Sequence[int],
    *,
    shares: bool,
    fixed_tokens: int | None = None,
) -> tuple[State, Tensor]:
    """Return the state after the prompts, and the logits ``(B, V)`` of the first tokens.

    Args:
        model: A causal language model in evaluation mode.
        prompts: Token ids of the ``P`` distinct prompts.
        sizes: Completions of each.
        shares: What :func:`shares_prompts` says.
        fixed_tokens: If given, steps stay in the same memory, for completions of so many tokens at
            most, and are repeated as CUDA graphs where they can be. Otherwise they are as small as
            what is growing.

    Raises:
        ValueError: the model has no key-value cache.
    """
    if shares:
        shared = _shared(model, prompts, sizes, fixed_tokens)
        try:
            return shared, shared.prefill()
        except SharedPrefixError as error:
            logger.warning_once(f"the sampler computes each prompt for each completion: {error}")
    if not takes_cache(model):
        raise _no_cache(model)
    expanded = _ExpandedPrompts(model, prompts, sizes)
    return expanded, expanded.prefill()


def _shared(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sizes: Sequence[int],
    fixed_tokens: int | None,
) -> _SharedPrompts:
    lengths, device = [len(prompt) for prompt in prompts], model.device
    if fixed_tokens is None:
        cache = GroupCache(lengths, group_sizes=sizes, device=device)
        return _SharedPrompts(model, prompts, sizes, cache)
    fixed = FixedGroupCache(lengths, group_sizes=sizes, max_new_tokens=fixed_tokens, device=device)
    return _FixedRows(model, prompts, sizes, fixed)


def shares_prompts(model: PreTrainedModel, *, longest: int) -> bool:
    """Return whether each prompt is kept once a group; ``longest`` tokens has a row at most."""
    inner = cast(PreTrainedModel, _base_model(model))
    try:
        if (problem := shared_prefix_problem(inner, longest=longest)) is None:
            route_attention(inner)
    except SharedPrefixError as error:
        problem = str(error)
    if problem is not None:
        logger.warning_once(f"the sampler computes each prompt for each completion: {problem}")
    return problem is None


def takes_cache(model: PreTrainedModel) -> bool:
    """Return whether the model can go on from keys and values that were kept."""
    base: Any = _base_model(model)
    can: Callable[[], bool] = getattr(base, "_supports_default_dynamic_cache", lambda: True)
    return can() and "past_key_values" in inspect.signature(base.forward).parameters


def _base_model(model: PreTrainedModel) -> nn.Module:
    """The model inside of a PEFT model, which passes on all that it is given."""
    get: Callable[[], nn.Module] = getattr(model, "get_base_model", lambda: model)
    return get()


def _no_cache(model: PreTrainedModel) -> ValueError:
    return ValueError(
        f"{type(_base_model(model)).__name__} fills no key-value cache, so that each token would "
        "take a pass over the whole text. Use a model with a cache, or have transformers' "
        "`generate` sample (`group_sampler: transformers`)."
    )
