"""Log-probability and entropy of labels from logits, a few rows at a time.

Where the logits fit into memory this is faster on a CPU than a fused LM head, which computes them a
second time in the backward pass, in blocks that outgrow the caches.

Shapes: ``L`` labels, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS_LIMIT_BYTES = 2**28  # of all logits; above, a fused head takes less memory
_ROWS = 32  # rows a block: 6 MB of float32 at a vocabulary of 49,152, which stays in the caches


def token_statistics(
    logits_LV: Tensor, labels_L: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies in nats, shape ``(L,)`` each, with gradient.

    With ``z = logits / temperature``: ``z[label] - logsumexp(z)``, and
    ``logsumexp(z) - sum(softmax(z) * z)``.

    Args:
        logits_LV: In float32.
        labels_L: The token that each row is to predict.
        temperature: Above 0.

    Example:
        >>> logprobs, entropies = token_statistics(
        ...     torch.tensor([[0.0, 0.0]]), torch.tensor([1]), temperature=1.0
        ... )
        >>> round(float(logprobs), 4), round(float(entropies), 4)
        (-0.6931, 0.6931)
    """
    statistics: tuple[Tensor, Tensor] = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        logits_LV, labels_L, temperature
    )
    return statistics


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_LV: Tensor, labels_L: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        norms, logprobs, entropies = (logits_LV.new_empty(len(labels_L)) for _ in range(3))
        for rows in _blocks(len(labels_L)):
            z = logits_LV[rows] / temperature
            norms[rows] = norm = z.logsumexp(dim=-1)
            logprobs[rows] = z.gather(1, labels_L[rows, None])[:, 0] - norm
            probs = (z - norm[:, None]).exp_()
            entropies[rows] = norm - probs.mul_(z).sum(dim=-1)
        ctx.save_for_backward(logits_LV, labels_L, norms, entropies)
        ctx.temperature = temperature
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """``dlogp/dz = onehot - p`` and ``dH/dz = -p (log p + H)``."""
        logits_LV, labels_L, norms, entropies = ctx.saved_tensors
        of_logprobs, of_entropies = grads
        grad_LV = torch.empty_like(logits_LV)
        for rows in _blocks(len(labels_L)):
            logp = (logits_LV[rows] / ctx.temperature).sub_(norms[rows, None])
            probs, grad = logp.exp(), grad_LV[rows].zero_()
            if of_logprobs is not None:
                grad.addcmul_(probs, of_logprobs[rows, None], value=-1)
                grad.scatter_add_(1, labels_L[rows, None], of_logprobs[rows, None])
            if of_entropies is not None:
                surprise = logp.add_(entropies[rows, None]).mul_(of_entropies[rows, None])
                grad.addcmul_(probs, surprise, value=-1)
            grad.div_(ctx.temperature)
        return grad_LV, None, None


def _blocks(num_rows: int) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, num_rows, _ROWS)]
