r"""A reference in 4 and 8 bits: the layers whose rounding the policy feels most get 8.

How much a layer's error changes the policy is measured to second order. Along the line from the
rounded weight to the exact one, the log-probability of a completion has a derivative at the exact
end; the mean of its square over the policy's own completions is twice the KL that this error alone
brings:

.. math::
    \mathrm{KL}(\pi \,\|\, \pi_q) \approx
    \tfrac12 E_{y \sim \pi} \langle W_q - W, \nabla_W \log \pi(y) \rangle^2
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import PreTrainedModel

from trl_grpo_ext.layerwise import decoder_layers, restore_forward
from trl_grpo_ext.reference.calibration import calibrate, linear_weight
from trl_grpo_ext.reference.completions import CompletionBatch, completion_logits
from trl_grpo_ext.reference.experts import QuantizedExperts
from trl_grpo_ext.reference.modes import evaluating
from trl_grpo_ext.reference.options import DEFAULT_RANK
from trl_grpo_ext.reference.quantized import QuantizationType, QuantizedLinear

NUM_ROWS = 32  # completions that the layers' errors are measured on


def calibrate_mixed(
    reference: PreTrainedModel,
    policy: PreTrainedModel,
    batches: Sequence[CompletionBatch],
    *,
    bits: float | None = None,
    progress: bool = False,
) -> list[str]:
    """Calibrate a 4-bit reference whose most sensitive layers are stored in 8 bits.

    It is calibrated twice: all in 4 bits, to measure what each layer loses, and as it is stored.
    Beside what :func:`~trl_grpo_ext.reference.calibrate` takes, measuring needs the hidden states
    of one completion at each decoder layer, and a backward pass of one layer.

    Args:
        reference: From :func:`~trl_grpo_ext.reference.build_reference`, in 4 bits; changed in
            place.
        policy: The model it was built from, unchanged since.
        batches: Completions of the policy.
        bits: That a quantized weight may take in the mean, with its scales; see
            :func:`bytes_within`.
        progress: Whether to show bars.

    Returns:
        Names of the layers in 8 bits.

    Raises:
        LayerOrderError: the model does not run its layers once each, in order.
        ValueError: there is no completion token to calibrate on.

    References:
        Kim et al. 2023, SqueezeLLM, section 4.1, arXiv:2306.07629, for the measure.
    """
    calibrate(reference, policy, batches, progress=progress)
    divergences = layer_divergences(reference, policy, batches, progress=progress)
    wide = most_sensitive(
        quantized_linears(reference), divergences, max_bytes=bytes_within(reference, bits)
    )
    narrow = next(linear.quantization for linear in quantized_linears(reference).values())
    widen(reference, wide, narrow=narrow, policy=policy)
    calibrate(reference, policy, batches, progress=progress)
    return wide


def bytes_within(reference: nn.Module, bits: float | None) -> float:
    """Return the bytes that all quantized layers may take.

    Args:
        reference: In 4 bits.
        bits: A weight, in the mean; ``None`` for as many as low-rank factors of the usual rank
            would take: few in wide layers, which lose less.
    """
    linears = quantized_linears(reference).values()
    if bits is not None:
        return bits / 8 * sum(linear.num_weights for linear in linears)
    total = 0
    for linear in linears:
        rank = min(DEFAULT_RANK, linear.out_features, linear.in_features)
        total += linear.num_bytes + 2 * rank * (linear.out_features + linear.in_features)
    return total


def quantized_linears(reference: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantized layers by name; each expert is one."""
    return {
        name: module
        for name, module in reference.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def most_sensitive(
    linears: Mapping[str, QuantizedLinear], divergences: Mapping[str, float], *, max_bytes: float
) -> list[str]:
    """Return the layers that gain most a byte from 8 bits, as many as fit.

    Args:
        linears: All quantized layers, in 4 bits.
        divergences: What each one's rounding costs; a layer that is not there stays as it is.
        max_bytes: Of all of them.

    Example:
        >>> linears = {name: QuantizedLinear(torch.ones(64, 64)) for name in "abc"}
        >>> num_bytes = sum(linear.num_bytes for linear in linears.values())
        >>> most_sensitive(linears, {"a": 1.0, "b": 3.0, "c": 2.0}, max_bytes=num_bytes + 7000)
        ['b', 'c']
    """
    left = max_bytes - sum(linear.num_bytes for linear in linears.values())
    wide = []
    by_gain = sorted(divergences, key=lambda name: divergences[name] / linears[name].num_weights)
    for name in reversed(by_gain):
        extra = _more_in_8_bits(linears[name])
        if divergences[name] > 0 and extra <= left:
            left -= extra
            wide.append(name)
    return wide


def _more_in_8_bits(linear: QuantizedLinear) -> int:
    """Bytes that a layer in 4 bits would take more: an index is a byte, of 256 levels."""
    return linear.num_weights - linear.packed.nbytes + (256 - 16) * 4


def widen(
    reference: PreTrainedModel,
    wide: Collection[str],
    *,
    narrow: QuantizationType,
    policy: PreTrainedModel | None = None,
) -> None:
    """Store the layers of these names in 8 bits and all others in 4; what is so already stays.

    Args:
        reference: Changed in place.
        wide: Names of quantized layers.
        narrow: The type of 4 bits.
        policy: Whose weights are rounded; by default those that the layer has are.
    """
    for name, linear in quantized_linears(reference).items():
        quantization = "int8" if name in wide else narrow
        if linear.quantization != quantization:
            weight = None if policy is None else source_weight(policy, reference, name)
            reference.set_submodule(name, _in_type(linear, quantization, weight))


def source_weight(policy: nn.Module, reference: nn.Module, name: str) -> Tensor:
    """Return the policy's weight, ``(O, I)``, of a quantized layer, which may be an expert."""
    stack_name, _, expert = name.rpartition(".layers.")
    stack = reference.get_submodule(stack_name) if stack_name else None
    if isinstance(stack, QuantizedExperts):
        weight = policy.get_parameter(stack_name)[int(expert)].detach()
        return weight.T if stack.transposed else weight
    return linear_weight(policy.get_submodule(name)).detach()


def layer_divergences(
    reference: PreTrainedModel,
    policy: PreTrainedModel,
    batches: Sequence[CompletionBatch],
    *,
    progress: bool = False,
) -> dict[str, float]:
    """Return what the rounding of each quantized layer alone adds to the KL of a completion, nats.

    The passes run through the reference, which holds the exact weights for the time.

    Args:
        reference: Quantized, calibrated; unchanged in the end.
        policy: The model it was built from.
        batches: Completions of the policy, of which some rows are taken.
        progress: Whether to show a bar that counts completions.
    """
    rows = [row for batch in batches for row in _single_rows(batch)]
    rows = rows[:: -(-len(rows) // NUM_ROWS)]
    bar = tqdm(rows, "Measuring the layers of the reference", disable=not progress)
    totals = dict.fromkeys(quantized_linears(reference), 0.0)
    autocast = torch.autocast(reference.device.type, enabled=False)
    with (
        evaluating(reference),
        autocast,
        torch.enable_grad(),
        _recomputed(reference),
        _exact_weights(reference, policy) as shares,
    ):
        for row in bar:
            logprobs_TV = completion_logits(reference, row)[0].float().log_softmax(dim=-1)
            logprobs_T = logprobs_TV.gather(1, row.labels_BT.T)[:, 0]
            slopes = torch.autograd.grad(
                (logprobs_T * row.mask_BT[0]).sum(), list(shares.values()), allow_unused=True
            )
            for name, slope in zip(shares, slopes, strict=True):
                if slope is not None:  # an expert that no token went to has none
                    totals[name] += float(slope) ** 2 / (2 * len(rows))
    return totals


@contextmanager
def _exact_weights(
    reference: PreTrainedModel, policy: PreTrainedModel
) -> Iterator[dict[str, Tensor]]:
    """Each weight is on the line from the rounded one, at 0, to the exact one, at its share, 1."""
    linears = quantized_linears(reference)
    shares = {
        name: torch.ones((), device=linear.packed.device, requires_grad=True)
        for name, linear in linears.items()
    }
    for name, linear in linears.items():
        between = functools.partial(
            _between,
            linear.dequantized_weight,
            source_weight(policy, reference, name),
            shares[name],
        )
        vars(linear)["dequantized_weight"] = between
    try:
        yield shares
    finally:
        for linear in linears.values():
            del vars(linear)["dequantized_weight"]


def _between(
    rounded: Callable[[torch.dtype], Tensor], exact_OI: Tensor, share: Tensor, dtype: torch.dtype
) -> Tensor:
    with torch.no_grad():
        rounded_OI = rounded(dtype)
        error_OI = exact_OI.float() - rounded_OI.float()
    return rounded_OI + (share * error_OI).to(dtype)  # its slope is summed in float32


@contextmanager
def _recomputed(model: PreTrainedModel) -> Iterator[None]:
    """Decoder layers keep their inputs alone, and run again in the backward pass."""
    with ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.callback(restore_forward, layer, vars(layer).get("forward"))
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        yield


def _single_rows(batch: CompletionBatch) -> Iterator[CompletionBatch]:
    for ids_W, mask_W in zip(batch.input_ids_BW, batch.attention_mask_BW, strict=True):
        yield CompletionBatch(ids_W[None], mask_W[None], batch.num_labels)


def _in_type(
    linear: QuantizedLinear, quantization: QuantizationType, weight: Tensor | None = None
) -> QuantizedLinear:
    """The layer anew in another code; of its own weight if none is given."""
    changed = QuantizedLinear(
        linear.effective_weight(torch.float32) if weight is None else weight,
        linear.bias,
        quantization=quantization,
        block_size=linear.block_size,
        double_quantization=linear.nested_absmax is not None,
    )
    vars(changed)["uses_onednn"] = linear.uses_onednn
    return changed.train(linear.training)
