"""Group-relative advantages: pure functions from rewards to advantages.

Shapes: ``B`` completions of the global batch (= ``P`` x ``G``), ``P`` prompts, ``G`` group size,
``R`` reward functions, ``T`` tokens of a completion, ``S`` = ``G`` x ``T``. Rows
``p*G .. p*G+G-1`` are the completions of prompt ``p``. NaN marks a reward that was not given.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

AdvantageBaseline = Literal["mean", "leave_one_out"]
StepBaseline = Literal["group", "position"]
RewardScale = Literal["group", "batch", "none"]
RewardAggregation = Literal["sum_then_normalize", "normalize_then_sum"]

STD_EPS = 1e-4  # [reward] TRL's value, so that the defaults equal TRL


def group_advantages(
    rewards_B: Tensor,
    *,
    group_size: int,
    baseline: AdvantageBaseline = "mean",
    scale: RewardScale = "group",
    eps: float = STD_EPS,
    clip: float | None = None,
) -> Tensor:
    r"""Return how much better each completion scored than the rest of its group.

    .. math:: A_{p,g} = \frac{r_{p,g} - b_{p,g}}{\mathrm{std}(r) + \epsilon}

    The baseline :math:`b` is the mean of the group, or of the other completions of the group; std
    is the sample deviation (n - 1). NaN marks a completion that no reward could score: it is left
    out of every mean and deviation, and its advantage is 0. The arithmetic is done in float64.

    Args:
        rewards_B: Shape ``(B,)``, reward units.
        group_size: ``G``, at least 2.
        baseline: ``"mean"`` of the group [1], or ``"leave_one_out"``: of its other members, so that
            the baseline does not depend on the completion's own reward [3].
        scale: What to divide by: the deviation of the ``"group"`` [1], of the ``"batch"``, or
            ``"none"`` [2].
        eps: Added to the deviation, reward units, not negative.
        clip: Largest size that an advantage keeps, positive, in the unit of the result; ``None``
            for no limit. An advantage beyond it becomes ``clip`` or ``-clip``.

    Returns:
        Shape ``(B,)``, dtype and device of the input; dimensionless, or reward units for
        ``"none"``. Exactly 0 throughout a group whose scored rewards are all equal, or of which
        fewer than two were scored.

    Raises:
        ValueError: a shape, ``group_size``, ``baseline``, ``scale``, ``eps`` or ``clip`` is out of
            its range.

    References:
        [1] Shao et al. 2024, DeepSeekMath, section 4.1, arXiv:2402.03300.
        [2] Liu et al. 2025, section 3, arXiv:2503.20783.
        [3] Ahmadian et al. 2024, section 3.3, arXiv:2402.14740.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]), group_size=2, scale="none")
        tensor([ 0.5000, -0.5000,  0.5000, -0.5000])
    """
    if rewards_B.dim() != 1:
        raise ValueError(
            f"`rewards_B` has shape {tuple(rewards_B.shape)}; "
            "pass one reward a completion, shape (B,)."
        )
    _check(rewards_B.shape[0], group_size, baseline=baseline, scale=scale, eps=eps, clip=clip)
    rewards_PG = rewards_B.double().view(-1, group_size)
    centred_PG = _centred(rewards_PG, baseline)
    advantages_PG = centred_PG / _scale(rewards_PG, scale, eps)
    advantages_PG = advantages_PG.masked_fill(_silent(rewards_PG)[:, None], 0.0)
    return _clipped(advantages_PG.nan_to_num(nan=0.0).view(-1), clip).to(rewards_B.dtype)


def multi_reward_advantages(
    rewards_BR: Tensor,
    *,
    group_size: int,
    weights_R: Tensor | None = None,
    aggregation: RewardAggregation = "sum_then_normalize",
    baseline: AdvantageBaseline = "mean",
    scale: RewardScale = "group",
    eps: float = STD_EPS,
    clip: float | None = None,
) -> Tensor:
    r"""Return the group-relative advantages of completions that several reward functions scored.

    ``sum_then_normalize`` takes the advantage of the weighted sum of the rewards.
    ``normalize_then_sum`` takes the weighted sum of each reward's own advantage within the group,
    then standardizes that sum over the batch, so that a reward of small spread is not drowned [1];
    ``scale`` has no say there.

    Args:
        rewards_BR: Shape ``(B, R)``, reward units; NaN where a reward function does not apply. A
            completion counts as unscored, with advantage 0, if all its rewards are NaN.
        group_size: ``G``, at least 2.
        weights_R: Shape ``(R,)``; all 1 if not given.
        aggregation: ``"sum_then_normalize"`` or ``"normalize_then_sum"``.
        baseline: As in :func:`group_advantages`.
        scale: As in :func:`group_advantages`.
        eps: As in :func:`group_advantages`.
        clip: As in :func:`group_advantages`; the last thing done.

    Returns:
        Shape ``(B,)``, dtype and device of the input. Exactly 0 throughout a group that says
        nothing: all its rewards are equal (each of them, for ``normalize_then_sum``), or fewer than
        two completions were scored.

    Raises:
        ValueError: a shape or an option is out of its range.

    References:
        [1] Liu et al. 2026, GDPO, arXiv:2601.05242.

    Example:
        >>> rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> weights = torch.tensor([2.0, 1.0])
        >>> multi_reward_advantages(rewards, group_size=2, weights_R=weights, scale="none")
        tensor([ 1., -1.])
    """
    _check_rewards(rewards_BR, aggregation)
    _check(rewards_BR.shape[0], group_size, baseline=baseline, scale=scale, eps=eps, clip=clip)
    weights_R = torch.ones(rewards_BR.shape[1]) if weights_R is None else weights_R
    if aggregation == "sum_then_normalize":
        summed_B = weighted_reward(rewards_BR, weights_R)
        return group_advantages(
            summed_B, group_size=group_size, baseline=baseline, scale=scale, eps=eps, clip=clip
        ).to(rewards_BR.dtype)
    return _clipped(_normalize_then_sum(rewards_BR, weights_R, group_size, baseline, eps), clip)


def step_advantages(
    step_rewards_BT: Tensor,
    *,
    group_size: int,
    baseline: StepBaseline = "group",
    scale: RewardScale = "group",
    eps: float = STD_EPS,
) -> Tensor:
    r"""Return what each token's step and the steps after it earned, against the group's steps.

    .. math:: A_{g,t} = \sum_{j:\, e_{g,j} \ge t}
        \frac{r_{g,j} - b_j}{\mathrm{std} + \epsilon}

    :math:`e_{g,j}` is the last token of step :math:`j` of completion :math:`g`, and the deviation
    is that of what stands above the line. The arithmetic is done in float64.

    Args:
        step_rewards_BT: Shape ``(B, T)``, reward units: the reward of a step at its last token, NaN
            at all other tokens. A row of NaN is a completion that was not scored.
        group_size: ``G``, at least 2.
        baseline: :math:`b_j`: the mean over all steps of the ``"group"`` [1], or over the group's
            steps at the same ``"position"``. By the first, a step that scores like those of the
            others at its place has a negative advantage if later steps score lower than earlier
            ones; by the second it has none.
        scale: What to divide by: the deviation of the steps of the ``"group"`` [1], of those of the
            ``"batch"``, or ``"none"``.
        eps: Added to the deviation, reward units, not negative.

    Returns:
        Shape ``(B, T)``, dtype and device of the input; dimensionless, or reward units for
        ``"none"``. Exactly 0 after the last step, throughout a completion without scores, and
        throughout a group whose steps are all equal to their baseline, or of which fewer than two
        were scored.

    Raises:
        ValueError: a shape, ``group_size``, ``baseline``, ``scale`` or ``eps`` is out of its range.

    References:
        [1] Shao et al. 2024, DeepSeekMath, section 4.1.3, arXiv:2402.03300.

    Example:
        >>> nan = float("nan")  # two steps of rewards 1 and 0, against one step of reward 2
        >>> rewards = torch.tensor([[nan, 1.0, 0.0], [nan, nan, 2.0]])
        >>> step_advantages(rewards, group_size=2, scale="none")
        tensor([[-1., -1., -1.],
                [ 1.,  1.,  1.]])
    """
    if step_rewards_BT.dim() != 2:
        raise ValueError(
            f"`step_rewards_BT` has shape {tuple(step_rewards_BT.shape)}; "
            "pass (completions, tokens)."
        )
    _check(len(step_rewards_BT), group_size, scale=scale, eps=eps)
    if baseline not in get_args(StepBaseline):
        known = ", ".join(get_args(StepBaseline))
        raise ValueError(f"`baseline` is {baseline!r}; use one of {known}.")
    rewards_PS = _against_position(step_rewards_BT.double(), group_size, baseline)
    earned_PS = _centred(rewards_PS, "mean") / _scale(rewards_PS, scale, eps)
    earned_PS = earned_PS.masked_fill(_silent(rewards_PS)[:, None], 0.0).nan_to_num(nan=0.0)
    earned_BT = earned_PS.view(step_rewards_BT.shape)
    return earned_BT.flip(1).cumsum(dim=1).flip(1).to(step_rewards_BT.dtype)


def informative_groups(
    rewards_BR: Tensor,
    *,
    group_size: int,
    weights_R: Tensor | None = None,
    aggregation: RewardAggregation = "sum_then_normalize",
) -> Tensor:
    """Return which groups teach something: those within which the rewards that count differ.

    Under ``sum_then_normalize`` that is the weighted sum of the rewards, under
    ``normalize_then_sum`` any reward whose weight is not 0. What was not scored is left out.

    Args:
        rewards_BR: As in :func:`multi_reward_advantages`.
        group_size: ``G``, at least 2.
        weights_R: Shape ``(R,)``; all 1 if not given.
        aggregation: As in :func:`multi_reward_advantages`.

    Returns:
        Shape ``(P,)``, booleans; false for a group of which fewer than two were scored.

    Raises:
        ValueError: a shape or an option is out of its range.

    References:
        Yu et al. 2025, DAPO, section 3.2 (dynamic sampling), arXiv:2503.14476.

    Example:
        >>> informative_groups(torch.tensor([[1.0], [0.0], [1.0], [1.0]]), group_size=2)
        tensor([ True, False])
    """
    _check_rewards(rewards_BR, aggregation)
    _check(rewards_BR.shape[0], group_size)
    weights_R = torch.ones(rewards_BR.shape[1]) if weights_R is None else weights_R
    if aggregation == "sum_then_normalize":
        return ~_silent(weighted_reward(rewards_BR, weights_R).view(-1, group_size))
    _check_weights(rewards_BR, weights_R)
    counting_BR = rewards_BR[:, weights_R.to(rewards_BR.device) != 0]
    columns = [column_B.view(-1, group_size) for column_B in counting_BR.T.contiguous()]
    none_P = torch.zeros(len(rewards_BR) // group_size, dtype=torch.bool, device=rewards_BR.device)
    return torch.stack([none_P, *(~_all_equal(column_PG) for column_PG in columns)]).any(dim=0)


def informative_step_groups(
    step_rewards_BT: Tensor, *, group_size: int, baseline: StepBaseline = "group"
) -> Tensor:
    """Return which groups have steps whose rewards differ.

    Args:
        step_rewards_BT: As in :func:`step_advantages`, like the others.
        group_size: ``G``, at least 2.
        baseline: What steps are compared with.

    Returns:
        Shape ``(P,)``, booleans.

    Example:
        >>> nan = float("nan")
        >>> informative_step_groups(torch.tensor([[1.0, 0.0], [nan, 1.0]]), group_size=2)
        tensor([True])
    """
    return ~_silent(_against_position(step_rewards_BT.double(), group_size, baseline))


def weighted_reward(rewards_BR: Tensor, weights_R: Tensor) -> Tensor:
    """Return each completion's weighted sum of the rewards that apply to it.

    Args:
        rewards_BR: Shape ``(B, R)``, NaN where a reward function does not apply.
        weights_R: Shape ``(R,)``.

    Returns:
        Shape ``(B,)``, float64, reward units; NaN where every reward is NaN.

    Raises:
        ValueError: there is not one weight a reward function.

    Example:
        >>> weighted_reward(torch.tensor([[1.0, float("nan")]]), torch.tensor([2.0, 5.0]))
        tensor([2.], dtype=torch.float64)
    """
    _check_weights(rewards_BR, weights_R)
    rewards_BR = rewards_BR.double()
    summed_B = (rewards_BR * weights_R.to(rewards_BR)).nansum(dim=1)
    return summed_B.masked_fill(_unscored(rewards_BR), torch.nan)


def _normalize_then_sum(
    rewards_BR: Tensor, weights_R: Tensor, group_size: int, baseline: AdvantageBaseline, eps: float
) -> Tensor:
    _check_weights(rewards_BR, weights_R)
    rewards_PGR = rewards_BR.double().view(-1, group_size, rewards_BR.shape[1])
    columns = [rewards_PGR[..., r] for r in range(rewards_PGR.shape[-1])]
    normalized = [_normalized(column_PG, baseline, eps).view(-1) for column_PG in columns]
    summed_B = (torch.stack(normalized, dim=1) * weights_R.to(rewards_PGR)).nansum(dim=1)
    # As in TRL: a completion that stands alone in its group counts as 0 in the batch.
    summed_B = summed_B.masked_fill(_unscored(rewards_BR), torch.nan)
    standardized_B = (summed_B - summed_B.nanmean()) / (_nanstd(summed_B, dim=0) + eps)
    scored_PG = ~rewards_PGR.isnan().all(dim=2)
    silent_P = torch.stack([_all_equal(column_PG) for column_PG in columns]).all(dim=0) | (
        scored_PG.sum(dim=1) < 2
    )
    standardized_B = standardized_B.masked_fill(silent_P.repeat_interleave(group_size), 0.0)
    return standardized_B.nan_to_num(nan=0.0).to(rewards_BR.dtype)


def _normalized(rewards_PG: Tensor, baseline: AdvantageBaseline, eps: float) -> Tensor:
    """One reward's advantage in its group; NaN stays where it does not apply or stands alone."""
    normalized_PG = _centred(rewards_PG, baseline) / _scale(rewards_PG, "group", eps)
    return normalized_PG.masked_fill(_all_equal(rewards_PG)[:, None] & ~normalized_PG.isnan(), 0.0)


def _centred(rewards_PG: Tensor, baseline: AdvantageBaseline) -> Tensor:
    centred_PG = rewards_PG - rewards_PG.nanmean(dim=1, keepdim=True)
    if baseline == "mean":
        return centred_PG
    # r_i - mean of the others = (r_i - mean) * n / (n - 1)
    num_scored_P1 = (~rewards_PG.isnan()).sum(dim=1, keepdim=True)
    return centred_PG * num_scored_P1 / (num_scored_P1 - 1).clamp(min=1)


def _against_position(step_rewards_BT: Tensor, group_size: int, baseline: StepBaseline) -> Tensor:
    """Return the rewards of each group's steps, ``(P, S)``, less the mean at their position.

    For ``"group"`` they are as they were. Rounding errors of equal rewards become exact zeros.
    """
    num_groups = len(step_rewards_BT) // group_size
    if baseline == "group":
        return step_rewards_BT.reshape(num_groups, -1)
    is_end_BT = ~step_rewards_BT.isnan()
    position_BT = is_end_BT.cumsum(dim=1) - 1
    centred_BT = torch.full_like(step_rewards_BT, torch.nan)
    for position in range(int(is_end_BT.sum(dim=1).max()) if len(is_end_BT) else 0):
        at_BT = is_end_BT & (position_BT == position)
        at_PS = step_rewards_BT.masked_fill(~at_BT, torch.nan).reshape(num_groups, -1)
        compared_PS = _centred(at_PS, "mean").masked_fill(_all_equal(at_PS)[:, None], 0.0)
        centred_BT = torch.where(at_BT, compared_PS.view_as(centred_BT), centred_BT)
    return centred_BT.reshape(num_groups, -1)


def _scale(rewards_PG: Tensor, scale: RewardScale, eps: float) -> Tensor:
    if scale == "group":
        return _nanstd(rewards_PG, dim=1)[:, None] + eps
    if scale == "batch":
        return _nanstd(rewards_PG.reshape(-1), dim=0) + eps
    return torch.ones((), dtype=rewards_PG.dtype, device=rewards_PG.device)


def _nanstd(values: Tensor, *, dim: int) -> Tensor:
    """Sample deviation (n - 1) of the values that are not NaN; NaN if fewer than two are left."""
    mean = values.nanmean(dim=dim, keepdim=True)
    num_scored = (~values.isnan()).sum(dim=dim)
    variance = (values - mean).square().nansum(dim=dim) / (num_scored - 1)
    return variance.masked_fill(num_scored < 2, torch.nan).sqrt()


def _unscored(rewards_BR: Tensor) -> Tensor:
    return rewards_BR.isnan().all(dim=1)


def _clipped(advantages_B: Tensor, clip: float | None) -> Tensor:
    return advantages_B if clip is None else advantages_B.clamp(-clip, clip)


def _silent(rewards_PG: Tensor) -> Tensor:
    return _all_equal(rewards_PG) | ((~rewards_PG.isnan()).sum(dim=1) < 2)


def _all_equal(rewards_PG: Tensor) -> Tensor:
    """Whether the scored rewards of each group are all the same; true of a group without any."""
    unscored_PG = rewards_PG.isnan()
    highest_P = rewards_PG.masked_fill(unscored_PG, -torch.inf).amax(dim=1)
    lowest_P = rewards_PG.masked_fill(unscored_PG, torch.inf).amin(dim=1)
    return highest_P <= lowest_P


def _check_rewards(rewards_BR: Tensor, aggregation: str) -> None:
    if rewards_BR.dim() != 2:
        raise ValueError(
            f"`rewards_BR` has shape {tuple(rewards_BR.shape)}; "
            "pass (completions, reward functions)."
        )
    if aggregation not in get_args(RewardAggregation):
        raise ValueError(
            f"`aggregation` is {aggregation!r}; "
            f"use one of {', '.join(get_args(RewardAggregation))}."
        )


def _check(
    num_completions: int,
    group_size: int,
    *,
    baseline: str = "mean",
    scale: str = "group",
    eps: float = STD_EPS,
    clip: float | None = None,
) -> None:
    if group_size < 2:
        raise ValueError(
            f"`group_size` is {group_size}; a group needs at least 2 completions to be compared."
        )
    if num_completions % group_size:
        raise ValueError(
            f"{num_completions} completions do not divide into groups of "
            f"`group_size`={group_size}; pass whole groups."
        )
    if baseline not in get_args(AdvantageBaseline):
        raise ValueError(
            f"`baseline` is {baseline!r}; use one of {', '.join(get_args(AdvantageBaseline))}."
        )
    if scale not in get_args(RewardScale):
        raise ValueError(f"`scale` is {scale!r}; use one of {', '.join(get_args(RewardScale))}.")
    if not eps >= 0:
        raise ValueError(f"`eps` is {eps}; it must not be negative.")
    if clip is not None and not clip > 0:
        raise ValueError(f"`clip` is {clip}; use a positive number, or None for no limit.")


def _check_weights(rewards_BR: Tensor, weights_R: Tensor) -> None:
    if weights_R.shape != rewards_BR.shape[1:]:
        raise ValueError(
            f"{weights_R.numel()} weights for "
            f"{rewards_BR.shape[1]} reward functions; give one each."
        )
