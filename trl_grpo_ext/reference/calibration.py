"""Calibrating a quantized reference against the live policy, layer by layer.

Before training starts the policy is the reference, so that each layer's own outputs say how to
round it. Completions of the policy run through the reference. At each layer, the policy's layer
shows what its linear layers get as inputs; their codes and low-rank factors are chosen for these
inputs; then the completions go on through the layer as it is stored, so that the next one makes up
for what this one lost.

Shapes: ``B`` completions, ``W`` tokens of a padded row, ``N`` tokens without padding, ``O`` output
and ``I`` input features.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trl_grpo_ext.layerwise import LayerCall, call_each, decoder_layers, run_layerwise
from trl_grpo_ext.reference.completions import CompletionBatch, check_not_empty
from trl_grpo_ext.reference.expert_inputs import (
    RoutedTokens,
    expert_moments,
    real_tokens,
    recorded_routing,
)
from trl_grpo_ext.reference.experts import QuantizedExperts
from trl_grpo_ext.reference.low_rank import low_rank_factors, rank_of_budget
from trl_grpo_ext.reference.modes import evaluating
from trl_grpo_ext.reference.moments import estimated_moments, outer_sum
from trl_grpo_ext.reference.quantized import QuantizedLinear, check_rank
from trl_grpo_ext.reference.rounding import round_with_feedback

_NUM_TURNS = 3  # of rounding and low rank

Rank = int | Callable[[QuantizedLinear], int]  # of a layer's low-rank factors; 0 for none


@torch.no_grad()
def calibrate(
    reference: PreTrainedModel,
    policy: PreTrainedModel,
    batches: Sequence[CompletionBatch],
    *,
    rank: Rank = 0,
    progress: bool = False,
) -> None:
    """Choose codes, and low-rank factors if ``rank`` is not 0, so that outputs change least.

    The reference is changed in place, the policy is not. Beside the two models it takes the hidden
    states of all batches, the second moments of one layer's inputs, and three float64 copies of the
    largest of them; of the experts of a mixture, the moments of one at a time. Both models compute
    without autocast. Linear layers outside the decoder layers keep their codes.

    Args:
        reference: From :func:`~trl_grpo_ext.reference.build_reference`, quantized.
        policy: The model it was built from, unchanged since.
        batches: Completions of the policy; the more tokens, the better, up to some ten times the
            width of the widest layer.
        rank: Of the low-rank factors: a number, at most the least number of features of a quantized
            layer, or a rule such as :func:`rank_up_to` and :func:`rank_within`.
        progress: Whether to show a bar that counts layers.

    Raises:
        ReferenceModelError: ``rank`` is larger than a layer.
        LayerOrderError: the model does not run its layers once each, in order.
        ValueError: there is no completion token to calibrate on.
    """
    check_not_empty(batches)
    if isinstance(rank, int):
        check_ranks(reference, rank)
    layers, sources = list(decoder_layers(reference)), decoder_layers(policy)
    masks_BW = [batch.attention_mask_BW for batch in batches]
    bar = tqdm(total=len(layers), desc="Calibrating the reference", disable=not progress)

    def run_layer(index: int, layer: nn.Module, calls: Sequence[LayerCall]) -> list[Any]:
        _compensate_layer(layer, sources[index], calls, masks_BW, rank=rank)
        bar.update()
        return call_each(index, layer, calls)

    passes = [functools.partial(_hidden_states, reference, batch) for batch in batches]
    # Under autocast, moments would be rounded to 16 bits.
    with bar, evaluating(policy), torch.autocast(reference.device.type, enabled=False):
        run_layerwise(layers, passes, run_layer)


def rank_up_to(rank: int) -> Rank:
    """Return the rule that layers get this rank, or all the rank that they have."""
    return lambda linear: min(rank, linear.out_features, linear.in_features)


def rank_within(bits: float) -> Rank:
    """Return the rule that a weight takes at most so many bits with its scale and factors."""
    return lambda linear: rank_of_budget(
        bits - 8 * linear.num_bytes / linear.num_weights,
        out_features=linear.out_features,
        in_features=linear.in_features,
    )


def check_ranks(reference: nn.Module, rank: int) -> None:
    """Refuse a rank that a quantized layer does not have.

    Raises:
        ReferenceModelError: ``rank`` is larger than a layer.
    """
    for name, module in reference.named_modules():
        if isinstance(module, QuantizedLinear):
            check_rank(rank, name, module.out_features, module.in_features)


def _compensate_layer(
    layer: nn.Module,
    source: nn.Module,
    calls: Sequence[LayerCall],
    masks_BW: Sequence[Tensor],
    *,
    rank: Rank,
) -> None:
    """Choose what a layer of the reference stores; ``source`` is the policy's."""
    with recorded_routing(source, _expert_blocks(layer)) as routing:
        moments = _input_moments(source, calls, masks_BW)
    for name, covariance_II in moments.items():
        linear = layer.get_submodule(name)
        if isinstance(linear, QuantizedLinear):
            _compensate(linear, linear_weight(source.get_submodule(name)), covariance_II, rank=rank)
    for name, recorded in routing.items():
        tokens = real_tokens(recorded, masks_BW)
        _compensate_experts(
            layer.get_submodule(name), source.get_submodule(name), tokens, rank=rank
        )


def _expert_blocks(layer: nn.Module) -> list[str]:
    """Names of the modules that hold quantized experts."""
    return [
        name
        for name, module in layer.named_modules()
        if any(isinstance(child, QuantizedExperts) for child in module.children())
    ]


def _compensate_experts(
    block: nn.Module, source: nn.Module, tokens: RoutedTokens, *, rank: Rank
) -> None:
    for expert, moments in enumerate(expert_moments(source, tokens)):
        for name, covariance_II in moments.items():
            stack = getattr(block, name)
            if isinstance(stack, QuantizedExperts):
                weight = getattr(source, name)[expert]
                _compensate(
                    cast(QuantizedLinear, stack.layers[expert]),
                    weight.T if stack.transposed else weight,
                    covariance_II,
                    rank=rank,
                )


def _compensate(
    linear: QuantizedLinear, weight_OI: Tensor, covariance_II: Tensor, *, rank: Rank
) -> None:
    """Choose the codes; with low rank, in turns: codes for what the factors leave, then factors.

    References:
        Saha et al. 2024, CALDERA, algorithm 1, arXiv:2405.18886.
    """
    size = rank if isinstance(rank, int) else rank(linear)
    weight_OI = weight_OI.float()
    scales = linear.scales().repeat_interleave(linear.block_size)[: linear.num_weights]
    low_rank_OI = torch.zeros_like(weight_OI)
    for _ in range(_NUM_TURNS if size else 1):
        codes_OI = round_with_feedback(
            weight_OI - low_rank_OI,
            covariance_II=covariance_II,
            scales_OI=scales.view(weight_OI.shape),
            levels=linear.levels,
        )
        linear.set_codes(codes_OI)
        if size:
            error_OI = weight_OI - linear.dequantized_weight(torch.float32)
            linear.set_low_rank(*low_rank_factors(error_OI, covariance_II=covariance_II, rank=size))
            low_rank_OI = linear.low_rank_weight()


def _input_moments(
    layer: nn.Module, calls: Sequence[LayerCall], masks_BW: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Second moments, shape ``(I, I)``, of the inputs of each linear layer below ``layer``.

    Layers that get the same inputs, such as queries, keys and values, share one tensor.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)
    first: dict[str, str] = {}
    for call, mask_BW in zip(calls, masks_BW, strict=True):
        with _recorded_inputs(layer) as inputs:
            layer(*call.args, **call.kwargs)
        names: dict[int, str] = {}
        for name, tensors in inputs.items():
            first[name] = names.setdefault(id(tensors[0]), name)
            if first[name] == name:
                for rows_NI in (_rows(tensor, mask_BW) for tensor in tensors):
                    sums[name] = outer_sum(rows_NI) + sums.get(name, 0)
                    counts[name] += len(rows_NI)
    means = {name: estimated_moments(total, num_rows=counts[name]) for name, total in sums.items()}
    return {name: means[leader] for name, leader in first.items()}


@contextmanager
def _recorded_inputs(layer: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    inputs: dict[str, list[Tensor]] = defaultdict(list)

    def record(_: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
        inputs[name].append(args[0])

    hooks = [
        module.register_forward_pre_hook(functools.partial(record, name=name))
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _rows(inputs: Tensor, mask_BW: Tensor) -> Tensor:
    """Inputs of real tokens, float32, ``(N, I)``; those that a router has regrouped count whole."""
    rows_NI = inputs.reshape(-1, inputs.shape[-1])
    if len(rows_NI) == mask_BW.numel():
        rows_NI = rows_NI[mask_BW.flatten().bool()]
    return rows_NI.float()


def linear_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer or of GPT-2's ``Conv1D``, ``(O, I)``."""
    weight = cast(Tensor, module.weight)
    return weight.T if isinstance(module, Conv1D) else weight


def _hidden_states(model: PreTrainedModel, batch: CompletionBatch) -> None:
    model.base_model(**batch.inputs, use_cache=False)
