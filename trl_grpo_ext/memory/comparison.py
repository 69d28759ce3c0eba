"""The well-known comparison: the weights that PPO and GRPO hold, whole, in 16 bits.

All in GB of 1e9 bytes, before anything is split over GPUs; gradients, optimizer, cache and
activations come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from trl_grpo_ext.memory.reference import ReferenceFormat, quantized_bytes
from trl_grpo_ext.memory.shape import ModelShape

HALF: Final = 2  # [bytes] of a weight in 16 bits


@dataclass(frozen=True)
class Setup:
    """The models that an algorithm holds at a time, and their bytes.

    Attributes:
        title: Algorithm, reference, reward.
        parts: Bytes by model, in round numbers: the size that the model's name says, and half a
            byte a weight in 4 bits.
        exact_parts: With the parameters counted, and the scales of a plain 4-bit reference, whose
            embeddings have 16 bits.
    """

    title: str
    parts: dict[str, int]
    exact_parts: dict[str, int]

    @property
    def total(self) -> int:
        """The sum in round numbers, in bytes."""
        return sum(self.parts.values())

    @property
    def exact_total(self) -> int:
        """The sum as counted, in bytes."""
        return sum(self.exact_parts.values())


_SETUPS = {
    "PPO": ("policy", "reference", "reward model", "value model"),
    "GRPO, full reference, reward model": ("policy", "reference", "reward model"),
    "GRPO, full reference, API reward": ("policy", "reference"),
    "GRPO, 4-bit reference, reward model": ("policy", "4-bit reference", "reward model"),
    "GRPO, 4-bit reference, API reward": ("policy", "4-bit reference"),
}


def compare_setups(
    shape: ModelShape, *, nominal: int, storage: ReferenceFormat | None = None
) -> list[Setup]:
    """Return what PPO and four kinds of GRPO hold, all of their models of the policy's size.

    Args:
        shape: Of the policy.
        nominal: Its parameters in a round number.
        storage: Of the reference in 4 bits; double quantization by default.

    References:
        Shao et al. 2024, DeepSeekMath, section 4.1: GRPO needs no value model, arXiv:2402.03300.
    """
    storage = storage or ReferenceFormat()
    rough = {"4-bit reference": nominal // 2}
    exact = {"4-bit reference": quantized_bytes(shape, storage, HALF)}
    return [
        Setup(
            title,
            {model: rough.get(model, HALF * nominal) for model in models},
            {model: exact.get(model, HALF * shape.num_parameters) for model in models},
        )
        for title, models in _SETUPS.items()
    ]
