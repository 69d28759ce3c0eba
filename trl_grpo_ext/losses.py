"""The GRPO objective as pure functions of per-token log-probabilities.

Shapes: ``B`` completions, ``T`` completion tokens (padded). ``mask_BT`` is 1 on the tokens that
count, 0 on padding. Log-probabilities are natural, of the token that was sampled, under the
temperature it was sampled with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

ImportanceLevel = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]
LossReduction = Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo"]

# How each loss type of TRL reduces its per-token values.
LOSS_TYPE_REDUCTIONS: dict[str, LossReduction] = {
    "grpo": "grpo",
    "dr_grpo": "dr_grpo",
    "dapo": "dapo",
    "bnpo": "bnpo",
    "cispo": "dapo",
    "sapo": "grpo",
    "luspo": "luspo",
    "vespo": "dapo",
}


@dataclass(frozen=True)
class GRPOLoss:
    """The objective and what to log beside it.

    Attributes:
        loss: Scalar with gradient: minimize it.
        kl: Scalar, nats a token: masked mean of the KL estimate; 0 without a reference.
        clip_fraction: Scalar in [0, 1]: share of the tokens (or sequences) whose ratio was clipped.
    """

    loss: Tensor
    kl: Tensor
    clip_fraction: Tensor


def grpo_loss(
    logprobs_BT: Tensor,
    *,
    old_logprobs_BT: Tensor,
    advantages_B: Tensor,
    mask_BT: Tensor,
    ref_logprobs_BT: Tensor | None = None,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    importance_level: ImportanceLevel = "token",
    kl_estimator: KLEstimator = "k3",
    kl_clamp: float | None = None,
    kl_bias_correction: bool | None = None,
    reduction: LossReduction = "dapo",
    max_completion_length: int | None = None,
) -> GRPOLoss:
    r"""Return the clipped GRPO objective with its KL penalty.

    .. math::
        L = -\min(\rho A, \mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon_{high}) A)
            + \beta\, \widehat{KL}

    Args:
        logprobs_BT: Of the policy that is trained, with gradient.
        old_logprobs_BT: Of the policy that sampled, no gradient.
        advantages_B: As :func:`~trl_grpo_ext.advantages.group_advantages` returns them.
        mask_BT: 1 where a token counts.
        ref_logprobs_BT: Of the frozen reference; needed if ``beta`` is not 0.
        beta: Weight of the KL penalty, at least 0; 0 leaves it out.
        epsilon: How far the ratio may fall below 1 and still earn gradient.
        epsilon_high: How far it may rise above 1; ``epsilon`` if not given.
        importance_level: See :func:`importance_ratio`.
        kl_estimator: See :func:`kl_estimate`.
        kl_clamp: See :func:`kl_estimate`.
        kl_bias_correction: Whether the KL is multiplied by the differentiable ratio; if not given,
            whatever makes its expected gradient that of the reverse KL: yes for k1 and k3, no for
            k2.
        reduction: See :func:`reduce_tokens`.
        max_completion_length: See :func:`reduce_tokens`.

    Returns:
        The loss with what to log.

    Raises:
        ValueError: ``beta`` without a reference, or an estimator whose gradient would be wrong
            (:func:`kl_gradient_problem`).

    References:
        Shao et al. 2024, equation 3, arXiv:2402.03300.
        KL estimators: Schulman 2020, "Approximating KL divergence".

    Example:
        >>> logprobs = torch.full((2, 3), -1.0, requires_grad=True)
        >>> result = grpo_loss(
        ...     logprobs,
        ...     old_logprobs_BT=logprobs.detach(),
        ...     advantages_B=torch.tensor([1.0, -1.0]),
        ...     mask_BT=torch.ones(2, 3),
        ... )
        >>> result.loss.backward()
        >>> logprobs.grad[:, 0]
        tensor([-0.1667,  0.1667])
    """
    ratio = importance_ratio(logprobs_BT, old_logprobs_BT, mask_BT, level=importance_level)
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    loss_BT = clipped_surrogate(ratio, advantages_B, epsilon_low=epsilon, epsilon_high=epsilon_high)
    clipped = is_clipped(ratio, advantages_B, epsilon_low=epsilon, epsilon_high=epsilon_high)
    kl = torch.zeros((), device=logprobs_BT.device)
    if beta != 0.0:
        if ref_logprobs_BT is None:
            raise ValueError(
                f"`beta` is {beta} but `ref_logprobs_BT` is missing: pass them, or set `beta=0`."
            )
        correct = kl_estimator != "k2" if kl_bias_correction is None else kl_bias_correction
        if problem := kl_gradient_problem(kl_estimator, bias_correction=correct):
            raise ValueError(problem)
        kl_BT = kl_estimate(logprobs_BT, ref_logprobs_BT, estimator=kl_estimator, clamp=kl_clamp)
        kl_BT = kl_BT * ratio if correct else kl_BT
        loss_BT = loss_BT + beta * kl_BT
        kl = masked_mean(kl_BT, mask_BT).detach()
    loss = reduce_tokens(
        loss_BT.expand_as(mask_BT),
        mask_BT,
        reduction=reduction,
        max_completion_length=max_completion_length,
    )
    return GRPOLoss(loss, kl, masked_mean(clipped.float().expand_as(mask_BT), mask_BT))


def importance_ratio(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    level: ImportanceLevel = "token",
) -> Tensor:
    r"""Return how much likelier the trained policy makes what the sampling policy drew.

    ``token``: :math:`\rho_t = \exp(\log\pi_t - \log\pi^{old}_t)`. ``sequence``: the geometric mean
    of these over the tokens of the completion (GSPO).

    Returns:
        Shape ``(B, T)`` for ``token``, ``(B, 1)`` for ``sequence``; with the gradient of
        ``logprobs_BT``. 1 for a completion without any token.

    Raises:
        ValueError: ``level`` is unknown.

    References:
        Zheng et al. 2025, GSPO, equation 7, arXiv:2507.18071.

    Example:
        >>> old = torch.zeros(1, 2)
        >>> importance_ratio(torch.tensor([[0.0, 2.0]]).log1p(), old, torch.ones(1, 2))
        tensor([[1., 3.]])
    """
    log_ratio_BT = logprobs_BT - old_logprobs_BT
    if level == "token":
        return log_ratio_BT.exp()
    if level == "sequence":
        num_tokens_B1 = mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
        return ((log_ratio_BT * mask_BT).sum(dim=1, keepdim=True) / num_tokens_B1).exp()
    raise ValueError(f"`level` is {level!r}; use one of {', '.join(get_args(ImportanceLevel))}.")


def clipped_surrogate(
    ratio: Tensor, advantages_B: Tensor, *, epsilon_low: float, epsilon_high: float
) -> Tensor:
    r"""Return the clipped objective of each ratio, as a loss, unreduced.

    .. math:: -\min(\rho A, \mathrm{clip}(\rho, 1-\epsilon_{low}, 1+\epsilon_{high}) A)

    Args:
        ratio: Shape ``(B, T)`` or ``(B, 1)``.
        advantages_B: Shape ``(B,)``.
        epsilon_low: Not negative.
        epsilon_high: Not negative.

    Returns:
        Shape of ``ratio``.

    Example:
        >>> ratio, advantages = torch.tensor([[2.0]]), torch.tensor([1.0])
        >>> clipped_surrogate(ratio, advantages, epsilon_low=0.2, epsilon_high=0.2)
        tensor([[-1.2000]])
    """
    advantages_B1 = advantages_B[:, None]
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.minimum(ratio * advantages_B1, clipped * advantages_B1)


def is_clipped(
    ratio: Tensor, advantages_B: Tensor, *, epsilon_low: float, epsilon_high: float
) -> Tensor:
    """Return where the clip took the gradient away.

    That is where the ratio left its range on the side that the advantage favours.

    Returns:
        Shape of ``ratio``, bool.

    Example:
        >>> ratio, advantages = torch.tensor([[2.0, 0.5]]), torch.tensor([1.0])
        >>> is_clipped(ratio, advantages, epsilon_low=0.2, epsilon_high=0.2)
        tensor([[ True, False]])
    """
    advantages_B1 = advantages_B[:, None]
    too_low = (ratio < 1 - epsilon_low) & (advantages_B1 < 0)
    too_high = (ratio > 1 + epsilon_high) & (advantages_B1 > 0)
    return too_low | too_high


def kl_estimate(
    logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor,
    *,
    estimator: KLEstimator = "k3",
    clamp: float | None = None,
) -> Tensor:
    r"""Return a per-token estimate of the reverse KL from the policy to the reference.

    It is made from the policy's own samples. With :math:`d = \log\pi_{ref} - \log\pi`: k1 is
    :math:`-d`, k2 is :math:`d^2/2`, k3 is :math:`e^d - d - 1`. k1 and k3 have the right mean; k2 is
    biased, but its plain gradient is right.

    Args:
        logprobs_BT: Of the policy.
        ref_logprobs_BT: Of the reference.
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        clamp: Largest ``|d|``, nats, positive; beyond it the estimate stays constant and has no
            gradient, so that one token cannot explode the loss (k3 grows as ``exp(d)``). ``None``
            leaves ``d`` as it is.

    Returns:
        Shape ``(B, T)``, nats; k2 and k3 are never negative.

    Raises:
        ValueError: ``estimator`` is unknown, or ``clamp`` is not positive.

    References:
        Schulman 2020, "Approximating KL divergence".

    Example:
        >>> policy, reference = torch.tensor([[-1.0]]), torch.tensor([[-2.0]])
        >>> kl_estimate(policy, reference, estimator="k1")
        tensor([[1.]])
        >>> kl_estimate(policy, reference, estimator="k2")
        tensor([[0.5000]])
    """
    log_ratio_BT = ref_logprobs_BT - logprobs_BT
    if clamp is not None:
        if not clamp > 0:
            raise ValueError(
                f"`clamp` is {clamp}; "
                "it must be positive (10 to 20 is usual), or None for no clamp."
            )
        log_ratio_BT = log_ratio_BT.clamp(-clamp, clamp)
    if estimator == "k1":
        return -log_ratio_BT
    if estimator == "k2":
        return log_ratio_BT.square() / 2
    if estimator == "k3":
        return log_ratio_BT.exp() - log_ratio_BT - 1
    raise ValueError(
        f"`estimator` is {estimator!r}; use one of {', '.join(get_args(KLEstimator))}."
    )


def kl_gradient_problem(estimator: str, *, bias_correction: bool) -> str | None:
    """Return why this KL penalty would have a wrong expected gradient, or ``None`` if it is sound.

    The KL's expected gradient has a part that comes from the sampling distribution. Multiplying by
    the differentiable importance ratio (``use_bias_correction_kl``) supplies it. Plain k2 happens
    to be right without.

    Example:
        >>> kl_gradient_problem("k3", bias_correction=True) is None
        True
    """
    if estimator == "k1" and not bias_correction:
        return (
            "`kl_estimator`='k1' with `use_bias_correction_kl`=false "
            "has an expected gradient of 0: nothing would hold the policy near the reference. "
            "Set `use_bias_correction_kl: true`."
        )
    if estimator == "k2" and bias_correction:
        return (
            "`kl_estimator`='k2' with `use_bias_correction_kl`=true has a wrong expected gradient: "
            "plain k2 already has that of the reverse KL. Set `use_bias_correction_kl: false`."
        )
    return None


def reduce_tokens(
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    reduction: LossReduction = "dapo",
    max_completion_length: int | None = None,
    num_tokens: Tensor | float | None = None,
) -> Tensor:
    """Return the scalar that a per-token loss amounts to.

    ``grpo``: mean over completions of the mean over their tokens. ``bnpo``: mean over the tokens of
    this batch. ``dapo``: sum over the tokens, divided by ``num_tokens``, those of the whole
    (accumulated, distributed) batch. ``dr_grpo``: sum, divided by ``B * max_completion_length``.
    ``luspo``: mean over completions of the sum over their tokens.

    Args:
        values_BT: Per-token loss.
        mask_BT: 1 where a token counts.
        reduction: See above.
        max_completion_length: Tokens, for ``dr_grpo``.
        num_tokens: For ``dapo``; the tokens of this batch if not given.

    Returns:
        Scalar; 0 for a batch without any token.

    Raises:
        ValueError: ``reduction`` is unknown, or ``dr_grpo`` lacks ``max_completion_length``.

    References:
        grpo: arXiv:2402.03300. dapo: Yu et al. 2025, arXiv:2503.14476.
        dr_grpo: Liu et al. 2025, arXiv:2503.20783.

    Example:
        >>> values = torch.tensor([[2.0, 4.0], [6.0, 0.0]])
        >>> mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
        >>> reduce_tokens(values, mask, reduction="grpo")
        tensor(4.5000)
        >>> reduce_tokens(values, mask, reduction="dapo")
        tensor(4.)
    """
    sums_B = (values_BT * mask_BT).sum(dim=1)
    if reduction == "grpo":
        return (sums_B / mask_BT.sum(dim=1).clamp(min=1)).mean()
    if reduction == "luspo":
        return sums_B.mean()
    if reduction == "dr_grpo":
        if max_completion_length is None:
            raise ValueError(
                "`reduction`='dr_grpo' divides by "
                "`max_completion_length`, which is missing: pass it."
            )
        return sums_B.sum() / (len(sums_B) * max_completion_length)
    if reduction == "bnpo" or (reduction == "dapo" and num_tokens is None):
        return masked_mean(values_BT, mask_BT)
    if reduction == "dapo":
        return sums_B.sum() / num_tokens
    raise ValueError(
        f"`reduction` is {reduction!r}; use one of {', '.join(get_args(LossReduction))}."
    )


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over the tokens that count; 0 if none does.

    Example:
        >>> masked_mean(torch.tensor([[2.0, 9.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(2.)
    """
    return (values_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1)
