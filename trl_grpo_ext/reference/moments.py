"""Second moments of inputs, from the tokens that there are.

Shapes: ``N`` tokens, ``I`` input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trl_grpo_ext.cpu_linear import product


def outer_sum(rows_NI: Tensor) -> Tensor:
    """Return the sum of the outer products of rows with themselves, ``(I, I)``, float32."""
    rows_NI = rows_NI.float()
    return product(rows_NI.T, rows_NI.T)


def estimated_moments(sum_II: Tensor, *, num_rows: int, prior_II: Tensor | None = None) -> Tensor:
    r"""Return second moments that other inputs of the same kind can be expected to have.

    Those of a few rows hold correlations that are chance: what is fitted to them is worse on other
    rows than what is not fitted at all. So as many rows are added as there are features, whose
    moments are a prior, :math:`M`:

    .. math:: C = \left(\sum_n x_n x_n^T + I M\right) / (N + I)

    Args:
        sum_II: Of the outer products of the rows.
        num_rows: ``N``.
        prior_II: ``M``; if not given, the variances of the rows without correlations.

    Returns:
        Shape ``(I, I)``; the prior without any row, or 0 if there is none.

    References:
        Schäfer and Strimmer 2005, "A shrinkage approach to large-scale covariance matrix
        estimation", target D. The weight is ours.

    Example:
        >>> rows = torch.tensor([[2.0, 2.0], [2.0, -1.0]])
        >>> estimated_moments(outer_sum(rows), num_rows=2)
        tensor([[4.0000, 0.5000],
                [0.5000, 2.5000]])
    """
    num_features = len(sum_II)
    if prior_II is None:
        prior_II = torch.diag(sum_II.diagonal() / max(num_rows, 1))
    return (sum_II + num_features * prior_II) / (num_rows + num_features)
