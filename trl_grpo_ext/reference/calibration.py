"""Calibrating a quantized reference against the live policy, layer by layer.

Before training starts the policy is the reference, so that each layer's own outputs say how to
round it. Completions of the policy run through the reference. At each layer, the policy's layer
shows what its linear layers get as inputs; their codes and low-rank factors are chosen for these
inputs; then the completions go on through the layer as it is stored, so that the next one makes up
for what this one lost.

Shapes: ``B`` completions, ``W`` tokens of a padded row, ``O`` output and ``I`` input features.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trl_grpo_ext.cpu_linear import product
from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.layerwise import LayerCall, call_each, decoder_layers, run_layerwise
from trl_grpo_ext.reference.completions import CompletionBatch
from trl_grpo_ext.reference.low_rank import low_rank_factors
from trl_grpo_ext.reference.modes import evaluating
from trl_grpo_ext.reference.quantized import QuantizedLinear
from trl_grpo_ext.reference.rounding import round_with_feedback


@torch.no_grad()
def calibrate(
    reference: PreTrainedModel,
    policy: PreTrainedModel,
    batches: Sequence[CompletionBatch],
    *,
    rank: int = 0,
    progress: bool = False,
) -> None:
    """Choose codes, and low-rank factors if ``rank`` is not 0, so that outputs change least.

    The reference is changed in place, the policy is not. Beside the two models it takes the hidden
    states of all batches and the second moments of one layer's inputs. Experts of a mixture and
    linear layers outside the decoder layers keep their codes.

    Args:
        reference: From :func:`~trl_grpo_ext.reference.build_reference`, quantized.
        policy: The model it was built from, unchanged since.
        batches: Completions of the policy; the more tokens, the better, up to some ten times the
            width of the widest layer.
        rank: Of the low-rank factors, at most the least number of features of a quantized layer.
        progress: Whether to show a bar that counts layers.

    Raises:
        ReferenceModelError: ``rank`` is larger than a layer.
        LayerOrderError: the model does not run its layers once each, in order.
    """
    check_rank(reference, rank)
    layers, sources = list(decoder_layers(reference)), decoder_layers(policy)
    bar = tqdm(total=len(layers), desc="Calibrating the reference", disable=not progress)

    def run_layer(index: int, layer: nn.Module, calls: Sequence[LayerCall]) -> list[Any]:
        moments = _input_moments(sources[index], calls, [b.attention_mask_BW for b in batches])
        for name, covariance_II in moments.items():
            linear = layer.get_submodule(name)
            if isinstance(linear, QuantizedLinear):
                weight_OI = _weight(sources[index].get_submodule(name))
                _compensate(linear, weight_OI, covariance_II, rank=rank)
        bar.update()
        return call_each(index, layer, calls)

    with bar, evaluating(policy):
        run_layerwise(
            layers, [functools.partial(_hidden_states, reference, b) for b in batches], run_layer
        )


def check_rank(reference: nn.Module, rank: int) -> None:
    """Refuse a rank that a quantized layer does not have.

    Raises:
        ReferenceModelError: ``rank`` is larger than a layer.
    """
    for name, module in reference.named_modules():
        if isinstance(module, QuantizedLinear):
            limit = min(module.out_features, module.in_features)
            if rank > limit:
                raise ReferenceModelError(
                    f"`reference_rank` is {rank}, but {name} is a layer of {module.out_features} x "
                    f"{module.in_features}: a rank above {limit} adds nothing. Set "
                    f"`reference_rank` to at most {limit}, or name the layer in "
                    "`reference_keep_modules`."
                )


def _compensate(
    linear: QuantizedLinear, weight_OI: Tensor, covariance_II: Tensor, *, rank: int
) -> None:
    scales = linear.scales().repeat_interleave(linear.block_size)[: linear.num_weights]
    codes_OI = round_with_feedback(
        weight_OI,
        covariance_II=covariance_II,
        scales_OI=scales.view(weight_OI.shape),
        levels=linear.levels,
    )
    linear.set_codes(codes_OI)
    if rank:
        error_OI = weight_OI.float() - linear.dequantized_weight(torch.float32)
        linear.set_low_rank(*low_rank_factors(error_OI, covariance_II=covariance_II, rank=rank))


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
                    sums[name] = product(rows_NI.T, rows_NI.T) + sums.get(name, 0)
                    counts[name] += len(rows_NI)
    means = {name: total / max(counts[name], 1) for name, total in sums.items()}
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
    if inputs.shape[:-1] == mask_BW.shape:
        return inputs[mask_BW.bool()].float()
    return inputs.reshape(-1, inputs.shape[-1]).float()


def _weight(module: nn.Module) -> Tensor:
    weight = cast(Tensor, module.weight)
    return weight.T if isinstance(module, Conv1D) else weight


def _hidden_states(model: PreTrainedModel, batch: CompletionBatch) -> None:
    model.base_model(**batch.inputs, use_cache=False)
