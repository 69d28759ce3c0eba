"""The frozen reference: how many bytes each kind of it takes, and which kind to choose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from trl_grpo_ext.memory.shape import Matrix, ModelShape

ReferenceKind = Literal["none", "adapter", "resident", "streamed", "quantized"]
Quantization = Literal["nf4", "fp4", "int8"]

BLOCK_SIZES: Final = (64, 128, 256, 512, 1024, 2048, 4096)

NESTED_BLOCK: Final = 256  # [scales] that share one float32: double quantization in QLoRA
TABLE_BLOCK: Final = 64  # [weights] of an embedding in 8 bits that share one bfloat16
STREAMED_LAYERS: Final = 2  # [layers] on the device: one computes while the next one arrives


@dataclass(frozen=True, kw_only=True)
class ReferenceFormat:
    """How a quantized reference stores its weights.

    Attributes:
        quantization: ``"nf4"`` or ``"fp4"`` (4 bits a weight), or ``"int8"``.
        block_size: Weights that share a scale.
        double_quantization: Whether scales are stored in 8 bits, not in float32.
        rank: Of the factors in 16 bits beside each quantized matrix; 0 for none. Layers in 8 bits
            may take these bytes instead.
        bits: That a weight of these matrices takes in the mean, all told, instead of code and
            factors.
        embedding_bits: 8, or ``None`` for embedding and head in the policy's dtype.
    """

    quantization: Quantization = "nf4"
    block_size: int = 64
    double_quantization: bool = True
    rank: int = 0
    bits: float | None = None
    embedding_bits: Literal[8] | None = None

    @property
    def num_bits(self) -> int:
        """Bits of one weight, without its share of a scale."""
        return 8 if self.quantization == "int8" else 4


def usual_rank(quantization: str) -> int:
    """Return the rank whose bytes the defaults of ``ExtGRPOConfig`` take, as layers in 8 bits."""
    return 0 if quantization == "int8" else 32


class ReferenceBytes(NamedTuple):
    """Where a reference lies.

    Attributes:
        device: Bytes on the GPU.
        host: Bytes in host memory.
    """

    device: int
    host: int


def reference_bytes(
    shape: ModelShape,
    *,
    kind: ReferenceKind,
    dtype_bytes: int,
    storage: ReferenceFormat | None = None,
) -> ReferenceBytes:
    """Return the bytes of the reference's weights, whole on one device.

    Args:
        shape: Of the policy.
        kind: ``"adapter"`` is the policy with its adapter switched off, at no memory.
            ``"streamed"`` keeps the decoder layers in host memory and two of them on the device,
            beside what belongs to no layer.
        dtype_bytes: Bytes of a weight that is not quantized.
        storage: Of the quantized kind; ``ReferenceFormat()`` if not given.
    """
    whole = shape.num_parameters * dtype_bytes
    if kind == "resident":
        return ReferenceBytes(whole, 0)
    if kind == "streamed":
        held = shape.outside_layers + STREAMED_LAYERS * shape.largest_layer
        in_layers = shape.num_parameters - shape.outside_layers
        return ReferenceBytes(min(whole, held * dtype_bytes), in_layers * dtype_bytes)
    if kind == "quantized":
        return ReferenceBytes(quantized_bytes(shape, storage or ReferenceFormat(), dtype_bytes), 0)
    return ReferenceBytes(0, 0)


def quantized_bytes(shape: ModelShape, storage: ReferenceFormat, dtype_bytes: int) -> int:
    """Return the bytes of a quantized reference: matrices, embeddings, and the rest."""
    matrices = sum(
        matrix.num_experts * (matrix_bytes(matrix.size, storage) + _factor_bytes(matrix, storage))
        for matrix in shape.matrices
    )
    if storage.bits is not None:
        matrices = math.ceil(shape.num_in_matrices * storage.bits / 8)
    tables = sum(table.size for table in shape.tables)
    kept = shape.num_parameters - shape.num_in_matrices
    if storage.embedding_bits is None:
        return matrices + kept * dtype_bytes
    return matrices + (kept - tables) * dtype_bytes + sum(map(_table_bytes, shape.tables))


def matrix_bytes(num_weights: int, storage: ReferenceFormat | None = None) -> int:
    r"""Return the bytes of a quantized matrix: code, scales, and the levels that they stand for.

    .. math:: \lceil n/2 \rceil + b + 4 \lceil b / 256 \rceil + 1092, \quad b = \lceil n / 64 \rceil

    with the defaults: half a byte a weight, one byte for the scale of each block, one float32 for
    each 256 of those, which makes 4.127 bits a weight, and 273 float32 of tables.

    References:
        Dettmers et al. 2023, QLoRA, section 3 (double quantization), arXiv:2305.14314.

    Example:
        >>> matrix_bytes(64 * 256)
        9544
    """
    storage = storage or ReferenceFormat()
    code = math.ceil(num_weights * storage.num_bits / 8)
    levels = 4 << storage.num_bits  # float32 each
    blocks = math.ceil(num_weights / storage.block_size)
    if not storage.double_quantization:
        return code + levels + 4 * blocks
    nested = 4 * (math.ceil(blocks / NESTED_BLOCK) + 256 + 1)  # scales, levels, offset
    return code + levels + blocks + nested


def _factor_bytes(matrix: Matrix, storage: ReferenceFormat) -> int:
    rank = min(storage.rank, matrix.num_outputs, matrix.num_inputs)
    return 2 * rank * (matrix.num_outputs + matrix.num_inputs)


def _table_bytes(table: Matrix) -> int:
    """Bytes of an embedding in 8 bits; rows that are no whole blocks have one scale."""
    scales = 1 if table.num_inputs % TABLE_BLOCK else table.num_inputs // TABLE_BLOCK
    return table.num_outputs * (table.num_inputs + 2 * scales)


class ReferenceChoice(NamedTuple):
    """Which reference fits, and why.

    Attributes:
        kind: To build.
        reason: One clause, with the numbers (GB of 1e9 bytes) that it was chosen for.
        on_disk: Whether a streamed one is read from disk, because host memory is too small.
        saved: Whether a run that may be resumed has saved it.
    """

    kind: ReferenceKind
    reason: str
    on_disk: bool = False
    saved: bool = False


def choose_reference(
    *,
    parameter_bytes: int,
    streamed_device_bytes: int | None,
    quantized_bytes: int = 0,
    free_device_bytes: int,
    reserved_bytes: int = 0,
    free_host_bytes: int | None = None,
    free_disk_bytes: int | None = None,
    disk_bytes: int | None = None,
    num_shards: int = 1,
    has_adapter: bool = False,
) -> ReferenceChoice:
    """Return the first exact reference that fits: adapter, resident, streamed; else quantized.

    Args:
        parameter_bytes: Of the policy's weights, which an exact copy takes again.
        streamed_device_bytes: What a streamed reference keeps on the device; ``None`` if the model
            cannot be streamed.
        quantized_bytes: What a quantized one keeps there.
        free_device_bytes: Free on the device (the host on a machine without one) at this moment.
        reserved_bytes: What the run will still take of them: optimizer, gradients, activations.
        free_host_bytes: Free in host memory, for this process; ``None`` if the policy computes
            there itself, so that there is nowhere to stream from.
        free_disk_bytes: Free on the disk that layers may be read from; ``None`` for none.
        disk_bytes: What streaming from there writes to it; the policy's if not given.
        num_shards: Devices that a resident copy is split over.
        has_adapter: Whether the policy is an adapter over a frozen model.

    Example:
        >>> gb = 10**9
        >>> choice = choose_reference(
        ...     parameter_bytes=14 * gb,
        ...     streamed_device_bytes=2 * gb,
        ...     free_device_bytes=20 * gb,
        ...     reserved_bytes=10 * gb,
        ...     free_host_bytes=64 * gb,
        ... )
        >>> f"{choice.kind}: {choice.reason}"  # doctest: +NORMALIZE_WHITESPACE
        'streamed: a copy of 14.0 GB does not fit into the 10.0 GB that are left on the device; its
        layers stream from the 64.0 GB free in host memory'
    """
    if has_adapter:
        return ReferenceChoice("adapter", "the policy with its adapter switched off is exact")
    left = max(0, free_device_bytes - reserved_bytes)
    part = -(-parameter_bytes // num_shards)
    copy = f"a copy of {_gb(part)}" if num_shards == 1 else f"a part of {_gb(part)}"
    if part <= left:
        return ReferenceChoice("resident", f"{copy} fits into the {_gb(left)} that are left")
    does_not = f"{copy} does not fit into the {_gb(left)} that are left on the device"
    if streamed_device_bytes is None:
        return ReferenceChoice("quantized", f"{does_not}, and the model cannot be streamed")
    if streamed_device_bytes > left:
        does_not += f", and two layers of it take {_gb(streamed_device_bytes)}"
        if quantized_bytes <= max(left, streamed_device_bytes):
            return ReferenceChoice("quantized", does_not)
        does_not += f", four bits {_gb(quantized_bytes)}"  # nothing fits: the least is best
    if free_host_bytes is not None and parameter_bytes <= free_host_bytes:
        why = f"its layers stream from the {_gb(free_host_bytes)} free in host memory"
        return ReferenceChoice("streamed", f"{does_not}; {why}")
    if free_host_bytes is not None:
        does_not += f", nor into the {_gb(free_host_bytes)} free in host memory"
    if free_disk_bytes is None:
        return ReferenceChoice("quantized", does_not)
    written = parameter_bytes if disk_bytes is None else disk_bytes
    if written <= free_disk_bytes:
        why = f"its layers are read from disk, of which they take {_gb(written)}"
        return ReferenceChoice("streamed", f"{does_not}; {why}", on_disk=True)
    why = f"nor {_gb(written)} of it on disk, where {_gb(free_disk_bytes)} are free"
    return ReferenceChoice("quantized", f"{does_not}, {why}")


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
