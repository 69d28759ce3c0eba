"""Which texts share a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PADDING = 0.25  # share of a pass, where nobody says otherwise


def plan_passes(
    lengths: Sequence[int], *, max_tokens: int, max_padding: float = MAX_PADDING
) -> list[list[int]]:
    """Return which texts go into one forward pass, longest first.

    Each pass is padded to its longest text, which is its first one.

    Args:
        lengths: Tokens of each text.
        max_tokens: Of one pass, padding included; a text above it gets a pass of its own.
        max_padding: Largest share of padding in a pass, from 0 to below 1.

    Returns:
        Indices into ``lengths``, each in one pass.

    Example:
        >>> plan_passes([3, 10, 9, 4], max_tokens=20, max_padding=0.25)
        [[1, 2], [3, 0]]
    """
    passes: list[list[int]] = []
    longest = num_real = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        padded = longest * (len(passes[-1]) + 1) if passes else 0
        padding = padded - num_real - lengths[index]
        if passes and padded <= max_tokens and padding <= max_padding * padded:
            passes[-1].append(index)
            num_real += lengths[index]
        else:
            passes.append([index])
            longest = num_real = lengths[index]
    return passes
