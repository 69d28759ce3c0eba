"""Many forward passes at once, layer by layer: all of them through a layer before the next one.

The passes are coroutines. Each runs the model's own code up to its next decoder layer and waits
there, so that nothing of a model's forward is copied, whatever it does between its layers. What
runs a layer then sees the calls of all passes: it can load the layer's weights once for all of
them, or measure its inputs and change it before the passes go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from typing import Any, NamedTuple, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from transformers import PreTrainedModel

from trl_grpo_ext.errors import LayerOrderError

Result = TypeVar("Result")


class LayerCall(NamedTuple):
    """One pass's call of a layer.

    Attributes:
        args: Of the layer.
        kwargs: Of the layer.
        enter_modes: Sets grad mode and autocast to what they are in the pass.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    enter_modes: Callable[[], None]

    def run(self, layer: nn.Module) -> Any:
        """Return the layer's output for this call, in the modes of its pass.

        The layer's own hooks are left out: they run in the pass.
        """
        with _kept_modes():
            self.enter_modes()
            return layer.forward(*self.args, **self.kwargs)


RunLayer = Callable[[int, nn.Module, Sequence[LayerCall]], Sequence[Any]]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a causal language model, in the order they run in.

    Raises:
        LayerOrderError: the model has no list of ``num_hidden_layers`` layers.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    for module in model.base_model.modules():  # outer ones first: not a list of experts
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise LayerOrderError(
        f"{type(model).__name__} has no list of `num_hidden_layers`={count} layers, "
        "so it cannot run layer by layer. "
        "Use `reference: resident`, or `quantized` without calibration."
    )


def call_each(_: int, layer: nn.Module, calls: Sequence[LayerCall]) -> list[Any]:
    """Run a layer on one call after the other: what a plain forward pass does."""
    return [call.run(layer) for call in calls]


def run_layerwise(
    layers: Sequence[nn.Module],
    passes: Sequence[Callable[[], Result]],
    run_layer: RunLayer = call_each,
) -> list[Result]:
    """Return what each pass returns, after running all of them in step, layer by layer.

    A pass has its own grad mode, autocast and context variables, as if it ran alone; passes of
    weights that require gradients use one autocast type, since torch keeps its casts of them. Other
    modes of torch, such as ``inference_mode``, belong around this function and not into a pass.

    Args:
        layers: That each pass calls once, in this order.
        passes: Each runs a forward pass of the model that holds the layers.
        run_layer: From the index of a layer, the layer, and one call a pass, to the layer's output
            for each call. It runs in the modes of the caller; ``call.run(layer)`` changes to those
            of the pass.

    Returns:
        One result a pass, in their order.

    Raises:
        LayerOrderError: a pass calls the layers in another order, or not all of them.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> inputs = [torch.ones(1, 2), torch.zeros(3, 2)]
        >>> order = []
        >>> def run_layer(index, layer, calls):
        ...     order.append((index, len(calls)))
        ...     return call_each(index, layer, calls)
        >>> found = run_layerwise(list(model), [lambda x=x: model(x) for x in inputs], run_layer)
        >>> order, torch.equal(found[1], model(inputs[1]))
        ([(0, 2), (1, 2)], True)
    """
    if not passes:
        return []
    with _waiting_layers(layers), _coroutines(passes) as running:
        replies: Sequence[Any] = [_resume(coroutine) for coroutine in running]
        for index, layer in enumerate(layers):
            calls = [_expected_call(reply, index=index) for reply in replies]
            outputs = run_layer(index, layer, calls)
            pairs = zip(running, outputs, strict=True)
            replies = [_resume(coroutine, output) for coroutine, output in pairs]
        if not all(coroutine.dead for coroutine in running):
            raise _order_error("another layer", "its end")
        return list(replies)


class _Waiting(NamedTuple):
    """What a pass hands to the hub when it reaches a layer."""

    layer: int
    call: LayerCall


@contextmanager
def _waiting_layers(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, a pass that calls a layer hands the call to the hub and waits for its output."""
    hub = getcurrent()
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(restore_forward, layer, vars(layer).get("forward"))
            layer.forward = _waiting(layer.forward, index, hub)
        yield


def restore_forward(layer: nn.Module, original: Callable[..., Any] | None) -> None:
    """Undo an assignment to ``layer.forward``; ``original`` is what the layer itself had there."""
    if original is None:
        del layer.forward
    else:
        layer.forward = original


def _waiting(forward: Callable[..., Any], index: int, hub: greenlet) -> Callable[..., Any]:
    def wait_or_run(*args: Any, **kwargs: Any) -> Any:
        if getcurrent() is hub:
            return forward(*args, **kwargs)
        enter_modes = _snapshot()
        output = hub.switch(_Waiting(index, LayerCall(args, kwargs, enter_modes)))
        enter_modes()
        return output

    return wait_or_run


@contextmanager
def _coroutines(passes: Sequence[Callable[[], Any]]) -> Iterator[list[greenlet]]:
    running = [greenlet(run) for run in passes]
    for coroutine in running:
        coroutine.gr_context = copy_context()  # a greenlet would start with none
    with ExitStack() as stack:
        for coroutine in running:
            stack.callback(coroutine.throw)  # ends what an error left waiting
        yield running


def _resume(coroutine: greenlet, *output: Any) -> Any:
    """Run a pass to its next layer, or to its end."""
    with _kept_modes():
        return coroutine.switch(*output)


def _expected_call(reply: Any, *, index: int) -> LayerCall:
    if not isinstance(reply, _Waiting) or reply.layer != index:
        found = f"layer {reply.layer}" if isinstance(reply, _Waiting) else "its end"
        raise _order_error(found, f"layer {index}")
    return reply.call


def _order_error(found: str, expected: str) -> LayerOrderError:
    return LayerOrderError(
        f"A forward pass reached {found} where {expected} was expected: the model does not run its "
        "layers once each, in order, so its passes cannot run in step. "
        "Use `reference: resident`, or `quantized` without calibration."
    )


@contextmanager
def _kept_modes() -> Iterator[None]:
    restore = _snapshot()
    try:
        yield
    finally:
        restore()


def _snapshot() -> Callable[[], None]:
    """Return what sets this thread's grad mode and autocast to what they are now."""
    grad = torch.is_grad_enabled()
    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    casts = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]

    def enter() -> None:
        torch.set_grad_enabled(grad)
        for device, enabled, dtype in casts:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)

    return enter
