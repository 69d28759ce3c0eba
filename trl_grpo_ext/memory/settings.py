"""The settings of a run that its memory depends on, and what cannot work among them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from trl_grpo_ext.memory.activations import Tokens
from trl_grpo_ext.memory.reference import ReferenceFormat, ReferenceKind

Dtype = Literal["mixed", "bfloat16", "float32"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "sgd"]
Sharding = Literal["none", "zero1", "zero2", "zero3", "fsdp"]


class Precision(NamedTuple):
    """Bytes of one number.

    Attributes:
        weight: Of the model, and of a gradient.
        compute: Of activations and cache.
        master: Of a copy of the weights that the optimizer keeps.
        moment: Of one of AdamW's two moments.
        residual: Of the sums that go from layer to layer.
    """

    weight: int
    compute: int
    master: int
    moment: int
    residual: int


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a plan is made for.

    Attributes:
        num_gpus: Processes, one a GPU.
        dtype: ``"mixed"``: float32 weights that compute in bfloat16 (TRL's default with
            ``bf16: true``). ``"bfloat16"``: everything in 16 bits, without a float32 copy of the
            weights (DeepSpeed keeps one all the same). ``"float32"``: everything in 32 bits.
        optimizer: ``"sgd"`` has no momentum, so no state.
        sharding: What is split over the GPUs: ZeRO-1 the optimizer, ZeRO-2 gradients too, ZeRO-3
            and FSDP weights too.
        lora_rank: Of an adapter on every linear layer, experts excepted; 0 trains all weights.
        gradient_checkpointing: Whether layers are computed again for the backward pass.
        micro_batch: Completions a GPU in one forward and backward pass.
        num_generations: Completions of a prompt.
        generation_batch: Completions that one GPU generates at a time.
        prompt_tokens: Of the longest prompt.
        completion_tokens: That a completion may have at most.
        reference: What the KL is measured against.
        storage: Of a quantized reference.
        reward_parameters: Of a reward model on each GPU, in 16 bits; 0 for none.
        has_value_model: Whether a critic of the policy's size is trained as well (PPO).
        shared_prefix: Whether each prompt is counted once a group, not once a completion.
    """

    num_gpus: int = 1
    dtype: Dtype = "mixed"
    optimizer: Optimizer = "adamw"
    sharding: Sharding = "none"
    lora_rank: int = 0
    gradient_checkpointing: bool = True
    micro_batch: int = 8
    num_generations: int = 8
    generation_batch: int = 8
    prompt_tokens: int = 512
    completion_tokens: int = 1024
    reference: ReferenceKind = "resident"
    storage: ReferenceFormat = field(default_factory=ReferenceFormat)
    reward_parameters: int = 0
    has_value_model: bool = False
    shared_prefix: bool = False

    @property
    def precision(self) -> Precision:
        """What the dtype means with this kind of sharding."""
        if self.dtype == "float32":
            return Precision(4, 4, 0, 4, 4)
        if self.sharding.startswith("zero"):
            return Precision(2, 2, 4, 4, 2)
        if self.dtype == "bfloat16":
            return Precision(2, 2, 0, 2, 2)
        return Precision(4, 2, 0, 4, 4 if self.sharding == "none" else 2)

    @property
    def shards_weights(self) -> bool:
        """Whether each GPU holds a part of the weights only."""
        return self.sharding in ("zero3", "fsdp")

    @property
    def gradient_accumulation(self) -> int:
        """Micro-batches a step: each completion that was generated is learnt from once."""
        return math.ceil(self.generation_batch / self.micro_batch)

    def tokens(self, num_completions: int) -> Tokens:
        """Return the tokens of so many completions of whole groups, the last one perhaps not."""
        return Tokens(
            num_completions=num_completions,
            num_prompts=math.ceil(num_completions / self.num_generations),
            prompt=self.prompt_tokens,
            completion=self.completion_tokens,
        )


def _bits_problems(storage: ReferenceFormat) -> Iterator[str]:
    if storage.bits is None:
        return
    if storage.quantization == "int8":
        yield "--reference-bits is set, but int8 takes 8.13. Use nf4, or leave it out."
    elif not storage.num_bits < storage.bits <= 8.13:
        yield (
            f"--reference-bits is {storage.bits:g}, but {storage.quantization} takes some more "
            "than 4, and a layer in 8 bits takes 8.13. Use a number between, such as 4.6."
        )


def settings_problems(settings: RunSettings) -> Iterator[str]:
    """Yield what cannot work: what was found, why it matters, what to do."""
    impossible = [name for name, least in _LEAST.items() if getattr(settings, name) < least]
    for name in impossible:
        flag = "gpus" if name == "num_gpus" else name.replace("_", "-")
        yield (
            f"--{flag} is {getattr(settings, name)}, so that there is nothing to plan. "
            f"Use {_LEAST[name]} or more."
        )
    if impossible:
        return
    if settings.lora_rank < 0 or settings.storage.rank < 0:
        yield "A rank is negative, and no matrix has one. Use 1 or more, or leave it out."
    yield from _bits_problems(settings.storage)
    if settings.reference == "adapter" and not settings.lora_rank:
        yield (
            "--reference is adapter, but there is no adapter to switch off. "
            "Add --lora RANK, or use another reference."
        )
    if settings.lora_rank > 0 and settings.reference in ("resident", "streamed", "quantized"):
        yield (
            f"--reference is {settings.reference}, but with its adapter (--lora) switched off the "
            "policy is its own exact reference, at no memory. Use --reference auto."
        )
    if settings.sharding != "none" and settings.num_gpus == 1:
        yield (
            f"--sharding is {settings.sharding}, but --gpus is 1, so there is nothing to share "
            "out. Use --gpus 2 or more, or --sharding none."
        )
    completions = settings.num_gpus * settings.micro_batch * settings.gradient_accumulation
    if completions % settings.num_generations:
        yield (
            f"--num-generations {settings.num_generations} does not divide the {completions} "
            f"completions of a step ({settings.num_gpus} GPUs x micro-batch {settings.micro_batch} "
            f"x accumulation {settings.gradient_accumulation}), so a group would be split. "
            "Change one of them."
        )


_LEAST = {
    "num_gpus": 1,
    "micro_batch": 1,
    "generation_batch": 1,
    "num_generations": 2,
    "prompt_tokens": 1,
    "completion_tokens": 1,
}
