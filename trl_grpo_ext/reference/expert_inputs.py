"""What the experts of a mixture get as inputs, measured one expert after the other.

transformers computes experts in several ways, eagerly or by grouped products; this needs none of
them. The tokens that a router sends to an expert are an argument of the module that holds the
experts, and what lies between the two matrices of an expert is in the interface that marks such
modules (``use_experts_implementation``). So the policy runs as it is configured, and the moments of
one expert are in memory at a time.

Shapes: ``N`` tokens, ``K`` experts of a token, ``I`` input features.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trl_grpo_ext.reference.moments import estimated_moments, outer_sum


class RoutedTokens(NamedTuple):
    """Tokens that reached a module of experts.

    Attributes:
        hidden_NI: Their hidden states.
        experts_NK: The experts that each is sent to.
    """

    hidden_NI: Tensor
    experts_NK: Tensor


@contextmanager
def recorded_routing(
    layer: nn.Module, names: Sequence[str]
) -> Iterator[dict[str, list[RoutedTokens]]]:
    """Within it, each call of these submodules, which hold experts, is noted under its name."""
    found: dict[str, list[RoutedTokens]] = {name: [] for name in names}

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str) -> None:
        found[name].append(RoutedTokens(*(*args, *kwargs.values())[:2]))

    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(
            functools.partial(record, name=name), with_kwargs=True
        )
        for name in names
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def real_tokens(calls: Sequence[RoutedTokens], masks_BW: Sequence[Tensor]) -> RoutedTokens:
    """Return the tokens of all calls, without padding: 1 in a call's mask is a token."""
    chosen = [
        [tensor[mask_BW.flatten().bool()] for tensor in call]
        for call, mask_BW in zip(calls, masks_BW, strict=True)
    ]
    return RoutedTokens(*(torch.cat(parts) for parts in zip(*chosen, strict=True)))


def expert_moments(experts: nn.Module, tokens: RoutedTokens) -> Iterator[dict[str, Tensor]]:
    """Return, for one expert after the other, the second moments of the inputs of its matrices.

    An expert gets few tokens, or none. For its first matrix, those of all tokens of the module are
    the prior; between its matrices, where features of one expert are not those of another, it is
    that features are not correlated.

    Args:
        experts: Of the policy; transformers' interface for experts has marked it.
        tokens: That reached it.

    Yields:
        By the name of the parameter, shape ``(I, I)``, float32. Without a token, those of the
        second matrix are 0.
    """
    block: Any = experts
    first = "gate_up_proj" if block.has_gate else "up_proj"
    common_II = outer_sum(tokens.hidden_NI) / max(len(tokens.hidden_NI), 1)
    for expert in range(len(getattr(block, first))):
        rows_NI = tokens.hidden_NI[(tokens.experts_NK == expert).any(dim=1)]
        inner_NI = _between(block, first, expert, rows_NI)
        yield {
            first: estimated_moments(outer_sum(rows_NI), num_rows=len(rows_NI), prior_II=common_II),
            "down_proj": estimated_moments(outer_sum(inner_NI), num_rows=len(inner_NI)),
        }


def _between(block: Any, first: str, expert: int, rows_NI: Tensor) -> Tensor:
    """Inputs of an expert's second matrix for these inputs of its first."""
    weight = getattr(block, first)[expert]
    bias = getattr(block, f"{first}_bias")[expert] if block.has_bias else None
    outputs = nn.functional.linear(rows_NI, weight.T if block.is_transposed else weight, bias)
    inner_NI: Tensor = block._apply_gate(outputs) if block.has_gate else block.act_fn(outputs)
    return inner_NI
