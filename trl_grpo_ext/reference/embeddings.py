"""Input embedding and LM head in 8 bits: the rows of a table, dequantized where they are used.

Shapes: ``V`` vocabulary, ``H`` hidden size, ``K`` blocks in a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference.quantized import FrozenBuffers, compute_dtype

_BLOCK_SIZE = 64  # weights of a row that share a scale
_ROWS = 4096  # rows quantized at a time, which limits the memory for it


class QuantizedTable(FrozenBuffers):
    """A matrix ``(V, H)`` in 8 bits, with a bfloat16 scale for 64 weights of a row.

    Rows whose length is not a multiple of 64 have one scale. A weight is at most half a step, 1/254
    of the largest of its block, from what it was.

    Args:
        weight_VH: Any floating dtype; read, not kept.
    """

    codes_VH: Tensor
    scales_VK: Tensor

    def __init__(self, weight_VH: Tensor) -> None:
        super().__init__()
        self.num_rows, self.row_length = weight_VH.shape
        parts = [_quantized_rows(rows) for rows in torch.split(weight_VH.detach(), _ROWS)]
        codes, scales = zip(*parts, strict=True)
        self.register_buffer("codes_VH", torch.cat(codes))
        self.register_buffer("scales_VK", torch.cat(scales))

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows of an index of any shape, ``(*index.shape, H)``."""
        return _dequantized(self.codes_VH[index], self.scales_VK[index], dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the whole matrix, ``(V, H)``."""
        return _dequantized(self.codes_VH, self.scales_VK, dtype)

    @property
    def num_weights(self) -> int:
        """Weights of the matrix."""
        return self.codes_VH.numel()

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales: 8.25 bits a weight."""
        return self.codes_VH.nbytes + self.scales_VK.nbytes


class _WithTable(nn.Module):
    """What embedding and head have in common; ``like`` holds nothing, its dtype is the model's."""

    like: Tensor

    def __init__(self, table: QuantizedTable, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = table
        like = torch.empty(0, dtype=dtype, device=table.codes_VH.device)
        self.register_buffer("like", like, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The whole matrix in the model's dtype, dequantized each time that it is read."""
        return self.table.weight(self.like.dtype)


class QuantizedEmbedding(_WithTable):
    """A frozen ``nn.Embedding`` that dequantizes the rows that it looks up.

    Example:
        >>> ordinary = nn.Embedding(10, 64)
        >>> table = QuantizedTable(ordinary.weight)
        >>> embedding = QuantizedEmbedding(table, torch.float32)
        >>> ids = torch.tensor([[3, 1, 4]])
        >>> torch.allclose(embedding(ids), ordinary(ids), atol=0.02)
        True
    """

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of the ids in the model's dtype, ``(*ids.shape, H)``."""
        return self.table.rows(ids, self.like.dtype)


class QuantizedHead(_WithTable):
    """A frozen LM head; it may share its table with the embedding.

    TRL's fused LM head does not call it, but multiplies with its :attr:`weight`.
    """

    bias: Tensor | None

    def __init__(self, table: QuantizedTable, dtype: torch.dtype, bias: Tensor | None) -> None:
        super().__init__(table, dtype)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, in the autocast dtype if on, else the inputs'."""
        dtype = compute_dtype(inputs.device, inputs.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(inputs.to(dtype), self.table.weight(dtype), bias)


def quantized_embeddings(modules: Iterable[nn.Module]) -> dict[int, nn.Module]:
    """Return input embedding and LM head in 8 bits, by the ``id`` of what each stands for.

    Those that share their weight share a table.

    Raises:
        ReferenceModelError: one of them is of a kind that may do more than look up or multiply.
    """
    tables: dict[int, QuantizedTable] = {}
    quantized: dict[int, nn.Module] = {}
    for module in modules:
        plain = type(module) is nn.Embedding and module.max_norm is None
        if not plain and not isinstance(module, nn.Linear):
            raise ReferenceModelError(
                f"The policy has a {type(module).__name__}, which may do more than look up rows or "
                "multiply, so in 8 bits it might be another model. "
                "Remove `reference_embedding_quantization`."
            )
        weight = cast(Tensor, module.weight)
        if id(weight) not in tables:
            tables[id(weight)] = QuantizedTable(weight)
        table = tables[id(weight)]
        if isinstance(module, nn.Linear):
            quantized[id(module)] = QuantizedHead(
                table, weight.dtype, cast(Tensor | None, module.bias)
            )
        else:
            quantized[id(module)] = QuantizedEmbedding(table, weight.dtype)
    return quantized


def untie(model: PreTrainedModel) -> None:
    """Tell a model whose embeddings are quantized that it has no parameters to tie.

    Tied ones share their table; ``tie_weights``, which FSDP calls, would look for a parameter.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.tie_word_embeddings = False
            module.all_tied_weights_keys = {}


def _quantized_rows(rows_RH: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of these rows for their scales after rounding, so that this rounding adds no error."""
    row_length = rows_RH.shape[1]
    size = row_length if row_length % _BLOCK_SIZE else _BLOCK_SIZE
    blocks_RKB = rows_RH.float().reshape(len(rows_RH), -1, size)
    scales_RK = (blocks_RKB.abs().amax(dim=2) / 127).bfloat16()
    steps_RK1 = scales_RK.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    codes_RKB = (blocks_RKB / steps_RK1).round_().clamp_(-127, 127)
    return codes_RKB.to(torch.int8).flatten(1), scales_RK


def _dequantized(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    # float16 cannot hold every scale: the product is then made in float32.
    wide = torch.promote_types(dtype, scales.dtype)
    blocks = codes.to(wide).view(*scales.shape, -1)
    return blocks.mul(scales.to(wide)[..., None]).flatten(-2).to(dtype)
