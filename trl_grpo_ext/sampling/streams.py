"""Random numbers that belong to a completion, whatever is computed beside it or before it.

Shapes: ``B`` completions, ``T`` tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_WORD = 2**64


@dataclass(frozen=True)
class CompletionKey:
    """Which completion it is.

    Attributes:
        prompt_index: Number of its prompt, at least 0.
        index_in_group: Number of the completion among those of its prompt, at least 0.
    """

    prompt_index: int
    index_in_group: int


def uniforms(seed: int, step: int, keys: Sequence[CompletionKey], length: int) -> Tensor:
    """Return random numbers in [0, 1); a row depends on the seed, the step and its key alone.

    Philox counts instead of mixing a state: seed and step are the key of the generator, and each
    completion has a range of 2^128 counts of its own, so that no two streams overlap. A longer
    stream begins with the shorter one.

    Args:
        seed: Any integer; integers that differ by a multiple of 2^64 are the same.
        step: As ``seed``.
        keys: One a completion.
        length: ``T``, at least 0.

    Returns:
        Shape ``(B, T)``, float64, on the CPU.

    References:
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Example:
        >>> uniforms(0, 0, [CompletionKey(3, 1)], 2).shape
        torch.Size([1, 2])
    """
    philox_key = np.array([seed % _WORD, step % _WORD], dtype=np.uint64)
    values = np.empty((len(keys), length))
    for row, key in zip(values, keys, strict=True):
        counter = np.array([0, 0, key.prompt_index, key.index_in_group], dtype=np.uint64)
        bits = np.random.Philox(counter=counter, key=philox_key).random_raw(length)
        row[:] = (bits >> np.uint64(11)) * 2.0**-53
    return torch.from_numpy(values)
