"""Decoder layers whose weights come to the device when they run, two layers at a time.

Before a layer runs, its weights are copied from the host into one of two slots on the device; while
it runs, the next layer's go into the other. The copies follow the calls: passes that go through the
model layer by layer (:func:`~trl_grpo_ext.layerwise.run_layerwise`) share one copy of each layer.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trl_grpo_ext.errors import ReferenceModelError

Weights = dict[str, Tensor]

_ALIGNMENT = 256  # [bytes] of a tensor in a slot, as CUDA's allocator gives it
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device
_cuda: Any = torch.cuda  # parts of it have no types


class StreamedLayer(nn.Module):
    """A decoder layer whose weights are on the device only around its calls.

    It has no parameters and no modules of its own, so that nothing moves, shards or saves them. The
    layer that it stands for stays in evaluation mode.

    Attributes:
        host: The layer itself, on the CPU. Its attributes are this module's too.
        stream: Brings the weights to the device; one for all layers of a model.
        prefix: Of the names of its weights in the model, such as ``"model.layers.0."``.
    """

    host: nn.Module

    def __init__(self, host: nn.Module, stream: LayerStream, *, index: int, prefix: str) -> None:
        super().__init__()
        vars(self)["host"] = host  # not a module of this one
        self.stream = stream
        self.index = index
        self.prefix = prefix

    def __getattr__(self, name: str) -> Any:
        """Return what the layer itself has by this name: its kind of attention, for example."""
        if "host" not in vars(self):
            return super().__getattr__(name)
        return getattr(self.host, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer returns, computed where its input is."""
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        weights = self.stream.weights(self.index, device=inputs[0].device)
        return functional_call(self.host, _like(inputs[0], weights), args, kwargs)


def _like(hidden: Tensor, weights: Weights) -> Weights:
    """Follow a model that was turned to 16 bits (DeepSpeed does), which its layers do not see."""
    computes_in_half = hidden.dtype in (torch.bfloat16, torch.float16)
    if not computes_in_half or torch.is_autocast_enabled(hidden.device.type):
        return weights
    if any(tensor.dtype == hidden.dtype for tensor in weights.values()):
        return weights
    single = torch.float32
    return {n: t.to(hidden.dtype) if t.dtype == single else t for n, t in weights.items()}


def streamed_layers(model: nn.Module) -> list[StreamedLayer]:
    """Return the streamed layers of a model, in the order they run in; none of another model.

    What goes through the modules of a model, such as
    :func:`~trl_grpo_ext.cpu_linear.use_onednn`, does not see into them; call it on each ``host``.
    """
    return [module for module in model.modules() if isinstance(module, StreamedLayer)]


@dataclass
class _Slot:
    """Memory on the device, for one layer at a time."""

    memory: Tensor
    layer: int | None = None
    weights: Weights = field(default_factory=dict)
    loading: Future[torch.cuda.Event | None] | None = None

    def filled(self) -> torch.cuda.Event | None:
        """Wait until the copies are queued; return the event of their end on CUDA."""
        return None if self.loading is None else self.loading.result()


class LayerStream:
    """Two slots on the device in which layers take turns: one to compute with, one to fill.

    A thread fills them, so that disk and host memory are read while the device computes. On CUDA it
    does so in a stream of its own, and two events keep the order: a slot is filled once the work
    queued before is done with it, and read once it is filled. The memory of the slots is taken at
    the first call and kept.

    Attributes:
        num_copies: Layers copied to the device so far, the one fetched ahead included.
        host_bytes: Of all layers.
        slot_bytes: Of both slots.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.num_copies = 0
        self._sources = [dict(named_tensors(layer)) for layer in layers]
        sizes = [memory_bytes(source) for source in self._sources]
        self.host_bytes, self.slot_bytes = sum(sizes), 2 * max(sizes)
        self._slots: list[_Slot] = []
        self._used: _Slot | None = None  # by the last call
        self._side: list[torch.cuda.Stream] = []  # one on CUDA, else none
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layer-stream")

    def weights(self, index: int, *, device: torch.device) -> Weights:
        """Return a layer's weights on the device, and start to fetch those of the next layer.

        They hold until another layer's are asked for.
        """
        if not self._slots or self._slots[0].memory.device != device:
            self._allocate(device)
        slot = self._slot_of(index) or self._load(index)
        if (filled := slot.filled()) is not None:
            _cuda.current_stream(device).wait_event(filled)
        self._used = slot
        following = (index + 1) % len(self._sources)  # the first again, for the next batch
        if self._slot_of(following) is None:
            self._load(following)
        return slot.weights

    def forget(self) -> None:
        """Wait for copies under way; layers are copied anew at their next call."""
        for slot in self._slots:
            if (filled := slot.filled()) is not None:
                filled.synchronize()
            slot.layer = None

    def pin(self, memories: Sequence[Tensor]) -> None:
        """Page-lock the host memory that the layers lie in, for as long as this object lives.

        Args:
            memories: From :func:`host_pages`.

        Raises:
            ReferenceModelError: CUDA refuses.
        """
        # Not torch's own pinned memory, which rounds each allocation up to a power of two.
        pinned: list[Tensor] = []
        weakref.finalize(self, _unpin, pinned, self._side).atexit = False
        for memory in memories:
            code = _cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE)
            if int(code):
                raise ReferenceModelError(
                    f"CUDA could not page-lock {memory.nbytes / 1e9:.2f} GB of host memory (error "
                    f"{int(code)}), without which the copies of a streamed reference do not "
                    "overlap with compute. Free host memory, use `reference: quantized`, or give "
                    "the reference a folder."
                )
            pinned.append(memory)

    def _slot_of(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.layer == index), None)

    def _allocate(self, device: torch.device) -> None:
        self.forget()
        self._used = None
        self._side[:] = [_cuda.Stream(device)] if device.type == "cuda" else []
        num_bytes = self.slot_bytes // 2
        with torch.inference_mode(False):  # else nothing outside of that mode could fill them
            self._slots = [
                _Slot(torch.empty(num_bytes, dtype=torch.uint8, device=device)) for _ in range(2)
            ]

    def _load(self, index: int) -> _Slot:
        slot = next(slot for slot in self._slots if slot is not self._used)
        source = self._sources[index]
        with torch.inference_mode(False):
            slot.weights = views_of(slot.memory, source)
        slot.layer = index
        side = self._side[0] if self._side else None
        queued = None if side is None else _cuda.current_stream(side.device).record_event()
        slot.loading = self._thread.submit(_fill, slot.weights, source, side, queued)
        self.num_copies += 1
        return slot


def _fill(
    target: Weights, source: Weights, side: torch.cuda.Stream | None, queued: Any
) -> torch.cuda.Event | None:
    """Copy a layer's weights; in a CUDA stream, after an event, and return that of their end."""
    if side is None:
        _copy(target, source)
        return None
    with torch.cuda.stream(side):
        side.wait_event(queued)
        _copy(target, source)
        filled: torch.cuda.Event = side.record_event()
        return filled


def _copy(target: Weights, source: Weights) -> None:
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor, non_blocking=True)


def _unpin(memories: list[Tensor], side: list[torch.cuda.Stream]) -> None:
    for stream in side:
        stream.synchronize()
    for memory in memories:
        _cuda.cudart().cudaHostUnregister(memory.data_ptr())


# Memory ------------------------------------------------------------------------------------------


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers of a module with their names, each once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def memory_bytes(weights: Mapping[str, Tensor]) -> int:
    """Return the bytes of memory that holds these tensors one after the other, each aligned."""
    return sum(_aligned(tensor.nbytes) for tensor in weights.values())


def views_of(memory: Tensor, like: Mapping[str, Tensor]) -> Weights:
    """Return tensors of the same names, types, shapes and orders of dimensions in this memory.

    Args:
        memory: Bytes, at least :func:`memory_bytes` of them.
        like: What they are alike; only its kinds are read.
    """
    views, start = {}, 0
    for name, tensor in like.items():
        strides = torch.empty_like(tensor, device="meta").stride()
        values = memory[start : start + tensor.nbytes].view(tensor.dtype)
        views[name] = values.as_strided(tensor.shape, strides)
        start += _aligned(tensor.nbytes)
    return views


def host_pages(num_bytes: int) -> Tensor:
    """Return bytes of host memory in whole pages of their own, so that they can be page-locked."""
    return torch.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), dtype=torch.uint8)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
