"""Other ways to store a reference, which `benchmarks/reference.py` holds the package's own against.

Each takes a policy, completions of it and a rank, and returns a reference in about 4 bits. Most
differ in one function only, which chooses a layer's codes and low-rank factors from its weight and
the second moments of its inputs; `calibrated` runs it layer by layer, as the package does.

Shapes: ``O`` output and ``I`` input features, ``N`` tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_grpo_ext.cpu_linear import product, use_onednn
from trl_grpo_ext.layerwise import LayerCall, call_each, decoder_layers, run_layerwise
from trl_grpo_ext.reference import CompletionBatch, QuantizedLinear, build_reference
from trl_grpo_ext.reference.calibration import (
    _compensate,
    _input_moments,
    _recorded_inputs,
    _rows,
    linear_weight,
)
from trl_grpo_ext.reference.low_rank import low_rank_factors
from trl_grpo_ext.reference.rounding import damped

Batches = Sequence[CompletionBatch]
Method = Callable[[QuantizedLinear, Tensor, Tensor], None]  # layer, weight (O, I), moments (I, I)

ASYMMETRY_DAMPING = 0.1  # [share of the mean variance]


# Low rank alone: the codes are those of rounding to nearest ---------------------------------------


def svd(policy: PreTrainedModel, batches: Batches, rank: int) -> PreTrainedModel:
    """Low rank of the error itself: Yao et al. 2023, ZeroQuant-V2, arXiv:2303.08302."""

    def method(linear: QuantizedLinear, weight_OI: Tensor, moments_II: Tensor) -> None:
        _set_low_rank(linear, weight_OI, torch.eye(len(moments_II)).to(moments_II), rank)

    return calibrated(policy, batches, method)


def diagonal(policy: PreTrainedModel, batches: Batches, rank: int) -> PreTrainedModel:
    """Each input weighted by its size: Zhang et al. 2024, LQER, arXiv:2402.02446."""

    def method(linear: QuantizedLinear, weight_OI: Tensor, moments_II: Tensor) -> None:
        _set_low_rank(linear, weight_OI, moments_II.diagonal().diag(), rank)

    return calibrated(policy, batches, method)


def covariance(policy: PreTrainedModel, batches: Batches, rank: int) -> PreTrainedModel:
    """Weighted with all second moments: Zhang et al. 2024, QERA, arXiv:2410.06040."""

    def method(linear: QuantizedLinear, weight_OI: Tensor, moments_II: Tensor) -> None:
        _set_low_rank(linear, weight_OI, moments_II, rank)

    return calibrated(policy, batches, method)


# Error-feedback rounding and low rank, as in the package, with one thing changed ------------------


def one_turn(policy: PreTrainedModel, batches: Batches, rank: int) -> PreTrainedModel:
    """Rounding, then low rank of what is left, once; the package does so in turns."""

    def method(linear: QuantizedLinear, weight_OI: Tensor, moments_II: Tensor) -> None:
        _compensate(linear, weight_OI, moments_II, rank=0)
        _set_low_rank(linear, weight_OI, moments_II, rank)

    return calibrated(policy, batches, method)


def rotated(policy: PreTrainedModel, batches: Batches, rank: int) -> PreTrainedModel:
    """Inputs turned by a random Hadamard matrix: Tseng et al. 2024, QuIP#, arXiv:2402.04396."""
    reference = _built(policy)
    for name, linear in _quantized_linears(reference).items():
        source = policy.get_submodule(name)
        turned = RotatedLinear(linear_weight(source), cast("Tensor | None", source.bias))
        turned.uses_onednn = linear.uses_onednn
        reference.set_submodule(name, turned)

    def method(linear: QuantizedLinear, weight_OI: Tensor, moments_II: Tensor) -> None:
        turn_II = cast(RotatedLinear, linear).turn_II
        moments_II = turn_II.T @ moments_II @ turn_II
        _compensate(linear, weight_OI.float() @ turn_II, moments_II, rank=rank)

    return calibrated(policy, batches, method, reference=reference)


class RotatedLinear(QuantizedLinear):
    """A quantized layer that turns its inputs; the matrix is made from a seed, so it is not stored.

    A real one would turn them in ``I log I`` operations; this one multiplies with the matrix.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        turn_II = hadamard(weight.shape[1], seed=weight.shape[1]).to(weight.device)
        super().__init__(weight.float() @ turn_II, bias)
        self.turn_II = turn_II

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the product of the turned inputs and the turned weight, plus the bias."""
        return super().forward(product(inputs, self.turn_II.T.to(inputs.dtype).contiguous()))


def hadamard(size: int, *, seed: int) -> Tensor:
    """Return a random orthogonal matrix: signs, and a Hadamard matrix of the largest power of two.

    What is left of the size, 9 of 576, is mixed by a random orthogonal matrix of that size.
    """
    generator = torch.Generator().manual_seed(seed)
    power = size & -size
    matrix = torch.ones(1, 1)
    while len(matrix) < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    shape = (size // power, size // power)
    rest = torch.linalg.qr(torch.randn(shape, generator=generator)).Q.contiguous()
    signs = torch.randint(2, (size, 1), generator=generator) * 2.0 - 1
    return signs * torch.kron(rest, matrix / power**0.5)


def asymmetric(policy: PreTrainedModel, batches: Batches, rank: int) -> PreTrainedModel:
    """Aims at the policy's outputs for its own inputs: Li et al. 2025, GPTAQ, arXiv:2504.02692.

    The layer gets other inputs than the policy's: the weight that is rounded is the one that maps
    these to the policy's outputs with the least square error.
    """
    reference = _built(policy)
    layers, sources = list(decoder_layers(reference)), decoder_layers(policy)
    masks_BW = [batch.attention_mask_BW for batch in batches]
    own: list[LayerCall] = []

    def run_layer(index: int, layer: nn.Module, calls: Sequence[LayerCall]) -> list[Any]:
        own[:] = own or calls
        moments = _moments_of_two(sources[index], calls, own, masks_BW)
        for name, (moments_II, cross_II) in moments.items():
            linear = cast(QuantizedLinear, layer.get_submodule(name))
            weight_OI = linear_weight(sources[index].get_submodule(name)).double()
            inverse_II = torch.linalg.inv(damped(moments_II, ASYMMETRY_DAMPING))
            change_II = (cross_II.double() - moments_II.double()) @ inverse_II
            weight_OI = (weight_OI + weight_OI @ change_II).float()
            _compensate(linear, weight_OI, moments_II, rank=rank)
        for at, call in enumerate(own):
            hidden = call.run(sources[index])
            own[at] = call._replace(args=(hidden, *call.args[1:]))
        return call_each(index, layer, calls)

    with torch.no_grad():
        run_layerwise(layers, _passes(reference, batches), run_layer)
    return reference


def _moments_of_two(
    layer: nn.Module,
    calls: Sequence[LayerCall],
    own: Sequence[LayerCall],
    masks_BW: Sequence[Tensor],
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each linear layer the moments of its inputs, and of the policy's with them: (I, I)."""
    sums: dict[str, Any] = {}
    for call, own_call, mask_BW in zip(calls, own, masks_BW, strict=True):
        found: list[dict[str, Tensor]] = []
        for each in (call, own_call):
            with _recorded_inputs(layer) as inputs:
                each.run(layer)
            found.append({name: _rows(tensors[0], mask_BW) for name, tensors in inputs.items()})
        for name, rows_NI in found[0].items():
            pair = torch.stack(
                [product(rows_NI.T, rows_NI.T), product(found[1][name].T, rows_NI.T)]
            )
            sums[name] = sums.get(name, 0) + pair
    count = int(sum(mask_BW.sum() for mask_BW in masks_BW))
    return {name: (pair[0] / count, pair[1] / count) for name, pair in sums.items()}


# What the methods share ---------------------------------------------------------------------------


@torch.no_grad()
def calibrated(
    policy: PreTrainedModel,
    batches: Batches,
    method: Method,
    *,
    reference: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Return a reference that a method went through layer by layer, on the inputs it then gets."""
    reference = _built(policy) if reference is None else reference
    layers, sources = list(decoder_layers(reference)), decoder_layers(policy)
    masks_BW = [batch.attention_mask_BW for batch in batches]

    def run_layer(index: int, layer: nn.Module, calls: Sequence[LayerCall]) -> list[Any]:
        for name, moments_II in _input_moments(sources[index], calls, masks_BW).items():
            linear = cast(QuantizedLinear, layer.get_submodule(name))
            method(linear, linear_weight(sources[index].get_submodule(name)), moments_II)
        return call_each(index, layer, calls)

    run_layerwise(layers, _passes(reference, batches), run_layer)
    return reference


def _built(policy: PreTrainedModel) -> PreTrainedModel:
    reference = build_reference(policy)
    use_onednn(reference)
    return reference


def _passes(model: PreTrainedModel, batches: Batches) -> list[Callable[[], Any]]:
    return [functools.partial(model.base_model, **b.inputs, use_cache=False) for b in batches]


def _quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def _set_low_rank(
    linear: QuantizedLinear, weight_OI: Tensor, moments_II: Tensor, rank: int
) -> None:
    error_OI = weight_OI.float() - linear.dequantized_weight(torch.float32)
    linear.set_low_rank(*low_rank_factors(error_OI, covariance_II=moments_II, rank=rank))


METHODS: dict[str, Callable[[PreTrainedModel, Batches, int], PreTrainedModel]] = {
    "svd": svd,
    "diagonal": diagonal,
    "covariance": covariance,
    "one_turn": one_turn,
    "asymmetric": asymmetric,
    "rotated": rotated,
}
