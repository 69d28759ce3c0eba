"""Low-rank factors that make up for what a code lost, where the layer's inputs show it most.

Shapes: ``O`` output features, ``I`` input features, ``R`` rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trl_grpo_ext.reference.rounding import damped

DAMPING = 1e-3  # [share of the mean variance] added to the covariance
_OVERSAMPLING = 16  # more directions than asked for: the randomized decomposition is then precise
_POWER_ITERATIONS = 3


def low_rank_factors(
    error_OI: Tensor, *, covariance_II: Tensor, rank: int, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    r"""Return the factors whose product is nearest to an error, weighted with the layer's inputs.

    .. math:: \min_{A, B}\ \mathrm{tr}\,(E - B A)\, C\, (E - B A)^T, \quad C = E[x x^T]

    In closed form: with :math:`C = L L^T` and the singular value decomposition
    :math:`E L \approx U_R S_R V_R^T`, they are :math:`B = U_R S_R^{1/2}` and
    :math:`A = S_R^{1/2} V_R^T L^{-1}`.

    Args:
        error_OI: ``E``, what the code lost: the weight less what the code stands for.
        covariance_II: ``C``, the second moments of the layer's inputs.
        rank: ``R``, from 1 to ``min(O, I)``.
        damping: Share of the mean variance that is added to each variance, above 0.

    Returns:
        ``A``, shape ``(R, I)``, and ``B``, shape ``(O, R)``, float32, of like size.

    References:
        Zhang et al. 2024, QERA, theorem 1, arXiv:2410.06040. The decomposition: Halko et al. 2011,
        algorithm 5.1, arXiv:0909.4061.
    """
    lower_II = torch.linalg.cholesky(damped(covariance_II, damping))
    weighted_OI = (error_OI.double() @ lower_II).float()
    # Its random start must not move the run's random state.
    with torch.random.fork_rng(_cuda_devices(error_OI)):
        _generator(error_OI.device).manual_seed(0)
        left_OR, sizes_R, right_IR = torch.svd_lowrank(
            weighted_OI,
            q=min(rank + _OVERSAMPLING, *error_OI.shape),
            niter=_POWER_ITERATIONS,
        )
    roots_R = sizes_R[:rank].sqrt()
    factor_in_RI = torch.linalg.solve_triangular(
        lower_II, right_IR[:, :rank].T.double(), upper=False, left=False
    )
    return factor_in_RI.float() * roots_R[:, None], left_OR[:, :rank] * roots_R


def rank_of_budget(bits: float, *, out_features: int, in_features: int) -> int:
    """Return the largest rank of 16-bit factors within some bits a weight; 0 if there is none.

    Example:
        >>> rank_of_budget(0.5, out_features=4096, in_features=4096)
        64
    """
    rank = int(bits * out_features * in_features / (16 * (out_features + in_features)))
    return max(0, min(rank, out_features, in_features))


def _generator(device: torch.device) -> torch.Generator:
    """The device's own; ``torch.manual_seed`` would seed those of all devices."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _cuda_devices(tensor: Tensor) -> list[torch.device]:
    return [tensor.device] if tensor.device.type == "cuda" else []
