"""A linear layer whose frozen weight is stored in 4 or 8 bits, in blocks that share a scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from trl_grpo_ext.cpu_linear import product
from trl_grpo_ext.errors import ReferenceModelError

QuantizationType = Literal["nf4", "fp4", "int8"]

NESTED_BLOCK_SIZE = 256  # scales that share a scale of their own


def bitsandbytes_functional() -> ModuleType:
    """Return ``bitsandbytes.functional``, which has the kernels of the codes.

    Raises:
        ReferenceModelError: bitsandbytes cannot be imported.
    """
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ReferenceModelError(
            f"bitsandbytes cannot be imported ({error}), and a quantized reference needs its "
            "kernels. Run `pip install bitsandbytes`, or set `reference: streamed`."
        ) from error
    return bitsandbytes.functional


def check_device(types: Iterable[str]) -> None:
    """Refuse device types that bitsandbytes has no kernels for.

    Raises:
        ReferenceModelError: one of them is not supported, or bitsandbytes cannot be imported.
    """
    bitsandbytes_functional()
    from bitsandbytes import supported_torch_devices as supported

    if unsupported := sorted(set(types) - supported):
        raise ReferenceModelError(
            f"The policy is on {', '.join(unsupported)}, where bitsandbytes has no kernels (it has "
            f"them for {', '.join(sorted(supported))}), so its weights cannot be quantized there. "
            "Use `reference: resident` or `reference: streamed`."
        )


def check_rank(rank: int, name: str, out_features: int, in_features: int) -> None:
    """Refuse factors of a rank that a layer does not have.

    Raises:
        ReferenceModelError: ``rank`` is larger than the layer.
    """
    limit = min(out_features, in_features)
    if rank > limit:
        raise ReferenceModelError(
            f"`reference_rank` is {rank}, but {name} is a layer of {out_features} x {in_features}: "
            f"a rank above {limit} adds nothing. Set `reference_rank` to at most {limit}, or name "
            "the layer in `reference_keep_modules`."
        )


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a layer computes: of autocast if that is on, else ``dtype``."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


class FrozenBuffers(nn.Module):
    """A module whose buffers follow the model to a device, but keep their dtype.

    Everything is stored as buffers: an optimizer never sees them, FSDP leaves them whole on each
    process, and a change of the model's dtype rounds no scale.
    """

    def _apply(
        self,
        fn: Callable[[Tensor], Tensor],
        recurse: bool = True,  # noqa: FBT001, FBT002 - torch's signature
    ) -> Self:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self


class QuantizedLinear(FrozenBuffers):
    r"""A frozen linear layer with its weight in a blockwise code, dequantized for each use.

    .. math:: y = x (W_q + B A)^T + b

    ``A`` and ``B`` are low-rank factors in 16 bits that make up for a part of what the code lost
    (:meth:`set_low_rank`); a fresh layer has none.

    Args:
        weight: Shape ``(out_features, in_features)``, any floating dtype; it is read, not kept.
        bias: Shape ``(out_features,)`` or ``None``; copied.
        quantization: ``"nf4"`` or ``"fp4"`` (16 levels, 4 bits), or ``"int8"``: the 255 levels
            ``-127/127 ... 127/127``. On weights these are 1.5 times as precise as the dynamic
            8-bit code of bitsandbytes.
        block_size: Weights that share a scale, counted over the flattened weight.
        double_quantization: Whether the scales are stored in 8 bits, in blocks of 256: 0.13 bits
            a weight for blocks of 64, instead of 0.5.

    Attributes:
        levels: The values of the code between -1 and 1 by its index, shape ``(16,)`` or ``(256,)``,
            float32. ``int8`` has two indices for 0.

    Raises:
        ReferenceModelError: bitsandbytes cannot be imported.

    References:
        Dettmers et al. 2023, QLoRA, section 3, arXiv:2305.14314. Low-rank factors: Yao et al. 2023,
        ZeroQuant-V2, section 5, arXiv:2303.08302.

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
    levels: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    nested_offset: Tensor | None
    factor_in: Tensor | None
    factor_out: Tensor | None
    bias: Tensor | None
    uses_onednn = False  # see trl_grpo_ext.cpu_linear

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
        packed, absmax, levels = _quantize(weight.detach().contiguous(), quantization, block_size)
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)
        self.register_buffer("levels", levels)
        for name in ("nested_absmax", "nested_code", "nested_offset", "factor_in", "factor_out"):
            self.register_buffer(name, None)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        if double_quantization:
            self._quantize_scales()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``inputs @ weight.T + bias``, in the autocast dtype if on, else the inputs'."""
        dtype = compute_dtype(inputs.device, inputs.dtype)
        inputs = inputs.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        multiply = product if self.uses_onednn else nn.functional.linear
        outputs = multiply(inputs, self.dequantized_weight(dtype), bias)
        if self.factor_in is None or self.factor_out is None:
            return outputs
        inner = multiply(inputs, self.factor_in.to(dtype))
        return outputs + multiply(inner, self.factor_out.to(dtype))

    def dequantized_weight(self, dtype: torch.dtype) -> Tensor:
        """Return what the code stands for, without low-rank factors: ``levels[codes] * scales``.

        Returns:
            Shape ``(out_features, in_features)``; the product in float32, rounded to ``dtype``.
        """
        kernels = bitsandbytes_functional()
        state = kernels.QuantState(
            absmax=self.scales(),
            shape=self._aligned_shape(),
            code=self.levels,
            blocksize=self.block_size,
            quant_type=self.quantization,
            dtype=dtype,
        )
        dequantize = kernels.dequantize_4bit if self.num_bits == 4 else kernels.dequantize_blockwise
        weight: Tensor = dequantize(self.packed, state)
        return weight.view(self.out_features, self.in_features)

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that the layer multiplies with: dequantized, plus low rank."""
        if not self.has_low_rank:
            return self.dequantized_weight(dtype)
        return self.dequantized_weight(torch.float32).add_(self.low_rank_weight()).to(dtype)

    def low_rank_weight(self) -> Tensor:
        """Return the product of the factors, which it must have: float32, as the weight."""
        assert self.factor_in is not None
        assert self.factor_out is not None
        return self.factor_out.float() @ self.factor_in.float()

    def scales(self) -> Tensor:
        """Return the scale of each block as the kernel applies it, the second rounding undone.

        Returns:
            Float32, shape ``(num_blocks,)``, in the order of the flattened weight; the last block
            may be shorter than ``block_size``.
        """
        if self.nested_absmax is None or self.nested_offset is None:
            return self.absmax
        kernels = bitsandbytes_functional()
        state = kernels.QuantState(
            absmax=self.nested_absmax,
            code=self.nested_code,
            blocksize=NESTED_BLOCK_SIZE,
            dtype=torch.float32,
        )
        scales: Tensor = kernels.dequantize_blockwise(self.absmax, state)
        return scales.add_(self.nested_offset)

    def codes(self) -> Tensor:
        """Return the index into ``levels`` of each weight: uint8, ``(out_features, in_features)``.

        Two 4-bit indices share a byte, the first one in its upper half.
        """
        if self.num_bits == 8:
            return self.packed.clone()
        pairs = torch.cat([self.packed.view(-1, 1) >> 4, self.packed.view(-1, 1) & 15], dim=1)
        return pairs.flatten()[: self.num_weights].view(self.out_features, self.in_features)

    @torch.no_grad()
    def set_codes(self, codes_OI: Tensor) -> None:
        """Replace the index of each weight and keep the scales; the inverse of :meth:`codes`.

        Args:
            codes_OI: Shape ``(out_features, in_features)``, integers below ``len(levels)``.
        """
        assert codes_OI.shape == (self.out_features, self.in_features)
        assert int(codes_OI.min()) >= 0
        assert int(codes_OI.max()) < len(self.levels)
        codes = codes_OI.to(self.packed.device, torch.uint8)
        if self.num_bits == 4:
            pairs = nn.functional.pad(codes.flatten(), (0, codes.numel() % 2)).view(-1, 2)
            codes = (pairs[:, 0] << 4) | pairs[:, 1]
        self.packed.copy_(codes.reshape(self.packed.shape))

    @torch.no_grad()
    def set_low_rank(self, factor_in: Tensor, factor_out: Tensor) -> None:
        """Add ``factor_out @ factor_in`` to the weight, stored in 16 bits.

        Each factor is kept in float16 or bfloat16, whichever rounds it less: float16 has three
        bits more, bfloat16 also has values above 65504 and far below 6e-5.

        Args:
            factor_in: Shape ``(rank, in_features)``.
            factor_out: Shape ``(out_features, rank)``.

        Raises:
            ReferenceModelError: the factors do not fit the layer, or have more rows than it.
        """
        rank, limit = len(factor_in), min(self.out_features, self.in_features)
        fitting = [(rank, self.in_features), (self.out_features, rank)]
        if [factor_in.shape, factor_out.shape] != fitting or not 1 <= rank <= limit:
            raise ReferenceModelError(
                f"Low-rank factors of shapes {tuple(factor_in.shape)} and "
                f"{tuple(factor_out.shape)} do not fit a layer of {self.out_features} x "
                f"{self.in_features}, where a rank above {limit} adds nothing. "
                f"Set `reference_rank` to at most {limit}, or keep this layer unquantized "
                "(`reference_keep_modules`)."
            )
        self.factor_in = _in_16_bits(factor_in).to(self.packed.device)
        self.factor_out = _in_16_bits(factor_out).to(self.packed.device)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this layer."""
        rank = "" if self.factor_in is None else f", rank={len(self.factor_in)}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"quantization={self.quantization}, block_size={self.block_size}, "
            f"double_quantization={self.nested_absmax is not None}{rank}"
        )

    @property
    def has_low_rank(self) -> bool:
        """Whether it has low-rank factors."""
        return self.factor_in is not None

    @property
    def num_bits(self) -> int:
        """Bits of an index of the code: 4 or 8."""
        return 8 if self.quantization == "int8" else 4

    @property
    def num_weights(self) -> int:
        """Weights that the code stands for."""
        return self.out_features * self.in_features

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored weight with its scales and factors, without the bias."""
        return sum(buffer.nbytes for name, buffer in self.named_buffers() if name != "bias")

    def _quantize_scales(self) -> None:
        kernels, offset = bitsandbytes_functional(), self.absmax.mean()
        self.absmax, state = kernels.quantize_blockwise(
            self.absmax - offset, blocksize=NESTED_BLOCK_SIZE
        )
        self.nested_absmax, self.nested_code = state.absmax, state.code
        self.nested_offset = offset

    def _aligned_shape(self) -> torch.Size:
        """The shape to dequantize 4 bits in: rows must hold whole blocks.

        Workaround, bitsandbytes 0.49 to 0.50 on a CPU with AVX-512: its kernel looks up the scales
        row by row (``absmax_dim_1 = n / blocksize``), which gives a wrong weight, without an error,
        where a block goes across the end of a row. One long row has no such block. The kernel of 8
        bits counts blocks over the flattened weight.
        https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/csrc/cpu_ops.cpp
        Remove when the AVX-512 branch there counts blocks over the flattened weight.
        """
        if self.in_features % self.block_size == 0:
            return torch.Size((self.out_features, self.in_features))
        return torch.Size((self.num_weights,))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Make room for low-rank factors that are saved: a fresh layer has none."""
        for name in ("factor_in", "factor_out"):
            saved = state_dict.get(prefix + name)
            if saved is not None:
                self._buffers[name] = torch.empty_like(saved, device=self.packed.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _quantize(
    weight: Tensor, quantization: QuantizationType, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The packed code, the scale of each block and the levels of the code."""
    kernels = bitsandbytes_functional()
    if quantization == "int8":
        steps = torch.cat([torch.arange(-127, 1), torch.arange(128)])  # 256 levels: 0 twice
        packed, state = kernels.quantize_blockwise(
            weight, code=(steps / 127).to(weight.device), blocksize=block_size
        )
    else:
        packed, state = kernels.quantize_4bit(weight, blocksize=block_size, quant_type=quantization)
    return packed, state.absmax, state.code


def _in_16_bits(factor: Tensor) -> Tensor:
    factor = factor.detach().float()
    rounded = [factor.to(dtype) for dtype in (torch.float16, torch.bfloat16)]
    return min(rounded, key=lambda copy: float((copy.float() - factor).norm())).contiguous()
