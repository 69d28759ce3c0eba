"""A way into a model's attention: the caller hands over what computes it, layer by layer.

transformers looks up the attention function of a model by name, in its attention interface, and
passes on the keyword arguments of the model's forward. :func:`route_attention` wraps the function
under the model's name once: called with ``shared_prefix=...``, it hands queries, keys and values to
that object; without, it is the function that was there. Nothing of the model's code or
configuration changes, so that gradient checkpointing, PEFT and distributed wrappers see the model
that they know.

Shapes: ``N`` tokens of a row, ``S`` of a prefix, ``H`` heads, ``K`` key-value heads, ``D`` width of
a head.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_grpo_ext.errors import SharedPrefixError

# What changes attention beyond causal order and scale; transformers passes them by these names.
_OTHER_ATTENTION = ("softcap", "s_aux", "position_bias")


class SharedAttention(Protocol):
    """Computes the attention of every layer, for tokens that it knows the order of."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None
    ) -> Tensor:
        """Return the attention's output, ``(batch, N, H, D)``.

        Queries have shape ``(batch, H, N, D)``, keys and values ``(batch, K, N, D)``; positions
        are applied. ``scaling`` is ``1/sqrt(D)`` if ``None``.
        """
        ...


def route_attention(model: PreTrainedModel) -> None:
    """Make the model's attention obey ``model(..., shared_prefix=...)``; harmless if done twice.

    Raises:
        SharedPrefixError: the model's attention is not looked up in transformers' interface.
    """
    name = text_config(model)._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS or name.startswith(("paged", "flex")):
        raise SharedPrefixError(
            f"the model's attention implementation is {name!r}, which cannot be routed. "
            "Load the model with attn_implementation='sdpa'."
        )
    original = ALL_ATTENTION_FUNCTIONS[name]
    if not hasattr(original, "routes_shared_prefix"):
        AttentionInterface.register(name, _routed(original))


def _routed(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        shared_prefix: SharedAttention | None = None,
        **kwargs: Any,
    ) -> Any:
        if shared_prefix is None:
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        if found := [name for name in _OTHER_ATTENTION if kwargs.get(name) is not None]:
            raise SharedPrefixError(
                f"{type(module).__name__} uses {', '.join(found)}, which attention over a shared "
                "prefix does not compute. Set `shared_prefix: never`."
            )
        layer: Any = module.layer_idx
        attended = shared_prefix.attend(layer, query, key, value, scaling=kwargs.get("scaling"))
        return attended, None

    attention.routes_shared_prefix = True  # type: ignore[attr-defined]
    return attention


def shared_prefix_problem(model: PreTrainedModel, *, longest: int) -> str | None:
    """Return why rows of up to ``longest`` tokens cannot share a prefix exactly; ``None`` if so.

    It reads the configuration. What that does not show, a comparison of the first batch does
    (``verify_shared_prefix``).
    """
    parameters = inspect.signature(model.base_model.forward).parameters.values()
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
        return "it hands no further arguments on to its attention"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "its weights are on several devices"
    config = text_config(model)
    if config._attn_implementation not in ALL_ATTENTION_FUNCTIONS:
        return f"its attention implementation is {config._attn_implementation!r}"
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of another kind than attention ({', '.join(sorted(others))})"
    window = sliding_window(model)
    if window is not None and window < longest:
        return f"its sliding window of {window} tokens is shorter than some rows"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention has a softcap"
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        return "its attention has sinks"
    for kind, limit in changing_angles(model):
        if limit < longest:
            return f"its {kind} rotary angles depend on the length of rows above {limit} tokens"
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < longest and not hasattr(config, "rope_parameters"):
        return f"it has {positions} learned positions, fewer than a row of {longest}"
    return None


def padding_problem(model: PreTrainedModel, *, longest: int) -> str | None:
    """Return why a padded row of ``longest`` tokens may differ from it alone; ``None`` if not."""
    config = text_config(model)
    if getattr(config, "rope_parameters", None) is None:
        return "the policy's positions are not rotary, and may count padding"
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return "the policy has layers of another kind than attention"
    for kind, limit in changing_angles(model):
        if limit < longest:
            return f"its {kind} rotary angles depend on the length of rows above {limit} tokens"
    return None


def changing_angles(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """Yield rotary angles that depend on the longest row of a batch, and from where on."""
    config = text_config(model)
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in [parameters] if "rope_type" in parameters else parameters.values():
        if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings")
            yield rope["rope_type"], original or config.max_position_embeddings


def sliding_window(model: PreTrainedModel) -> int | None:
    """Return how many tokens back the narrowest layer sees; ``None`` for all."""
    config = text_config(model)
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return window if "sliding_attention" in kinds else None


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the configuration of the language model in ``model``."""
    config: PreTrainedConfig = model.config.get_text_config()
    return config


def shared_prefix_inputs(
    input_ids: Tensor, position_ids: Tensor, shared_prefix: SharedAttention
) -> dict[str, Any]:
    """Return the arguments of a forward pass whose attention is ``shared_prefix``.

    The model gets a stand-in for its mask, so that it builds none of its own, and no cache. A
    mixture of experts computes no auxiliary loss, which would read the mask.
    """
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device),
        "use_cache": False,
        "output_router_logits": False,
        "shared_prefix": shared_prefix,
    }


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    make_mask: Callable[[int, int], Tensor] | None = None,
) -> Tensor:
    """Return causal attention; the queries are the last of the keys' tokens.

    Args:
        query: Shape ``(batch, N, H, D)``.
        key: Shape ``(batch, S, K, D)``, with ``S >= N``.
        value: As ``key``.
        scaling: ``1/sqrt(D)`` if ``None``.
        make_mask: Which of ``S`` keys each of ``N`` queries sees, from ``N`` and ``S``; by default
            what is fastest on the device. A mask in memory must be on it.

    Returns:
        Shape ``(batch, N, H, D)``; under autocast in its dtype.
    """
    query, key, value = (_autocast(x).transpose(1, 2) for x in (query, key, value))
    if query.device.type == "cuda" and query.dtype == torch.float32:
        # Only the kernels of half precision share heads; otherwise all weights would be in memory.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = None
    if num_queries != num_keys:
        if make_mask is None:  # kernels of CUDA alone know this order without a mask in memory
            in_memory = functools.partial(lower_right_mask, device=query.device)
            make_mask = causal_lower_right if query.device.type == "cuda" else in_memory
        mask = make_mask(num_queries, num_keys)
    attended: Tensor = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2)


def lower_right_mask(num_queries: int, num_keys: int, device: torch.device | None = None) -> Tensor:
    """Return what ``causal_lower_right`` stands for, as booleans of shape ``(N, S)``.

    Examples:
        >>> lower_right_mask(2, 3).int().tolist()
        [[1, 1, 0], [1, 1, 1]]
    """
    every = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return every.tril(num_keys - num_queries)


def _autocast(values: Tensor) -> Tensor:
    """As autocast has them for attention, which torch's bias looks at before autocast does."""
    kind = values.device.type
    return values.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else values
