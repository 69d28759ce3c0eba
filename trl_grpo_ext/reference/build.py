"""Building the frozen reference from the live policy: no reload, no full-precision copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference.embeddings import (
    QuantizedHead,
    QuantizedTable,
    quantized_embeddings,
    untie,
)
from trl_grpo_ext.reference.experts import QuantizedExperts, expert_parameters, stand_in
from trl_grpo_ext.reference.frozen import check_policy, frozen_copy
from trl_grpo_ext.reference.quantized import (
    QuantizationType,
    QuantizedLinear,
    check_device,
    check_rank,
)

EmbeddingQuantization = Literal["int8"]


@dataclass(frozen=True)
class ReferenceSummary:
    """What a reference holds.

    Attributes:
        num_parameters: Of the whole model, tied ones counted once.
        num_quantized: Those stored in 4 or 8 bits.
        num_bytes: Of weights, scales and buffers of the whole model.
        quantized_bytes: What the quantized weights take, with scales and low-rank factors.

    Example:
        >>> summary = ReferenceSummary(
        ...     num_parameters=1000, num_quantized=800, num_bytes=850, quantized_bytes=450
        ... )
        >>> summary.bits_per_weight, summary.quantized_to_bfloat16, summary.model_to_bfloat16
        (4.5, 0.28125, 0.425)
    """

    num_parameters: int
    num_quantized: int
    num_bytes: int
    quantized_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits that a quantized weight takes; 0 where nothing is quantized."""
        return 8 * self.quantized_bytes / max(self.num_quantized, 1)

    @property
    def quantized_to_bfloat16(self) -> float:
        """Bytes of the quantized weights over their bytes in bfloat16."""
        return self.bits_per_weight / 16

    @property
    def model_to_bfloat16(self) -> float:
        """Bytes of the whole model over those of its parameters in bfloat16."""
        return self.num_bytes / max(2 * self.num_parameters, 1)

    def __str__(self) -> str:
        quantized = "none quantized"
        if self.num_quantized:
            quantized = (
                f"{self.num_quantized / self.num_parameters:.0%} in {self.bits_per_weight:.2f} "
                f"bits ({self.quantized_to_bfloat16:.0%} of bfloat16)"
            )
        return (
            f"{self.num_parameters / 1e6:.1f}M parameters, {quantized}, "
            f"{self.num_bytes / 1e6:.0f} MB ({self.model_to_bfloat16:.0%} of bfloat16)"
        )


def build_reference(
    policy: PreTrainedModel,
    *,
    kind: Literal["resident", "quantized"] = "quantized",
    quantization: QuantizationType = "nf4",
    block_size: int = 64,
    double_quantization: bool = True,
    embedding_quantization: EmbeddingQuantization | None = None,
    keep_modules: Sequence[str] = (),
) -> PreTrainedModel:
    """Return a frozen copy of the policy as it is now, in evaluation mode.

    The quantized kind stores the weights of the linear layers, and of the experts of a mixture, in
    4 or 8 bits; norms and ``keep_modules`` keep the policy's precision, as embeddings and LM head
    do without ``embedding_quantization``. Layers are quantized one by one, experts each alone,
    straight from the policy's own weights. The policy is not changed.

    Args:
        policy: A causal language model in float32, bfloat16 or float16, on any device that
            bitsandbytes supports; not a PEFT model, whose reference is itself with the adapter
            switched off.
        kind: ``"quantized"`` or ``"resident"`` (a copy in full precision).
        quantization: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        block_size: Weights that share a scale: 64, 128, ... 4096.
        double_quantization: Whether the scales are quantized as well (4.13 instead of 4.5 bits a
            weight).
        embedding_quantization: ``"int8"`` to store input embedding and LM head in 8.25 bits a
            weight; tied ones are stored once. While the head is used, its weight is there in full.
        keep_modules: Names to keep in the policy's precision, with everything in them, such as
            ``"down_proj"``, ``"self_attn"`` or ``"experts"``.

    Returns:
        A model of the policy's class and on its device. None of its parameters requires a gradient.
        Experts are computed eagerly, one by one.

    Raises:
        ReferenceModelError: bitsandbytes is missing or does not support the device;
            ``keep_modules`` names a module that is not there; or the policy is a PEFT model, is
            already quantized, is sharded or not loaded on this process, has nothing to quantize, or
            has embeddings of an unknown kind.

    References:
        Dettmers et al. 2023, QLoRA, arXiv:2305.14314.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=16,
        ...     hidden_size=64,
        ...     intermediate_size=64,
        ...     num_hidden_layers=1,
        ...     num_attention_heads=2,
        ... )
        >>> reference = build_reference(LlamaForCausalLM(config))
        >>> type(reference.model.layers[0].mlp.up_proj).__name__
        'QuantizedLinear'
    """
    check_policy(policy)
    if kind == "resident":
        return frozen_copy(policy, {})
    check_device({parameter.device.type for parameter in policy.parameters()})
    _check_keep_modules(policy, keep_modules)
    options: dict[str, Any] = {
        "quantization": quantization,
        "block_size": block_size,
        "double_quantization": double_quantization,
    }
    # `deepcopy` takes what its memo holds for an object instead of copying it.
    memo: dict[int, Any] = {
        id(module): QuantizedLinear(weight, cast(Tensor | None, module.bias), **options)
        for module, weight in _linear_layers(policy, keep_modules)
    }
    experts = {
        name: QuantizedExperts(parameter, transposed=transposed, **options)
        for name, parameter, transposed in expert_parameters(policy)
        if not _is_kept(name, keep_modules)
    }
    memo |= {id(policy.get_parameter(name)): nn.Parameter(torch.empty(0)) for name in experts}
    if not memo:
        raise ReferenceModelError(
            f"{type(policy).__name__} has no linear layer to quantize "
            f"besides its embeddings and `reference_keep_modules`={list(keep_modules)}. "
            "Use `reference: resident`, or keep fewer modules."
        )
    if embedding_quantization is not None:
        memo |= quantized_embeddings(_embeddings(policy, keep_modules))
    reference = frozen_copy(policy, memo)
    stand_in(reference, experts)
    if embedding_quantization is not None:
        untie(reference)
    return reference


def check_options(
    policy: PreTrainedModel, *, keep_modules: Sequence[str] = (), rank: int = 0
) -> None:
    """Refuse what a model has not: modules to keep, and layers of this rank.

    Args:
        policy: Perhaps without weights, on torch's meta device.
        keep_modules: As for :func:`build_reference`.
        rank: Of the low-rank factors; 0 for none.

    Raises:
        ReferenceModelError: ``keep_modules`` names a module that is not there, or ``rank`` is
            larger than a layer.
    """
    _check_keep_modules(policy, keep_modules)
    names = {module: name for name, module in policy.named_modules()}
    for module, weight in _linear_layers(policy, keep_modules):
        check_rank(rank, names[module], *weight.shape)
    for name, parameter, _ in expert_parameters(policy):
        if not _is_kept(name, keep_modules):
            check_rank(rank, name, *parameter.shape[1:])


def summarize_reference(reference: nn.Module) -> ReferenceSummary:
    """Return how many parameters a reference has, how many are quantized, and its bytes."""
    modules = list(reference.modules())
    quantized = [m for m in modules if isinstance(m, QuantizedLinear | QuantizedTable)]
    with_bias = [m for m in modules if isinstance(m, QuantizedLinear | QuantizedHead)]
    num_quantized = sum(module.num_weights for module in quantized)
    parameters = list(reference.parameters())
    return ReferenceSummary(
        num_parameters=num_quantized
        + sum(parameter.numel() for parameter in parameters)
        + sum(module.bias.numel() for module in with_bias if module.bias is not None),
        num_quantized=num_quantized,
        num_bytes=sum(tensor.nbytes for tensor in [*parameters, *reference.buffers()]),
        quantized_bytes=sum(module.num_bytes for module in quantized),
    )


def _linear_layers(
    policy: PreTrainedModel, keep_modules: Sequence[str]
) -> Iterator[tuple[nn.Module, Tensor]]:
    """Linear layers but the LM head with their weights as ``(out_features, in_features)``."""
    head = policy.get_output_embeddings()
    for name, module in policy.named_modules():
        if module is head or _is_kept(name, keep_modules):
            continue
        if isinstance(module, nn.Linear):
            yield module, module.weight
        elif isinstance(module, Conv1D):
            yield module, module.weight.T


def _embeddings(policy: PreTrainedModel, keep_modules: Sequence[str]) -> Iterator[nn.Module]:
    modules = [policy.get_input_embeddings(), policy.get_output_embeddings()]
    for name, module in policy.named_modules():
        if any(module is other for other in modules) and not _is_kept(name, keep_modules):
            yield module


def _is_kept(name: str, keep_modules: Sequence[str]) -> bool:
    return not set(keep_modules).isdisjoint(name.split("."))


def _check_keep_modules(policy: PreTrainedModel, keep_modules: Sequence[str]) -> None:
    modules = list(policy.named_modules())
    layers = {name for name, module in modules if isinstance(module, nn.Linear | Conv1D)}
    layers |= {name for name, _, _ in expert_parameters(policy)}
    last = {name.rpartition(".")[2] for name in layers}
    names = last | {name.rpartition(".")[2] for name, _ in modules}
    if unknown := sorted(set(keep_modules) - names):
        raise ReferenceModelError(
            f"`reference_keep_modules` names {', '.join(map(repr, unknown))}, but "
            f"{type(policy).__name__} has no such module. Its linear layers are "
            f"among: {', '.join(sorted(last))}."
        )
