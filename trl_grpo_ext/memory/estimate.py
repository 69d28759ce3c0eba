"""What a run needs on one GPU, part by part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from trl_grpo_ext.memory.activations import activation_bytes
from trl_grpo_ext.memory.reference import ReferenceFormat, ReferenceKind, reference_bytes
from trl_grpo_ext.memory.settings import RunSettings
from trl_grpo_ext.memory.shape import ModelShape, model_shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Phase = Literal["always", "generation", "update"]

GIB: Final = 2**30
STATE_BLOCK: Final = 256  # [moments] that share one float32 in 8-bit AdamW of bitsandbytes

# Each part's title and the phase of a step in which it is held.
PARTS: Final[Mapping[str, tuple[str, Phase]]] = {
    "weights": ("policy weights", "always"),
    "casts": ("weights cast by autocast", "always"),
    "adapter": ("adapter weights (LoRA)", "always"),
    "reference": ("reference weights", "always"),
    "reward": ("reward model", "always"),
    "value": ("value model (PPO)", "always"),
    "optimizer": ("optimizer states", "always"),
    "buckets": ("gradient buckets (DDP)", "always"),
    "gathered": ("gathered layers", "always"),
    "kv_cache": ("key-value cache", "generation"),
    "gradients": ("gradients", "update"),
    "activations": ("activations (approximate)", "update"),
}


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What a run needs on one device.

    Attributes:
        num_parameters: Parameters of the policy, shared ones counted once.
        parts: Bytes by the keys of ``PARTS``.
        host_bytes: In host memory, for this process: of a streamed reference, paged states.

    Example:
        >>> parts = {"weights": 4, "optimizer": 8, "kv_cache": 3, "gradients": 4}
        >>> MemoryEstimate(num_parameters=1, parts=parts).total_bytes
        16
    """

    num_parameters: int
    parts: dict[str, int]
    host_bytes: int = 0

    def phase_bytes(self, phase: Phase) -> int:
        """Return the bytes that are held in this phase only, or ``"always"``."""
        return sum(size for part, size in self.parts.items() if PARTS[part][1] == phase)

    @property
    def total_bytes(self) -> int:
        """The peak: what is always held, plus the larger of generation and update."""
        transient = max(self.phase_bytes("generation"), self.phase_bytes("update"))
        return self.phase_bytes("always") + transient

    def to_table(self) -> str:
        """Return the parts that are not 0, and the peak, as a markdown table in GiB."""
        rows = [
            f"| {PARTS[part][0]} | {PARTS[part][1]} | {_gib(size)} |"
            for part, size in self.parts.items()
            if size
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
    gradient_checkpointing: bool = True,
    reference: ReferenceKind = "none",
    storage: ReferenceFormat | None = None,
) -> MemoryEstimate:
    """Return an estimate of the memory that GRPO with AdamW needs on one device.

    It is for one process that holds the whole model. :func:`estimate_run` also knows sharding,
    adapters and other optimizers.

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
        gradient_checkpointing: Whether only the inputs of the layers are kept for the backward
            pass.
        reference: ``"resident"`` is a copy in the policy's dtype.
        storage: Of a ``"quantized"`` reference; NF4 without low-rank factors if not given.

    Returns:
        The parts in bytes. Weights, gradients, moments and reference are exact up to small
        buffers; the key-value cache is the most that full attention needs; the activations are
        approximate.
    """
    mixed = dtype_bytes == 4 and compute_dtype_bytes == 2
    settings = RunSettings(
        dtype="mixed" if mixed else "bfloat16" if dtype_bytes == 2 else "float32",
        micro_batch=micro_batch_size,
        generation_batch=generation_batch_size,
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_completion_tokens,
        gradient_checkpointing=gradient_checkpointing,
        reference=reference,
        storage=storage or ReferenceFormat(),
    )
    return estimate_run(model_shape(config), settings)


def estimate_run(shape: ModelShape, settings: RunSettings) -> MemoryEstimate:
    """Return an estimate of the memory that a run needs on each of its GPUs.

    It leaves out what the CUDA context (about 0.5 GB) and the fragmentation of the allocator take:
    plan with a tenth to spare.

    References:
        Rajbhandari et al. 2020, ZeRO, section 5: what each stage splits, arXiv:1910.02054.
    """
    precision, num_trainable = settings.precision, trainable_parameters(shape, settings)
    training = _training_parts(shape, settings, num_trainable)
    copy = reference_bytes(
        shape,
        kind=settings.reference,
        dtype_bytes=precision.weight,
        storage=settings.storage,
    )
    whole_reference = settings.reference != "resident" or not settings.shards_weights
    paged = optimizer_bytes(shape, settings, num_trainable) if _is_paged(settings) else 0
    parts = {
        "weights": training["weights"],
        "casts": 2 * shape.num_linear if precision.residual != precision.compute else 0,
        "adapter": training["adapter"],
        "reference": copy.device if whole_reference else _share(copy.device, settings),
        "reward": _reward_bytes(settings),
        "value": sum(training.values()) if settings.has_value_model else 0,
        "optimizer": training["optimizer"],
        "buckets": _bucket_bytes(settings, training["gradients"]),
        "gathered": _gathered_bytes(shape, settings),
        **_token_parts(shape, settings),
        "gradients": training["gradients"],
    }
    return MemoryEstimate(
        num_parameters=shape.num_parameters,
        parts={part: parts[part] for part in PARTS},
        host_bytes=copy.host + _share(paged, settings, since="zero1"),
    )


def trainable_parameters(shape: ModelShape, settings: RunSettings) -> int:
    """Return how many parameters get a gradient: all, or those of the adapter."""
    if not settings.lora_rank:
        return shape.num_parameters
    linear = (matrix for matrix in shape.matrices if not matrix.is_expert)
    return sum(settings.lora_rank * (m.num_outputs + m.num_inputs) for m in linear)


def optimizer_bytes(shape: ModelShape, settings: RunSettings, num_trainable: int) -> int:
    """Return the bytes of the optimizer's states, before they are split.

    8-bit AdamW keeps one byte and 1/64 a moment, but float32 for embeddings, as transformers asks
    it to.
    """
    precision = settings.precision
    moment = 4 if settings.lora_rank else precision.moment
    master = 0 if settings.lora_rank else precision.master * num_trainable
    if settings.optimizer == "sgd":
        return master
    if settings.optimizer == "adamw":
        return master + 2 * moment * num_trainable
    embedded = 0 if settings.lora_rank else shape.tables[0].size
    small = num_trainable - embedded
    return master + 2 * (4 * embedded + small + 4 * math.ceil(small / STATE_BLOCK))


def _training_parts(shape: ModelShape, settings: RunSettings, num_trainable: int) -> dict[str, int]:
    weight = settings.precision.weight
    adapter = 4 * num_trainable if settings.lora_rank else 0  # PEFT keeps adapters in float32
    gradients = adapter or weight * num_trainable
    states = 0 if _is_paged(settings) else optimizer_bytes(shape, settings, num_trainable)
    return {
        "weights": _share(weight * shape.num_parameters, settings, since="zero3"),
        "adapter": _share(adapter, settings, since="zero3"),
        "gradients": _share(gradients, settings, since="zero2"),
        "optimizer": _share(states, settings, since="zero1"),
    }


def _token_parts(shape: ModelShape, settings: RunSettings) -> dict[str, int]:
    generated = settings.tokens(settings.generation_batch)
    once = settings.shared_prefix
    num_cached = generated.cached_once if once else generated.padded
    return {
        "kv_cache": num_cached * shape.cache_width * settings.precision.compute,
        "activations": log_prob_bytes(shape, settings, shared_prefix=once),
    }


def log_prob_bytes(shape: ModelShape, settings: RunSettings, *, shared_prefix: bool) -> int:
    """Return the activations of one log-prob pass, padded or with shared prefixes."""
    return activation_bytes(
        shape,
        tokens=settings.tokens(settings.micro_batch),
        weight_bytes=settings.precision.residual,
        compute_bytes=settings.precision.compute,
        gradient_checkpointing=settings.gradient_checkpointing,
        shared_prefix=shared_prefix,
    )


def _gathered_bytes(shape: ModelShape, settings: RunSettings) -> int:
    """What one GPU has of the others' weights: embeddings, two layers, one layer's gradients."""
    if not settings.shards_weights:
        return 0
    return settings.precision.compute * (shape.outside_layers + 3 * shape.largest_layer)


def _bucket_bytes(settings: RunSettings, gradients: int) -> int:
    """DDP copies gradients into buckets (torch's ``gradient_as_bucket_view=False``)."""
    return gradients if settings.num_gpus > 1 and settings.sharding == "none" else 0


def _reward_bytes(settings: RunSettings) -> int:
    """In 16 bits. DeepSpeed's ZeRO-3 splits it too; otherwise each GPU has all of it."""
    size = 2 * settings.reward_parameters
    return _share(size, settings) if settings.sharding == "zero3" else size


def _is_paged(settings: RunSettings) -> bool:
    return settings.optimizer.startswith("paged")


_STAGES = {"none": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}


def _share(num_bytes: int, settings: RunSettings, *, since: str = "zero3") -> int:
    """The part of one GPU, if this stage or a lower one splits it."""
    splits = _STAGES[settings.sharding] >= _STAGES[since]
    return math.ceil(num_bytes / settings.num_gpus) if splits else num_bytes


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"
