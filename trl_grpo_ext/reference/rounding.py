"""Error-feedback rounding: the code of a weight, chosen so that the layer's outputs change least.

Shapes: ``O`` output features, ``I`` input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.01  # [share of the mean variance] added to the covariance: GPTQ's
_PANEL = 64  # columns whose errors are spread over the rest at a time


def round_with_feedback(
    weight_OI: Tensor,
    *,
    covariance_II: Tensor,
    scales_OI: Tensor,
    levels: Tensor,
    damping: float = DAMPING,
) -> Tensor:
    r"""Return the code of each weight that changes the outputs on typical inputs least.

    Column after column, those of the largest inputs first, is rounded to the nearest level, and its
    error is made up for in the columns that are not rounded yet: a greedy minimum of

    .. math:: \mathrm{tr}\,(W - \hat W)\, C\, (W - \hat W)^T, \quad C = E[x x^T]

    Args:
        weight_OI: Shape ``(O, I)``, any floating dtype.
        covariance_II: ``C``, the second moments of the layer's inputs, shape ``(I, I)``.
        scales_OI: What each weight's level is multiplied with, shape ``(O, I)``.
        levels: The code's values, shape ``(16,)`` or ``(256,)``, in any order.
        damping: Share of the mean variance that is added to each variance, above 0.

    Returns:
        Indices into ``levels``, uint8, shape ``(O, I)``. With a covariance that is a multiple of
        the identity they are those of rounding to nearest.

    References:
        Frantar et al. 2022, GPTQ, algorithm 1, arXiv:2210.17323; the order of the columns is the
        ``act-order`` of its code.

    Example:
        >>> levels, ones = torch.tensor([-1.0, 0.0, 1.0]), torch.ones(1, 2)
        >>> alike = torch.tensor([[1.0, 0.99], [0.99, 1.0]])
        >>> weight = torch.tensor([[0.4, 0.4]])  # of inputs that are nearly equal: 0.8 in all
        >>> codes = round_with_feedback(
        ...     weight, covariance_II=alike, scales_OI=ones, levels=levels
        ... )
        >>> levels[codes.long()]
        tensor([[0., 1.]])
    """
    largest_first_I = covariance_II.diagonal().argsort(descending=True, stable=True)
    feedback_II = _feedback(covariance_II[largest_first_I][:, largest_first_I], damping)
    ordered, order = levels.float().sort()
    borders = (ordered[1:] + ordered[:-1]) / 2
    rest_OI = weight_OI[:, largest_first_I].float()  # a copy
    scales_OI = scales_OI[:, largest_first_I].float()
    places_OI = torch.empty(rest_OI.shape, dtype=torch.long, device=rest_OI.device)
    for start in range(0, rest_OI.shape[1], _PANEL):
        panel = slice(start, start + _PANEL)
        errors_OK, places_OI[:, panel] = _round_panel(
            rest_OI[:, panel], scales_OI[:, panel], feedback_II[panel, panel], ordered, borders
        )
        after = slice(start + _PANEL, None)
        rest_OI[:, after] -= errors_OK @ feedback_II[panel, after]
    codes_OI = torch.empty(rest_OI.shape, dtype=torch.uint8, device=rest_OI.device)
    codes_OI[:, largest_first_I] = order[places_OI].to(torch.uint8)
    return codes_OI


def _round_panel(
    weight_OK: Tensor, scales_OK: Tensor, feedback_KK: Tensor, levels: Tensor, borders: Tensor
) -> tuple[Tensor, Tensor]:
    """Scaled errors and indices of a panel of columns, each corrected for those before it."""
    # Transposed, so that a column is contiguous: the loop is what takes the time.
    weight_KO, scales_KO = weight_OK.T.contiguous(), scales_OK.T.contiguous()
    errors_KO = torch.empty_like(weight_KO)
    places_KO = torch.empty(weight_KO.shape, dtype=torch.long, device=weight_KO.device)
    for k, (row_O, scale_O) in enumerate(zip(weight_KO, scales_KO, strict=True)):
        places_KO[k] = torch.bucketize(row_O / scale_O, borders)
        error_O = (row_O - levels[places_KO[k]] * scale_O) / feedback_KK[k, k]
        weight_KO[k + 1 :].addr_(feedback_KK[k, k + 1 :], error_O, alpha=-1)
        errors_KO[k] = error_O
    return errors_KO.T, places_KO.T


def _feedback(covariance_II: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse covariance: how an error spreads over later columns."""
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped(covariance_II, damping)))
    upper_II: Tensor = torch.linalg.cholesky(inverse_II, upper=True)
    return upper_II.float()


def damped(covariance_II: Tensor, damping: float) -> Tensor:
    """Return a covariance with a share of its mean variance added to each; float64.

    Inputs that never vary get a variance, so that it can be inverted.
    """
    covariance_II = covariance_II.to(torch.float64, copy=True)
    variances_I = covariance_II.diagonal()  # a view
    variances_I += damping * (float(variances_I.mean()) or 1.0)
    return covariance_II
