"""The pieces for a hand-written training loop, without a trainer.

``group_sample`` draws groups of completions, ``compute_rewards`` scores them, ``group_advantages``
compares each with its group, ``grpo_loss`` is the objective. ``examples/training_loop.py`` puts
them together in 40 lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trl_grpo_ext.advantages import group_advantages, multi_reward_advantages, step_advantages
from trl_grpo_ext.losses import grpo_loss
from trl_grpo_ext.rewards.scores import checked_scores
from trl_grpo_ext.sampling import group_sample, token_logprobs

__all__ = [
    "compute_rewards",
    "group_advantages",
    "group_sample",
    "grpo_loss",
    "multi_reward_advantages",
    "step_advantages",
    "token_logprobs",
]


def compute_rewards(
    reward_funcs: Callable[..., Any] | Sequence[Callable[..., Any]],
    *,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    **columns: Sequence[Any],
) -> Tensor:
    """Return what each reward function gives to each completion.

    Args:
        reward_funcs: TRL reward functions: called with ``prompts``, ``completions`` and the columns
            by keyword, they return one number, or ``None``, a completion.
        prompts: ``B`` prompts, one a completion.
        completions: ``B`` completions.
        **columns: ``B`` values each, such as the right answers.

    Returns:
        Shape ``(B, R)``, float32, reward units; NaN where a function gave ``None`` or a number that
        is not finite.

    Raises:
        ValueError: an argument is not of length ``B``, or there is no reward function.
        RewardError: a function returned something else than one number or ``None`` a completion.

    Example:
        >>> def length(*, completions, **_):
        ...     return [len(completion) for completion in completions]
        >>> compute_rewards(length, prompts=["p", "p"], completions=["a", "bcd"])
        tensor([[1.],
                [3.]])
    """
    funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    if not funcs:
        raise ValueError("`reward_funcs` is empty; pass at least one reward function.")
    for name, values in {"prompts": prompts, **columns}.items():
        if len(values) != len(completions):
            raise ValueError(
                f"`{name}` has {len(values)} values for "
                f"{len(completions)} completions; give one each."
            )
    rewards = [_scores(func, prompts=prompts, completions=completions, **columns) for func in funcs]
    return torch.tensor(rewards, dtype=torch.float32).T.contiguous()


def _scores(func: Callable[..., Any], **kwargs: Any) -> list[float]:
    name = getattr(func, "__name__", type(func).__name__)
    scores, _ = checked_scores(
        func(**kwargs), name=name, num_completions=len(kwargs["completions"])
    )
    return [torch.nan if score is None else score for score in scores]
