"""The memory planner: what a run will need on one device, from the model's configuration alone.

Parameters are counted on torch's meta device, so nothing is allocated and no weight is read. The
estimate is for one process that holds the whole model (no FSDP, no ZeRO). It leaves out what the
CUDA context (about 0.5 GiB) and the fragmentation of the allocator take: plan with a tenth to
spare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ReferenceKind = Literal["none", "resident", "quantized"]
Phase = Literal["always", "generation", "update"]

NF4_BLOCK = 64  # [weights] that share one absmax: the default of bitsandbytes
NF4_NESTED_BLOCK = 256  # [absmax values] that share one float32: double quantization in QLoRA
GIB: Final = 2**30

# Each part's title and the phase of a step in which it is held.
PARTS: Final[Mapping[str, tuple[str, Phase]]] = {
    "weights": ("policy weights", "always"),
    "reference": ("reference weights", "always"),
    "optimizer": ("AdamW moments", "always"),
    "kv_cache": ("key-value cache", "generation"),
    "gradients": ("gradients", "update"),
    "activations": ("activations (approximate)", "update"),
}


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """How many parameters a model has, shared ones counted once.

    Attributes:
        total: All parameters.
        linear_sizes: Number of weights of each linear layer but the output head: what NF4
            replaces.
    """

    total: int
    linear_sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What a run needs on one device.

    Attributes:
        num_parameters: Parameters of the policy, shared ones counted once.
        parts: Bytes by the keys of ``PARTS``.

    Example:
        >>> parts = {"weights": 4, "optimizer": 8, "kv_cache": 3, "gradients": 4}
        >>> MemoryEstimate(num_parameters=1, parts=parts).total_bytes
        16
    """

    num_parameters: int
    parts: dict[str, int]

    def phase_bytes(self, phase: Phase) -> int:
        """Return the bytes that are held in this phase only, or ``"always"``."""
        return sum(size for part, size in self.parts.items() if PARTS[part][1] == phase)

    @property
    def total_bytes(self) -> int:
        """The peak: what is always held, plus the larger of generation and update."""
        transient = max(self.phase_bytes("generation"), self.phase_bytes("update"))
        return self.phase_bytes("always") + transient

    def to_table(self) -> str:
        """Return the parts and the peak as a markdown table, in GiB."""
        rows = [
            f"| {PARTS[part][0]} | {PARTS[part][1]} | {_gib(size)} |"
            for part, size in self.parts.items()
        ]
        peak = f"| **peak** | always + larger of the others | **{_gib(self.total_bytes)}** |"
        return "\n".join(["| part | held | GiB |", "|---|---|---:|", *rows, peak])


def estimate_memory(
    config: PreTrainedConfig,
    *,
    micro_batch_size: int,
    generation_batch_size: int,
    num_prompt_tokens: int,
    num_completion_tokens: int,
    dtype_bytes: int = 4,
    compute_dtype_bytes: int | None = None,
    num_trainable: int | None = None,
    gradient_checkpointing: bool = True,
    reference: ReferenceKind = "none",
) -> MemoryEstimate:
    """Return an estimate of the memory that GRPO with AdamW needs on one device.

    Args:
        config: Of a causal language model.
        micro_batch_size: Completions in one forward and backward pass.
        generation_batch_size: Completions that one process generates at a time.
        num_prompt_tokens: Tokens of the longest prompt.
        num_completion_tokens: Tokens that a completion may have at most.
        dtype_bytes: Bytes of one policy weight. Its gradient has the same dtype, and so have the
            two moments of ``torch.optim.AdamW``: with float32 weights they are float32.
        compute_dtype_bytes: Bytes of one activation and one cache entry; those of a weight if
            None. 2 for float32 weights under ``bf16: true``.
        num_trainable: Parameters that get a gradient; all if None.
        gradient_checkpointing: Whether only the inputs of the layers are kept for the backward
            pass.
        reference: ``"resident"`` is a copy in the policy's dtype, ``"quantized"`` one in NF4.

    Returns:
        The parts in bytes. Weights, gradients, moments and reference are exact up to small
        buffers; the key-value cache is the most that full attention needs; the activations are
        approximate.
    """
    count = count_parameters(config)
    num_trainable = count.total if num_trainable is None else num_trainable
    compute_dtype_bytes = compute_dtype_bytes or dtype_bytes
    tokens = num_prompt_tokens + num_completion_tokens
    parts = {
        "weights": count.total * dtype_bytes,
        "reference": reference_bytes(count, kind=reference, dtype_bytes=dtype_bytes),
        "optimizer": 2 * num_trainable * dtype_bytes,
        "kv_cache": kv_cache_bytes(
            config, num_tokens=generation_batch_size * tokens, dtype_bytes=compute_dtype_bytes
        ),
        "gradients": num_trainable * dtype_bytes,
        "activations": activation_bytes(
            config,
            num_tokens=micro_batch_size * tokens,
            dtype_bytes=compute_dtype_bytes,
            gradient_checkpointing=gradient_checkpointing,
        ),
    }
    return MemoryEstimate(num_parameters=count.total, parts=parts)


def count_parameters(config: PreTrainedConfig) -> ParameterCount:
    """Return the parameter count of the causal language model that this configuration describes."""
    from transformers import AutoModelForCausalLM

    build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = build(config)
    get_head: Callable[[], nn.Module | None] = model.get_output_embeddings
    head = get_head()
    linears = [
        layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head
    ]
    return ParameterCount(
        total=sum(parameter.numel() for parameter in model.parameters()),
        linear_sizes=tuple(layer.weight.numel() for layer in linears),
    )


def reference_bytes(count: ParameterCount, *, kind: ReferenceKind, dtype_bytes: int) -> int:
    """Return the bytes of the reference's weights.

    Quantized: linear weights but the output head in NF4, everything else (embeddings, head,
    norms, biases) in the policy's dtype.
    """
    if kind == "none":
        return 0
    if kind == "resident":
        return count.total * dtype_bytes
    unquantized = count.total - sum(count.linear_sizes)
    return unquantized * dtype_bytes + sum(map(nf4_bytes, count.linear_sizes))


def nf4_bytes(num_weights: int) -> int:
    r"""Return the bytes of a weight matrix in NF4 with double quantization.

    .. math:: \lceil n/2 \rceil + b + 4 \lceil b / 256 \rceil, \quad b = \lceil n / 64 \rceil

    Half a byte a weight, one byte for the absmax of each block, one float32 for each 256 of
    those: together 4.127 bits a weight.

    References:
        Dettmers et al. 2023, QLoRA, section 3 (double quantization), arXiv:2305.14314.

    Example:
        >>> nf4_bytes(64 * 256)
        8452
    """
    blocks = math.ceil(num_weights / NF4_BLOCK)
    return math.ceil(num_weights / 2) + blocks + 4 * math.ceil(blocks / NF4_NESTED_BLOCK)


def kv_cache_bytes(config: PreTrainedConfig, *, num_tokens: int, dtype_bytes: int) -> int:
    """Return the bytes of the keys and values that full attention keeps.

    Tokens x layers x 2 x key-value heads x head width x bytes.

    Args:
        config: Sliding-window and latent attention keep less than this.
        num_tokens: Of all sequences of the batch together.
        dtype_bytes: Bytes of one cache entry.

    References:
        Ainslie et al. 2023, grouped-query attention: only the key-value heads count,
        arXiv:2305.13245.
    """
    text = config.get_text_config()
    return num_tokens * int(text.num_hidden_layers) * 2 * _kv_width(text) * dtype_bytes


def activation_bytes(
    config: PreTrainedConfig, *, num_tokens: int, dtype_bytes: int, gradient_checkpointing: bool
) -> int:
    r"""Return roughly the bytes that one forward pass keeps for the backward pass.

    .. math:: 8h + b\,(4h + 2q + 2k + 4f)

    a token and layer, for hidden width h, query width q, key-value width k, MLP width f and b
    bytes an activation: the inputs of two norms (float32), their outputs and normed values,
    queries and attention output, keys and values, and the four products of a gated MLP. Counted
    on transformers' Llama with ``torch.autograd.graph.saved_tensors_hooks`` and SDPA, in the
    manner of [1], which has no gated MLP. Attention scores are not kept (SDPA, flash attention),
    and neither are logits: TRL's fused LM head works in tiles.

    Args:
        config: Its MLP is taken to be dense and gated.
        num_tokens: Of the whole micro-batch, padding included.
        dtype_bytes: Bytes of one activation.
        gradient_checkpointing: If set, each layer keeps its input only, and one layer at a time
            is recomputed.

    References:
        [1] Korthikanti et al. 2022, section 4.1, arXiv:2205.05198.
    """
    text = config.get_text_config()
    layer_bytes = num_tokens * _layer_token_bytes(text, dtype_bytes=dtype_bytes)
    if not gradient_checkpointing:
        return int(text.num_hidden_layers * layer_bytes)
    return int(text.num_hidden_layers * num_tokens * text.hidden_size * dtype_bytes + layer_bytes)


def available_memory_bytes() -> int:
    """Return the free bytes of the current CUDA device, or of the host when there is none.

    A limit that a container sets on the host's memory (cgroup v2) is honoured.
    """
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    import psutil

    host = int(psutil.virtual_memory().available)
    cgroup = _cgroup_available_bytes(Path("/sys/fs/cgroup"))
    return host if cgroup is None else min(host, cgroup)


def _cgroup_available_bytes(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    # File cache counts as used, but the kernel gives it back on demand.
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))


def _layer_token_bytes(text: PreTrainedConfig, *, dtype_bytes: int) -> int:
    hidden = text.hidden_size
    mlp = getattr(text, "intermediate_size", None) or 4 * hidden
    queries = text.num_attention_heads * _head_dim(text)
    return int(
        8 * hidden + dtype_bytes * (4 * hidden + 2 * queries + 2 * _kv_width(text) + 4 * mlp)
    )


def _kv_width(text: PreTrainedConfig) -> int:
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return int(heads) * _head_dim(text)


def _head_dim(text: PreTrainedConfig) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"
