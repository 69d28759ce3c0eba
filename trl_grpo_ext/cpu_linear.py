"""Linear layers on a CPU that multiply float32 in oneDNN where torch's default is slower.

torch multiplies float32 matrices in MKL, which leaves out AVX-512 on CPUs that are not Intel's:
there, oneDNN is twice as fast, and on Intel's it is a tenth slower. The operator is the one that
``torch.compile`` puts in the place of a linear layer; it has no derivative, which is here. Results
differ by rounding.

Shapes: ``N`` rows, ``I`` inputs, ``O`` outputs.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 64  # [outputs] a layer below this has nothing to gain


def use_onednn(model: nn.Module) -> int:
    """Make the float32 linear layers of a model on the CPU run in oneDNN, quantized ones as well.

    On a CPU of Intel's they go on in MKL.

    Weights, names and hooks stay; a layer whose ``forward`` somebody replaced is left alone. Doing
    it twice changes nothing.

    Returns:
        How many layers it was.
    """
    if not torch._C._has_mkldnn:
        return 0
    layers = [module for module in model.modules() if _can_run(module)]
    for layer in layers:
        if hasattr(layer, "uses_onednn"):
            vars(layer)["uses_onednn"] = True
        else:
            layer.__class__ = OneDNNLinear
    return len(layers)


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``inputs @ weight.T + bias``, shape ``(..., O)``, in oneDNN if that is faster.

    It is for float32 on a CPU that is not Intel's.

    Args:
        inputs: Shape ``(..., I)``.
        weight: Shape ``(O, I)``.
        bias: Shape ``(O,)`` or ``None``.
    """
    plain = weight.device.type != "cpu" or torch.is_autocast_enabled("cpu") or cpu_is_intels()
    plain = plain or not inputs.numel()  # oneDNN knows no empty matrices
    if plain or inputs.dtype != torch.float32 or weight.dtype != torch.float32:
        return nn.functional.linear(inputs, weight, bias)
    if not torch.is_grad_enabled():
        return _multiply(inputs, weight, bias)
    output: Tensor = _Product.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]
    return output


@functools.cache
def cpu_is_intels() -> bool:
    """Return whether this machine's CPU is Intel's."""
    listing = Path("/proc/cpuinfo")
    text = listing.read_text(errors="replace") if listing.exists() else platform.processor()
    return "GenuineIntel" in text


def _can_run(module: nn.Module) -> bool:
    if hasattr(module, "uses_onednn"):  # a layer of ours, whose weight is made when it is used
        return True
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and len(weight) >= _BLOCK


class OneDNNLinear(nn.Linear):
    """``nn.Linear`` with the same parameters; see the module's docstring."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs @ weight.T + bias``, shape ``(..., O)``."""
        return product(inputs, self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_inputs, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(inputs if of_weight else None, weight if of_inputs else None)
        return _multiply(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        grad_NO = grad.reshape(-1, grad.shape[-1])
        return (
            _multiply(grad, weight.t()) if of_inputs else None,
            _multiply(grad_NO.t(), inputs.reshape(-1, inputs.shape[-1]).t()) if of_weight else None,
            grad_NO.sum(dim=0) if of_bias else None,
        )


def _multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return product
