"""Per-token log-probabilities over packed groups, in the place of a padded forward pass.

Shapes: ``B`` completions, ``W`` columns of the padded batch, ``T`` of them for completions, ``N``
tokens of the packed row, ``L`` completion tokens in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel
from transformers.utils import logging

from trl_grpo_ext.attention import (
    route_attention,
    shared_prefix_problem,
    text_config,
)
from trl_grpo_ext.errors import SharedPrefixError
from trl_grpo_ext.logprobs.packing import PackedGroups, pack_groups

logger = logging.get_logger(__name__)

# Largest difference of a log-probability from the padded path that is rounding, in nats.
FLOAT32_TOLERANCE = 1e-3  # [nats] of any token; 2e-5 was measured on 30 layers
HALF_TOLERANCE = 0.1  # [nats] mean over tokens; a wrong mask or position costs 1 and more

Logprobs = tuple[Tensor, Tensor | None]  # log-probabilities and entropies, both (B, T)


def prepare_shared_prefix(model: PreTrainedModel) -> None:
    """Make ``model(..., shared_prefix=groups)`` compute packed groups, scored positions only.

    Other calls are as before. Doing it twice changes nothing.

    Args:
        model: A causal language model of transformers, not wrapped (PEFT: the base model).

    Raises:
        SharedPrefixError: the model's attention cannot be routed.
    """
    route_attention(model)
    backbone = model.base_model
    if _select_scored not in backbone._forward_hooks.values():
        backbone.register_forward_hook(_select_scored, with_kwargs=True)


def _select_scored(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Keep the hidden states that predict a label, so that the LM head projects no others."""
    groups = kwargs.get("shared_prefix")
    if isinstance(groups, PackedGroups):
        if not groups.attended.count:
            raise SharedPrefixError(
                f"{type(module).__name__} does not hand `shared_prefix` on to its attention, which "
                "computed something else. Set `shared_prefix: never`."
            )
        output.last_hidden_state = output.last_hidden_state.index_select(1, groups.scored_L)
    return output


def shared_prefix_logprobs(
    forward: Callable[[PackedGroups], Logprobs],
    input_ids_BW: Tensor,
    attention_mask_BW: Tensor,
    *,
    num_labels: int,
    batch_size: int | None = None,
    max_tokens: int = 0,
) -> Logprobs:
    """Return log-probabilities and entropies of the completion tokens, ``(B, T)``, 0 on padding.

    Args:
        forward: From packed groups to values of their labels, ``(1, L)`` each.
        input_ids_BW: Prompts, padded on the left, then completions, padded on the right.
        attention_mask_BW: 1 on their tokens.
        num_labels: ``T``.
        batch_size: Completions a forward pass; all if not given.
        max_tokens: If all of them, packed, are no more tokens than this, they are one pass.
    """
    if batch_size is None or max_tokens:
        all_groups = pack_groups(input_ids_BW, attention_mask_BW, num_labels=num_labels)
        if batch_size is None or all_groups.num_tokens <= max_tokens:
            return _unpacked(forward, all_groups)
    batches = (torch.split(x, batch_size) for x in (input_ids_BW, attention_mask_BW))
    parts = [
        _unpacked(forward, pack_groups(ids, mask, num_labels=num_labels))
        for ids, mask in zip(*batches, strict=True)
    ]
    entropies = [part[1] for part in parts if part[1] is not None]
    return torch.cat([part[0] for part in parts]), torch.cat(entropies) if entropies else None


def _unpacked(forward: Callable[[PackedGroups], Logprobs], groups: PackedGroups) -> Logprobs:
    logprobs, entropies = forward(groups)
    return groups.unpack(logprobs), None if entropies is None else groups.unpack(entropies)


@dataclass
class SharedPrefix:
    """Whether forward passes share prefixes, model by model; it says once why one does not.

    Attributes:
        mode: ``"auto"`` falls back to the padded path where sharing is not exact, ``"always"``
            raises there, ``"never"`` always takes the padded path.
        verify: Whether the first batch of each model is compared with the padded path.
    """

    mode: str = "auto"
    verify: bool = True
    _verified: WeakSet[nn.Module] = field(default_factory=WeakSet)
    _refused: WeakKeyDictionary[nn.Module, str] = field(default_factory=WeakKeyDictionary)
    _told: set[str] = field(default_factory=set)

    def serves(self, model: PreTrainedModel, *, longest: int, problem: str | None = None) -> bool:
        """Return whether rows of up to ``longest`` tokens of this model go through shared prefixes.

        Args:
            model: Not wrapped.
            longest: Tokens of the longest row, over all processes.
            problem: Why this call cannot, if the caller knows a reason.

        Raises:
            SharedPrefixError: the mode is ``"always"``, and they cannot.
        """
        if self.mode == "never":
            return False
        problem = problem or self._refused.get(model) or _problem(model, longest=longest)
        if problem is not None:
            self._tell(problem)
            return False
        return True

    def needs_check(self, model: PreTrainedModel) -> bool:
        """Return whether the model is still to be compared with the padded path."""
        return self.verify and model not in self._verified

    def judge(self, model: PreTrainedModel, difference: float, *, tolerance: float) -> bool:
        """Return whether a difference is rounding; if not, this model shares no prefix any more.

        Raises:
            SharedPrefixError: the mode is ``"always"``, and it is not.
        """
        self._verified.add(model)
        if difference <= tolerance:
            return True
        return self.refuse(
            model,
            f"its log-probabilities differ from the padded path's by {difference:.2g} nats "
            f"(tolerance {tolerance:g})",
        )

    def refuse(self, model: PreTrainedModel, reason: str) -> Literal[False]:
        """Share no prefix for this model any more.

        Raises:
            SharedPrefixError: the mode is ``"always"``.
        """
        self._refused[model] = reason
        self._tell(reason)
        return False

    def _tell(self, reason: str) -> None:
        if self.mode == "always":
            raise SharedPrefixError(
                f"`shared_prefix` is 'always', but the model cannot share a prefix: {reason}. "
                "Set `shared_prefix: auto` to have such batches padded."
            )
        if reason not in self._told:
            self._told.add(reason)
            logger.warning(f"log-probabilities take the padded path, as in plain TRL: {reason}")


def difference_in_nats(
    shared_BT: Tensor, padded_BT: Tensor, mask_BT: Tensor, *, half_precision: bool
) -> tuple[float, float]:
    """Return how far two computations of the same log-probabilities are apart, and the tolerance.

    In float32 the largest difference counts; in half precision the mean over the tokens, since
    rounding alone moves single unlikely tokens by tenths.
    """
    distance_BT = (shared_BT - padded_BT).abs().float() * mask_BT
    if half_precision:
        return float(distance_BT.sum() / mask_BT.sum().clamp(min=1)), HALF_TOLERANCE
    return float(distance_BT.max()), FLOAT32_TOLERANCE


def has_dropout(model: nn.Module) -> bool:
    """Return whether a forward pass of the model drops anything out in training.

    Read off the modules: dropout layers, and rates such as ``attention_dropout`` or ``layerdrop``.
    """
    layers = any(isinstance(m, _DropoutNd) and m.p > 0 for m in model.modules())
    rates = (
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if "drop" in name and isinstance(value, float)
    )
    return layers or any(rate > 0 for rate in rates)


def _problem(model: PreTrainedModel, *, longest: int) -> str | None:
    if problem := shared_prefix_problem(model, longest=longest):
        return problem
    config = text_config(model)
    if not hasattr(config, "rope_parameters") or getattr(config, "alibi", False):
        return "its positions are not rotary, so that in TRL's path they depend on the padding"
    try:
        prepare_shared_prefix(model)
    except SharedPrefixError as error:
        return str(error)
    return None
