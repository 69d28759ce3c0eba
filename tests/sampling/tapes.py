"""CUDA graphs for a machine without CUDA: ``from sampling.tapes import record_tapes``.

A tape holds the operations of one run with the very tensors that they read and wrote, and does them
again. Like a CUDA graph it repeats whatever Python decided in that run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from trl_grpo_ext.sampling import cuda_graphs, decoding


def record_tapes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have tapes stand in for CUDA graphs; the list counts how often each was repeated."""
    repeats: list[int] = []

    def capture(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        tape, number = make_fx(lambda: function())(), len(repeats)
        repeats.append(0)

        def repeat() -> Tensor:
            repeats[number] += 1
            output: Tensor = tape()
            return output

        return repeat

    for module in (cuda_graphs, decoding):
        monkeypatch.setattr(module, "capture_problem", lambda _: None)
    monkeypatch.setattr(cuda_graphs, "capture", capture)
    return repeats
