"""Building the frozen reference from the live policy: no reload, no full-precision copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference.quantized import QuantizationType, QuantizedLinear


@dataclass(frozen=True)
class ReferenceSummary:
    """What a reference holds.

    Attributes:
        num_parameters: Of the whole model, tied ones counted once.
        num_quantized: Those stored in 4 bits.
        num_bytes: Of weights, scales and buffers.
    """

    num_parameters: int
    num_quantized: int
    num_bytes: int

    def __str__(self) -> str:
        share = self.num_quantized / max(self.num_parameters, 1)
        return (
            f"{self.num_parameters / 1e6:.1f}M parameters, "
            f"{share:.0%} in 4 bits, {self.num_bytes / 1e6:.0f} MB"
        )


def build_reference(
    policy: PreTrainedModel,
    *,
    kind: Literal["resident", "quantized"] = "quantized",
    quantization: QuantizationType = "nf4",
    block_size: int = 64,
    double_quantization: bool = True,
    keep_modules: Sequence[str] = (),
) -> PreTrainedModel:
    """Return a frozen copy of the policy as it is now, in evaluation mode.

    The quantized kind stores the weights of the linear layers in 4 bits; embeddings, LM head, norms
    and ``keep_modules`` keep the policy's precision. Layers are quantized one by one, straight from
    the policy's own weights. The policy is not changed.

    Args:
        policy: A causal language model in float32, bfloat16 or float16, on any device; not a PEFT
            model, whose reference is itself with the adapter switched off.
        kind: ``"quantized"`` or ``"resident"`` (a copy in full precision).
        quantization: ``"nf4"`` or ``"fp4"``.
        block_size: Weights that share a scale: 64, 128, ... 4096.
        double_quantization: Whether the scales are quantized as well (4.13 instead of 4.5 bits a
            weight).
        keep_modules: Last parts of the names of linear layers to keep in the policy's precision.

    Returns:
        A model of the policy's class and on its device. None of its parameters requires a gradient.

    Raises:
        ReferenceModelError: ``keep_modules`` names a module that is not there; or the policy is a
            PEFT model, is already quantized, is sharded or not loaded on this process, or has no
            linear layer to quantize.

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
    _check_policy(policy)
    memo: dict[int, nn.Module] = {}
    if kind == "quantized":
        for module, weight in _quantizable(policy, keep_modules):
            # `deepcopy` takes what its memo holds for an object instead of copying it.
            memo[id(module)] = QuantizedLinear(
                weight,
                cast(Tensor | None, module.bias),
                quantization=quantization,
                block_size=block_size,
                double_quantization=double_quantization,
            )
        if not memo:
            raise ReferenceModelError(
                f"{type(policy).__name__} has no linear layer to quantize "
                f"besides its embeddings and `reference_keep_modules`={list(keep_modules)}. "
                "Use `reference: resident`, or keep fewer modules."
            )
    reference = copy.deepcopy(policy, memo)
    # A trainer may have replaced `forward` on the policy itself; the copy starts from its class.
    vars(reference).pop("forward", None)
    for module in reference.modules():
        if "gradient_checkpointing" in vars(module):
            vars(module)["gradient_checkpointing"] = False
    return cast(PreTrainedModel, reference.requires_grad_(False).eval())


def summarize_reference(reference: nn.Module) -> ReferenceSummary:
    """Return how many parameters a reference has, how many in 4 bits, and its bytes."""
    quantized = [module for module in reference.modules() if isinstance(module, QuantizedLinear)]
    num_quantized = sum(module.out_features * module.in_features for module in quantized)
    biases = sum(module.bias.numel() for module in quantized if module.bias is not None)
    parameters = list(reference.parameters())
    num_parameters = sum(parameter.numel() for parameter in parameters) + num_quantized + biases
    tensors = [*parameters, *reference.buffers()]
    return ReferenceSummary(
        num_parameters, num_quantized, sum(t.numel() * t.element_size() for t in tensors)
    )


def _quantizable(
    policy: PreTrainedModel, keep_modules: Sequence[str]
) -> Iterator[tuple[nn.Module, Tensor]]:
    """Linear layers with their weights as ``(out_features, in_features)``."""
    names = {name.rpartition(".")[2] for name, _ in policy.named_modules()}
    if unknown := sorted(set(keep_modules) - names):
        raise ReferenceModelError(
            f"`reference_keep_modules` names {', '.join(unknown)}, but {type(policy).__name__} has "
            f"no such module. Its linear layers are among: {', '.join(_linear_names(policy))}."
        )
    kept = {id(policy.get_output_embeddings())}
    for name, module in policy.named_modules():
        if id(module) in kept or name.rpartition(".")[2] in keep_modules:
            continue
        if isinstance(module, nn.Linear):
            yield module, module.weight
        elif isinstance(module, Conv1D):
            yield module, module.weight.T


def _linear_names(policy: PreTrainedModel) -> list[str]:
    linear = [n for n, module in policy.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return sorted({name.rpartition(".")[2] for name in linear})


def _check_policy(policy: PreTrainedModel) -> None:
    if hasattr(policy, "peft_config"):
        raise ReferenceModelError(
            "The policy is a PEFT model: with its adapter switched off it is its own exact "
            "reference, at no memory. Remove `reference`, or set `reference: auto`."
        )
    if getattr(policy, "is_quantized", False):
        raise ReferenceModelError(
            "The policy is already quantized, "
            "so a reference cannot be built from its weights. Set `reference: auto`."
        )
    if any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
        raise ReferenceModelError(
            "The policy is partitioned by DeepSpeed ZeRO-3: no process holds its weights. "
            "Set `reference: auto`, or use FSDP2 or ZeRO-2 with this reference."
        )
    if any(parameter.device == torch.device("meta") for parameter in policy.parameters()):
        raise ReferenceModelError(
            "This process holds no weights of the policy (meta device). "
            "Set `fsdp_cpu_ram_efficient_loading: false` in the "
            "accelerate configuration, or `reference: auto`."
        )
