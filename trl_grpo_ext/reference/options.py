"""The options of the reference, and what they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trl_grpo_ext.memory import ReferenceFormat
from trl_grpo_ext.reference.build import EmbeddingQuantization
from trl_grpo_ext.reference.quantized import QuantizationType

ReferenceKind = Literal["auto", "none", "adapter", "resident", "streamed", "quantized"]
Compensation = Literal["none", "rounding", "mixed", "low_rank"]

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_RANK = 32  # whose bytes are also what `mixed` takes
DEFAULT_CALIBRATION_TOKENS = 16384
_EXACT_BITS = 16  # a weight of a copy in half precision


@dataclass
class ReferenceOptions:
    """Options of the reference; ``None`` until set, so that one set in vain is noticed."""

    reference: ReferenceKind = field(
        default="auto",
        metadata={
            "help": "The frozen reference: 'none' (beta 0), 'adapter' (PEFT: the adapter switched "
            "off), 'resident' (a full copy of the live policy), 'streamed' (an exact copy in host "
            "memory, of which two layers are on the GPU), 'quantized' (4 or 8 bits, calibrated "
            "against the live policy), or 'auto' (the first exact one that fits, else quantized; "
            "the log says which and why)."
        },
    )
    reference_quantization: QuantizationType | None = field(
        default=None,
        metadata={
            "help": "Data type of the quantized reference: 'nf4' (default), 'fp4' or 'int8'."
        },
    )
    reference_block_size: int | None = field(
        default=None,
        metadata={"help": "Weights that share a scale in the quantized reference; 64 by default."},
    )
    reference_double_quantization: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the scales are quantized too "
            "(0.4 bits a weight less); true by default."
        },
    )
    reference_embedding_quantization: EmbeddingQuantization | None = field(
        default=None,
        metadata={
            "help": "'int8' stores the embeddings and the LM head of the quantized reference in "
            "8.25 bits a weight; by default they keep the policy's precision."
        },
    )
    reference_keep_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of modules that the quantized reference keeps in full precision, with "
            "all that is in them, such as 'down_proj' or 'self_attn'."
        },
    )
    reference_compensation: Compensation | None = field(
        default=None,
        metadata={
            "help": "What makes up for the rounding of the quantized reference: 'none' (rounding "
            "to nearest), 'rounding' (errors of a weight are made up for in the next ones; takes "
            "no memory; the default for 8 bits), 'mixed' (that, and the layers that the policy is "
            "most sensitive to are stored in 8 bits; the default for 4), or 'low_rank' (rounding, "
            "and low-rank factors in 16 bits beside each weight)."
        },
    )
    reference_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of the factors of 'low_rank', which it asks for; "
            f"{DEFAULT_RANK} by default."
        },
    )
    reference_bits: float | None = field(
        default=None,
        metadata={
            "help": "Bits that a quantized weight may take with its scales, such as 4.6: in the "
            "mean of all layers ('mixed'), or in each with its factors ('low_rank', instead of a "
            "rank). By default 'mixed' takes as many as factors of rank "
            f"{DEFAULT_RANK} would: 4.4 at width 4096, 5.6 at width 576."
        },
    )
    reference_calibration_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of training prompts, completed by the policy, that the quantized "
            f"reference is calibrated on; {DEFAULT_CALIBRATION_TOKENS} by default."
        },
    )
    reference_distillation_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps of training the low-rank factors against the policy before the run "
            "starts; 0 by default. Takes the memory of a backward pass."
        },
    )
    reference_on_disk: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the streamed reference is read from files instead of host memory: the "
            "model's own safetensors, linked beside the checkpoints, and what these do not hold. "
            "By default it is with 'auto', where host memory is too small, and else not."
        },
    )
    reference_kl_target: float | None = field(
        default=None,
        metadata={
            "help": "KL to the reference that you expect of a healthy run, nats a token; 0.01 by "
            "default. The fidelity of a quantized reference is measured there."
        },
    )
    reference_max_floor: float | None = field(
        default=None,
        metadata={
            "help": "Share of reference_kl_target that the KL floor of a quantized reference may "
            "reach before a warning says what to change; 0.5 by default."
        },
    )


@dataclass(frozen=True)
class ReferenceSettings:
    """What the options stand for: no value is missing."""

    kind: ReferenceKind = "quantized"
    quantization: QuantizationType = "nf4"
    block_size: int = 64
    double_quantization: bool = True
    embedding_quantization: EmbeddingQuantization | None = None
    keep_modules: tuple[str, ...] = ()
    compensation: Compensation = "mixed"
    rank: int | None = None
    bits: float | None = None
    calibration_tokens: int = DEFAULT_CALIBRATION_TOKENS
    distillation_steps: int = 0
    on_disk: bool = False
    kl_target: float = 0.01
    max_floor: float = 0.5

    @classmethod
    def of(cls, options: ReferenceOptions, *, kind: ReferenceKind) -> ReferenceSettings:
        """Return what the options stand for, for this kind of reference."""
        prefix = "reference_"
        given = {
            name.removeprefix(prefix): value
            for name in ReferenceOptions.__dataclass_fields__
            if name.startswith(prefix) and (value := getattr(options, name)) is not None
        }
        if "keep_modules" in given:
            given["keep_modules"] = tuple(given["keep_modules"])
        if given.get("rank") or given.get("distillation_steps"):
            given.setdefault("compensation", "low_rank")
        if given.get("quantization") == "int8":
            given.setdefault("compensation", "rounding")
        return cls(kind=kind, **given)

    @property
    def storage(self) -> ReferenceFormat:
        """What the planner must know of a quantized reference.

        Example:
            >>> ReferenceSettings().storage.rank
            32
        """
        takes_more = self.compensation in ("mixed", "low_rank")
        return ReferenceFormat(
            quantization=self.quantization,
            block_size=self.block_size,
            double_quantization=self.double_quantization,
            rank=(DEFAULT_RANK if self.rank is None else self.rank) if takes_more else 0,
            bits=self.bits,
            embedding_bits=None if self.embedding_quantization is None else 8,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What the weights of a reference depend on, besides the policy."""
        if self.kind != "quantized":
            return {"kind": self.kind}
        values = asdict(self)
        for name in ("on_disk", "kl_target", "max_floor"):
            del values[name]
        return values


def reference_problems(
    options: ReferenceOptions, *, beta: float, mixes: bool, mixup_alpha: float
) -> Iterator[str]:
    """Yield what cannot work in the options of the reference.

    Args:
        options: Of known values.
        beta: Weight of the KL penalty.
        mixes: Whether ``sync_ref_model`` is on.
        mixup_alpha: How far it moves the reference towards the policy.
    """
    kind = options.reference
    keep: object = options.reference_keep_modules
    if isinstance(keep, str):  # from a YAML, which is not held to the annotation
        yield f"`reference_keep_modules` is {keep!r}, which is not a list. Write [{keep}]."
    if kind == "none" and beta != 0.0:
        yield (
            f"`reference` is 'none', but `beta` is {beta}, so there is a KL penalty that needs "
            "one. Set `beta: 0`, or another `reference`."
        )
    if kind == "quantized" and mixes and mixup_alpha != 1.0:
        yield (
            f"`sync_ref_model` is true with `ref_model_mixup_alpha`={mixup_alpha}, but 4-bit "
            "weights cannot be moved a part of the way towards the policy. Set "
            "`ref_model_mixup_alpha: 1.0` (the reference is then built anew), or "
            "`reference: streamed` or `resident`."
        )
    yield from _number_problems(options)
    if options.reference_block_size in (None, *BLOCK_SIZES):
        yield from _compensation_problems(options)


def _number_problems(options: ReferenceOptions) -> Iterator[str]:
    for name, least, wanted in (
        ("reference_rank", 1, "1 or more"),
        ("reference_calibration_tokens", 1, "1 or more"),
        ("reference_distillation_steps", 0, "0 or more"),
        ("reference_kl_target", 1e-9, "nats a token above 0 (0.001 to 0.1)"),
        ("reference_max_floor", 1e-9, "a share above 0 (0.5)"),
    ):
        value = getattr(options, name)
        if value is not None and not least <= value < math.inf:
            yield f"`{name}` is {value}; use {wanted}, or leave it out."


def _compensation_problems(options: ReferenceOptions) -> Iterator[str]:
    settings = ReferenceSettings.of(options, kind="quantized")
    compensation = settings.compensation
    for name in ("reference_rank", "reference_distillation_steps"):
        if getattr(options, name) and compensation != "low_rank":
            yield (
                f"`{name}` is set, but `reference_compensation` is {compensation!r}, "
                "which has no low-rank factors. Set `reference_compensation: low_rank`, or remove "
                f"`{name}`."
            )
    if options.reference_bits and compensation not in ("mixed", "low_rank"):
        yield (
            f"`reference_bits` is set, but `reference_compensation` is {compensation!r}, whose "
            "weights all take the same. Set `reference_compensation: mixed` (4-bit types) or "
            "`low_rank`, or remove `reference_bits`."
        )
    if compensation == "mixed" and settings.quantization == "int8":
        yield (
            "`reference_compensation` is 'mixed', but `reference_quantization` is 'int8', so that "
            "all layers have 8 bits already. Set `reference_compensation: rounding`, or "
            "`reference_quantization: nf4`."
        )
    if options.reference_rank is not None and options.reference_bits is not None:
        yield (
            "`reference_rank` and `reference_bits` are both set, and each says how large the "
            "low-rank factors are. Keep one of them."
        )
    least, bits = code_bits(settings), options.reference_bits
    if bits is not None and not bits < _EXACT_BITS:
        yield (
            f"`reference_bits` is {bits}, but a copy in 16 bits is exact. Use fewer, such as 4.6, "
            "or `reference: streamed` or `resident`."
        )
    elif bits is not None and bits <= least and compensation in ("mixed", "low_rank"):
        yield (
            f"`reference_bits` is {bits}, but {settings.quantization} in blocks "
            f"of {settings.block_size} takes {least:.3f} bits a weight alone. Use more, or "
            "`reference_compensation: rounding`."
        )
    if options.reference_calibration_tokens is not None and settings.compensation == "none":
        yield (
            "`reference_calibration_tokens` is set, but `reference_compensation` is 'none', which "
            "calibrates nothing. Remove one of them."
        )


def code_bits(settings: ReferenceSettings) -> float:
    """Return the bits that a weight takes with its scale, without low-rank factors.

    Example:
        >>> code_bits(ReferenceSettings())
        4.126953125
    """
    code = 8 if settings.quantization == "int8" else 4
    scale = 8 + 32 / 256 if settings.double_quantization else 32
    return code + scale / settings.block_size
