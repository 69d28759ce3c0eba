"""The experts of a mixture, quantized one by one and dequantized where they are used.

transformers keeps the weights of all experts of a layer in one parameter, ``(E, out, in)``, or
``(E, in, out)`` in modules that it marks as transposed. Its eager forward pass reads them as
``self.gate_up_proj[expert]``, for the experts that a token was sent to. A :class:`QuantizedExperts`
in the place of the parameter answers that with the weight of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_grpo_ext.reference.quantized import QuantizationType, QuantizedLinear, compute_dtype

_LARGE = 0.05  # share of a model's parameters


class QuantizedExperts(nn.Module):
    """What stands for a parameter with the weights of all experts.

    Args:
        weights: Shape ``(E, out_features, in_features)``, any floating dtype; read, not kept.
        transposed: Whether it is ``(E, in_features, out_features)`` instead.
        quantization: As for a :class:`~trl_grpo_ext.reference.QuantizedLinear`, with its other two.
        block_size: Weights that share a scale.
        double_quantization: Whether the scales are stored in 8 bits.

    Attributes:
        layers: One :class:`~trl_grpo_ext.reference.QuantizedLinear` an expert. Low-rank factors
            set there are part of the weight.

    Example:
        >>> import torch
        >>> weights = torch.randn(4, 32, 64)
        >>> experts = QuantizedExperts(weights)
        >>> experts[2].shape
        torch.Size([32, 64])
        >>> bool((experts[2] - weights[2]).norm() < 0.2 * weights[2].norm())
        True
    """

    like: Tensor  # holds nothing; its dtype is the model's

    def __init__(
        self,
        weights: Tensor,
        *,
        transposed: bool = False,
        quantization: QuantizationType = "nf4",
        block_size: int = 64,
        double_quantization: bool = True,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.layers = nn.ModuleList(
            QuantizedLinear(
                weight.T if transposed else weight,
                quantization=quantization,
                block_size=block_size,
                double_quantization=double_quantization,
            )
            for weight in weights.detach()
        )
        self.register_buffer("like", weights.detach().new_empty(0), persistent=False)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """Return the weight of one expert as the parameter would: in its shape and dtype.

        Under autocast it is in the dtype that autocast would cast it to.
        """
        layer = cast(QuantizedLinear, self.layers[int(expert)])
        weight = layer.effective_weight(compute_dtype(self.like.device, self.like.dtype))
        return weight.T if self.transposed else weight


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Return the weights of experts in a model: full name, parameter, whether it is transposed.

    They are the three-dimensional parameters of modules that transformers' interface for experts
    (``use_experts_implementation``) has marked.
    """
    for prefix, module in model.named_modules():
        if not {"has_gate", "is_transposed"} <= vars(module).keys():
            continue
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if parameter.dim() == 3 and parameter.is_floating_point():
                yield name, parameter, bool(module.is_transposed)


def unknown_experts(reference: nn.Module) -> list[str]:
    """Return the names of large 3-D parameters, which a quantized reference keeps as they are."""
    num_parameters = sum(parameter.numel() for parameter in reference.parameters())
    return [
        name
        for name, parameter in reference.named_parameters()
        if parameter.dim() == 3 and parameter.numel() > _LARGE * num_parameters
    ]


def stand_in(model: PreTrainedModel, experts: Mapping[str, QuantizedExperts]) -> None:
    """Put each of these in the place of the parameter of its name, and compute experts eagerly."""
    for name, quantized in experts.items():
        prefix, _, attribute = name.rpartition(".")
        module = model.get_submodule(prefix)
        delattr(module, attribute)
        setattr(module, attribute, quantized)
    if experts:
        model.set_experts_implementation("eager")
