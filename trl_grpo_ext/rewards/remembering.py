"""Rewards that remember something of a run: what of it a checkpoint keeps.

Such a reward has the methods ``state_dict()`` and ``load_state_dict(state)``, and an attribute
``frozen``, which is set during an evaluation: nothing is to be learned from its completions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trl_grpo_ext.errors import RewardError


def remembers(reward: object) -> bool:
    """Return whether a reward remembers something; a model's weights are no memory of a run."""
    return hasattr(reward, "load_state_dict") and not isinstance(reward, nn.Module)


def plain_state(state: Any, *, name: str) -> Any:
    """Return a copy of a state that a checkpoint can keep: numbers, texts, tensors, lists, dicts.

    Args:
        state: What ``state_dict()`` returned. Numbers of NumPy become plain ones.
        name: Of the reward.

    Raises:
        RewardError: something else is in it.

    Example:
        >>> plain_state({"mean": 0.5, "seen": (1, 2)}, name="mine")
        {'mean': 0.5, 'seen': [1, 2]}
    """
    if state is None or isinstance(state, bool | int | float | str):
        return _plain_number(state)
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {str(key): plain_state(value, name=name) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain_state(value, name=name) for value in state]
    if hasattr(state, "item") and getattr(state, "size", 0) == 1:
        return plain_state(state.item(), name=name)
    raise RewardError(
        f"The reward '{name}' has a {type(state).__name__} in its `state_dict()`, which a "
        "checkpoint cannot keep. Return numbers, texts, tensors, and lists and dicts of these."
    )


def _plain_number(value: Any) -> Any:
    for kind in (bool, int, float, str):  # numpy.float64 is a float, and none that is read again
        if isinstance(value, kind):
            return kind(value)
    return value
