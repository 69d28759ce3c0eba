"""A short training of a reference's low-rank factors against the policy, before training starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference.completions import CompletionBatch, completion_logits
from trl_grpo_ext.reference.modes import evaluating
from trl_grpo_ext.reference.quantized import QuantizedLinear

LEARNING_RATE = 1e-4  # of Adam at the first step; it falls to 0 along a cosine


def distill(
    reference: PreTrainedModel,
    policy: PreTrainedModel,
    batches: Sequence[CompletionBatch],
    *,
    num_steps: int,
    learning_rate: float = LEARNING_RATE,
    temperature: float = 1.0,
    progress: bool = False,
) -> None:
    r"""Train the low-rank factors so that the whole model's distribution comes nearest.

    .. math:: \min_{A, B}\ E\, \mathrm{KL}(\pi \,\|\, \pi_{ref})

    over the completion tokens. Codes and scales stay as they are. Each step is one batch, forward
    through both models and backward through the reference; in between, the dequantized weights of
    all its layers are in memory.

    Args:
        reference: Calibrated with a rank above 0; changed in place.
        policy: The model it was built from, unchanged since.
        batches: Completions of the policy, taken in turn.
        num_steps: Of Adam.
        learning_rate: At the first step.
        temperature: That the logits are divided by.
        progress: Whether to show a bar that counts steps.

    Raises:
        ReferenceModelError: the reference has no low-rank factors.

    References:
        Hinton et al. 2015, arXiv:1503.02531.
    """
    layers = [m for m in reference.modules() if isinstance(m, QuantizedLinear) and m.has_low_rank]
    if not layers:
        raise ReferenceModelError(
            "The reference has no low-rank factors to train. "
            "Set `reference_compensation: low_rank`, or `reference_distillation_steps: 0`."
        )
    trained = [_trainable(layer) for layer in layers]
    optimizer = torch.optim.Adam([p for pair in trained for p in pair], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(num_steps, 1))
    steps = tqdm(range(num_steps), "Distilling the reference", disable=not progress)
    try:
        with evaluating(policy), torch.enable_grad():
            for step in steps:
                batch = batches[step % len(batches)]
                torch.autograd.backward(_divergence(reference, policy, batch, temperature))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    finally:
        for layer, (factor_in, factor_out) in zip(layers, trained, strict=True):
            layer.set_low_rank(factor_in, factor_out)


def _trainable(layer: QuantizedLinear) -> tuple[nn.Parameter, nn.Parameter]:
    """Give the layer float32 factors that get a gradient; buffers, as the stored ones are."""
    assert layer.factor_in is not None
    assert layer.factor_out is not None
    factor_in = nn.Parameter(layer.factor_in.float())
    factor_out = nn.Parameter(layer.factor_out.float())
    layer._buffers["factor_in"], layer._buffers["factor_out"] = factor_in, factor_out
    return factor_in, factor_out


def _divergence(
    reference: nn.Module, policy: nn.Module, batch: CompletionBatch, temperature: float
) -> Tensor:
    """Mean KL of the completion tokens over the whole vocabulary, nats."""
    mask = batch.mask_BT.bool()
    with torch.no_grad():
        goal_NV = completion_logits(policy, batch)[mask].float() / temperature
    found_NV = completion_logits(reference, batch)[mask].float() / temperature
    return nn.functional.kl_div(
        found_NV.log_softmax(dim=-1),
        goal_NV.log_softmax(dim=-1),
        log_target=True,
        reduction="batchmean",
    )
