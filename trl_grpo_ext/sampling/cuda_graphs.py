"""A forward pass that a CUDA graph repeats: one launch, where Python would launch each kernel.

A step of decoding is hundreds of small kernels, and Python takes longer to launch them than a GPU
to run them.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils import logging

logger = logging.get_logger(__name__)

_refused: WeakSet[nn.Module] = WeakSet()  # models that cannot be captured, which was told
_ROUNDING = 0.02  # of the norm of the logits: the same kernels, so far less even in 16 bits

Pass = Callable[[], Tensor]


class RepeatedPass:
    """Runs a function that reads and writes the same memory each time, as a graph where it can.

    The first run of a version launches kernel by kernel, and is captured. The second one is run
    both ways and compared: that shows what a graph keeps from the first run and should not. From
    the third on, the graph is repeated. What cannot be captured, or differs, is told once for a
    model; its kernels are launched one by one from then on.

    Args:
        model: That the function runs.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._may_capture = capture_problem(model) is None and model not in _refused
        self._version: int | None = None
        self._graph: Pass | None = None
        self._is_checked = False

    def __call__(self, function: Pass, *, version: int) -> Tensor:
        """Return what the function returns; it is overwritten by the next call.

        Args:
            function: The same in each call. It must not be a closure over this object, or the
                memory of the graph would stay until Python collects garbage.
            version: Changes whenever the memory that the function uses does.
        """
        if version != self._version:
            self._graph = None  # before the next is captured: its memory is free then
            self._version, self._is_checked = version, False
            output = function()
            if self._may_capture:
                self._graph = self._try_capture(function)
            return output
        if self._graph is None:
            return function()
        output = self._graph()
        if self._is_checked:
            return output
        self._is_checked = True
        expected = function()
        if (output.float() - expected.float()).norm() <= _ROUNDING * expected.float().norm():
            return output
        self._refuse("its logits are others than those of the kernels one by one")
        return expected

    def _try_capture(self, function: Pass) -> Pass | None:
        try:
            return capture(function)
        except RuntimeError as error:
            self._refuse(str(error).partition("\n")[0])
            return None

    def _refuse(self, reason: str) -> None:
        self._graph, self._may_capture = None, False
        _refused.add(self._model)
        name = type(self._model).__name__
        logger.warning(
            f"sampling: no CUDA graph of {name}, so that each kernel is launched from Python, "
            f"which is slower: {reason}"
        )


def capture(function: Pass) -> Pass:
    """Return what repeats the function on a CUDA device, as it would run now.

    Raises:
        RuntimeError: it does what a graph cannot hold, such as waiting for the device.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads may go on: they copy a reference's weights, or run a reward model.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = function()
    finally:
        torch.cuda.set_stream(stream)  # torch 2.13 stays on its own one when a capture fails

    def repeat() -> Tensor:
        graph.replay()
        return output

    return repeat


def capture_problem(model: nn.Module) -> str | None:
    """Return why no forward pass of the model can be captured; ``None`` if one may be."""
    parameters = list(model.parameters())
    if any(parameter.device.type != "cuda" for parameter in parameters):
        return "the model is not on CUDA"
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return "its weights are sharded"
    if any(hasattr(parameter, "ds_id") for parameter in parameters):  # DeepSpeed's ZeRO-3
        return "its weights are sharded"
    return None
