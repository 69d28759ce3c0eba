"""A linear layer whose frozen weight is stored in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

QuantizationType = Literal["nf4", "fp4"]


class QuantizedLinear(nn.Module):
    """A frozen linear layer with its weight in blockwise 4-bit code, dequantized for each use.

    Everything is stored as buffers: an optimizer never sees them, FSDP leaves them whole on each
    process, and a change of the module's dtype leaves them as they are, so that no scale is
    rounded.

    Args:
        weight: Shape ``(out_features, in_features)``, any floating dtype; it is read, not kept.
        bias: Shape ``(out_features,)`` or ``None``; copied.
        quantization: ``"nf4"`` or ``"fp4"``.
        block_size: Weights that share a scale.
        double_quantization: Whether the scales are stored in 8 bits, in blocks of 256.

    References:
        Dettmers et al. 2023, QLoRA, section 3, arXiv:2305.14314.

    Example:
        >>> layer = nn.Linear(512, 256)
        >>> quantized = QuantizedLinear(layer.weight, layer.bias)
        >>> quantized(torch.ones(2, 512)).shape
        torch.Size([2, 256])
        >>> layer.weight.nbytes, quantized.num_bytes
        (524288, 68708)
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    nested_offset: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        quantization: QuantizationType = "nf4",
        block_size: int = 64,
        double_quantization: bool = True,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.quantization, self.block_size = quantization, block_size
        with torch.no_grad():
            packed, state = bnb.quantize_4bit(
                weight.detach().contiguous(),
                blocksize=block_size,
                quant_type=quantization,
                compress_statistics=double_quantization,
            )
        nested = state.state2
        self.nested_block_size = nested.blocksize if nested else 0
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("code", state.code)
        self.register_buffer("nested_absmax", nested.absmax if nested else None)
        self.register_buffer("nested_code", nested.code if nested else None)
        self.register_buffer("nested_offset", state.offset if nested else None)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def dequantized_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that the code stands for, shape ``(out_features, in_features)``."""
        weight = bnb.dequantize_4bit(self.packed, self._quant_state(dtype))
        return weight.view(self.out_features, self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs @ weight.T + bias``, in the autocast dtype if on, else the inputs'."""
        device = inputs.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else inputs.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(inputs.to(dtype), self.dequantized_weight(dtype), bias)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"quantization={self.quantization}, block_size={self.block_size}, "
            f"double_quantization={self.nested_absmax is not None}"
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored weight with its scales, without the bias."""
        stored = [buffer for name, buffer in self.named_buffers() if name != "bias"]
        return sum(buffer.numel() * buffer.element_size() for buffer in stored)

    def _quant_state(self, dtype: torch.dtype) -> bnb.QuantState:
        nested = None
        if self.nested_absmax is not None:
            nested = bnb.QuantState(
                absmax=self.nested_absmax,
                code=self.nested_code,
                blocksize=self.nested_block_size,
                dtype=torch.float32,
            )
        return bnb.QuantState(
            absmax=self.absmax,
            shape=self._aligned_shape(),
            code=self.code,
            blocksize=self.block_size,
            quant_type=self.quantization,
            dtype=dtype,
            offset=self.nested_offset,
            state2=nested,
        )

    def _aligned_shape(self) -> torch.Size:
        """The shape to dequantize in: rows must hold whole blocks.

        Workaround, bitsandbytes 0.49 to 0.50 on a CPU with AVX-512: its kernel looks up the scales
        row by row (``absmax_dim_1 = n / blocksize``), which gives a wrong weight, without an error,
        where a block goes across the end of a row. One long row has no such block.
        https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/csrc/cpu_ops.cpp
        Remove when the AVX-512 branch there counts blocks over the flattened weight.
        """
        if self.in_features % self.block_size == 0:
            return torch.Size((self.out_features, self.in_features))
        return torch.Size((self.out_features * self.in_features,))

    def _apply(
        self,
        fn: Callable[[Tensor], Tensor],
        recurse: bool = True,  # noqa: FBT001, FBT002 - torch's signature
    ) -> QuantizedLinear:
        """Follow the model to a device, but keep every dtype: rounded scales change weights."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self
