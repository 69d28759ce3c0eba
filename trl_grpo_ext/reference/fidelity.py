"""How faithful a reference is, measured while the policy still is the model it stands for.

Then the true KL is 0, and whatever a reference shows instead is its floor. Its gradient matters as
well: a policy a small step away is pulled back by the exact reference and by this one, and the
angle between the two pulls says what part of the penalty is error.

Shapes: ``B`` completions, ``T`` completion tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_grpo_ext.layerwise import LayerCall, call_each, decoder_layers, run_layerwise
from trl_grpo_ext.losses import KLEstimator, importance_ratio, kl_estimate, masked_mean
from trl_grpo_ext.reference.completions import CompletionBatch, check_not_empty, completion_logits
from trl_grpo_ext.reference.modes import differentiable, evaluating

_SEARCH_STEPS = 12  # evaluations of the KL, at most, to find the size of the step away
_SEARCH_TOLERANCE = 0.1  # [share of the target]


@dataclass(frozen=True)
class ReferenceFidelity:
    """What a reference shows where the exact one shows a KL of 0.

    Attributes:
        kl_k1: Mean of ``log pi - log pi_ref`` over the tokens, nats.
        kl_k3: Mean of the k3 estimate, nats: what TRL logs as ``kl``.
        kl_full: Mean KL over the whole vocabulary, nats.
        top_token_agreement: Share of the tokens where both hold the same one to be likeliest.
        gradient_cosine: Between the gradients of the KL penalty with this reference and with the
            exact one, at ``kl_target`` nats from it; NaN where it was not measured.
        kl_target: Nats a token, k3, at which the cosine was measured.
        num_tokens: That it was measured on.
    """

    kl_k1: float
    kl_k3: float
    kl_full: float
    top_token_agreement: float
    gradient_cosine: float
    kl_target: float
    num_tokens: int

    def metrics(self) -> dict[str, float]:
        """Return the values by the names that they are logged under."""
        return {
            "reference/kl_floor": self.kl_k3,
            "reference/kl_floor_k1": self.kl_k1,
            "reference/kl_floor_full": self.kl_full,
            "reference/top_token_agreement": self.top_token_agreement,
            "reference/gradient_cosine": self.gradient_cosine,
        }

    def sentence(self) -> str:
        """Return what a model card says of it."""
        return (
            "The KL penalty was measured against a quantized copy of the initial model. On "
            f"{self.num_tokens} tokens of held-out prompts, before training, that copy showed a KL "
            f"of {self.kl_k3:.2g} nats a token where the truth is 0 (k3; k1 {self.kl_k1:.2g}, over "
            f"the whole vocabulary {self.kl_full:.2g}), and held the same token to be likeliest in "
            f"{self.top_token_agreement:.1%} of them. The cosine between the gradients of the "
            f"penalty with this copy and with the exact one was {self.gradient_cosine:.2f} at a KL "
            f"of {self.kl_target:g}."
        )

    def __str__(self) -> str:
        return (
            f"KL floor {self.kl_k3:.2g} nats a token (k3; k1 {self.kl_k1:.2g}, full "
            f"{self.kl_full:.2g}), top token {self.top_token_agreement:.1%} alike, gradient cosine "
            f"{self.gradient_cosine:.2f} at a KL of {self.kl_target:g}, {self.num_tokens} tokens"
        )


@dataclass(frozen=True)
class KLPenalty:
    """The KL penalty as a run configures it.

    Attributes:
        estimator: As in :func:`~trl_grpo_ext.losses.kl_estimate`.
        clamp: As there.
        bias_correction: Whether it is multiplied by the differentiable importance ratio.
        temperature: Of the log-probabilities.
    """

    estimator: KLEstimator = "k3"
    clamp: float | None = None
    bias_correction: bool = True
    temperature: float = 1.0

    def __call__(self, logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the mean penalty of the tokens, with gradient."""
        kl_BT = kl_estimate(
            logprobs_BT, ref_logprobs_BT, estimator=self.estimator, clamp=self.clamp
        )
        if self.bias_correction:
            kl_BT = kl_BT * importance_ratio(
                logprobs_BT, logprobs_BT.detach(), mask_BT, level="token"
            )
        return masked_mean(kl_BT, mask_BT)


def measure_fidelity(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    batches: Sequence[CompletionBatch],
    *,
    penalty: KLPenalty | None = None,
    kl_target: float = 0.01,
    parameters: Sequence[nn.Parameter] | None = None,
) -> ReferenceFidelity:
    """Return how far the reference is from the policy, which it should equal.

    For the cosine the policy is moved a step along the gradient of random advantages, until its k3
    to where it was is ``kl_target``, and put back exactly.

    Args:
        policy: The model that the reference was made of, unchanged since.
        reference: Any kind.
        batches: Completions of the policy that the reference was not calibrated on.
        penalty: Whose gradients are compared; TRL's default if not given.
        kl_target: Nats a token, above 0: how far a healthy run is from its reference.
        parameters: Of the policy, for the gradients; those of its last decoder layer if not given.
            Their values and their gradients take memory.

    Returns:
        Values of all tokens together. The cosine is NaN if no step reaches ``kl_target``.

    Raises:
        ValueError: there is no completion token to measure on.
    """
    check_not_empty(batches)
    penalty = penalty or KLPenalty()
    with torch.no_grad(), evaluating(policy):
        exact, found, totals = _compare(policy, reference, batches, penalty)
    num_tokens = sum(batch.num_completion_tokens for batch in batches)
    k1, k3, full, same = (totals / num_tokens).tolist()
    chosen = list(decoder_layers(policy)[-1].parameters() if parameters is None else parameters)
    with differentiable(policy, chosen):
        forward = _from_last_layer(policy, batches) if parameters is None else _whole(policy)
        near = _Neighbourhood(forward, chosen, batches, exact, penalty)
        cosine = near.cosine_of_pulls(found, kl_target=kl_target)
    return ReferenceFidelity(k1, k3, full, same, cosine, kl_target, num_tokens)


def _compare(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    batches: Sequence[CompletionBatch],
    penalty: KLPenalty,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Log-probabilities of policy and reference, shape ``(B, T)`` each, and sums over the tokens.

    The sums are of k1, k3, the full KL, and the likeliest tokens that agree.
    """
    exact, found = [], []
    totals = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        exact_BTV, found_BTV = (
            (completion_logits(model, batch).float() / penalty.temperature).log_softmax(dim=-1)
            for model in (policy, reference)
        )
        labels_BT1, mask_BT = batch.labels_BT[..., None], batch.mask_BT
        exact.append(exact_BTV.gather(-1, labels_BT1)[..., 0] * mask_BT)
        found.append(found_BTV.gather(-1, labels_BT1)[..., 0] * mask_BT)
        per_token = (
            kl_estimate(exact[-1], found[-1], estimator="k1"),
            kl_estimate(exact[-1], found[-1], estimator="k3"),
            nn.functional.kl_div(found_BTV, exact_BTV, log_target=True, reduction="none").sum(-1),
            exact_BTV.argmax(dim=-1) == found_BTV.argmax(dim=-1),
        )
        totals += torch.stack([(x_BT * mask_BT).sum().double().cpu() for x_BT in per_token])
    return exact, found, totals


Forward = Callable[[int, CompletionBatch], Tensor]  # a batch, by its index: logits (B, T, V)
Loss = Callable[[int, Tensor, CompletionBatch], Tensor]  # and log-probabilities (B, T): a mean


@dataclass(frozen=True)
class _Neighbourhood:
    """The policy and what is a small step away from it.

    Attributes:
        forward: Of the policy with the parameters as they are when it is called.
        parameters: What a step moves, and gradients are of.
        batches: Completions.
        exact: Log-probabilities of the policy before any step.
        penalty: To compare the gradients of.
    """

    forward: Forward
    parameters: Sequence[nn.Parameter]
    batches: Sequence[CompletionBatch]
    exact: Sequence[Tensor]
    penalty: KLPenalty

    def cosine_of_pulls(self, found: Sequence[Tensor], *, kl_target: float) -> float:
        """Between the gradients of the penalty to ``exact`` and to ``found``, a step away."""
        direction = self._gradient(_push)
        start = [parameter.detach().clone() for parameter in self.parameters]
        try:
            if not self._move_away(start, direction, kl_target=kl_target):
                return math.nan
            return _cosine(
                self._gradient(self._pull(self.exact)), self._gradient(self._pull(found))
            )
        finally:
            _set(self.parameters, start)

    def _pull(self, ref_logprobs: Sequence[Tensor]) -> Loss:
        def loss(index: int, logprobs_BT: Tensor, batch: CompletionBatch) -> Tensor:
            return self.penalty(logprobs_BT, ref_logprobs[index], batch.mask_BT)

        return loss

    def _move_away(
        self, start: Sequence[Tensor], direction: Sequence[Tensor], *, kl_target: float
    ) -> bool:
        """Take the step against ``direction`` whose k3 is ``kl_target``; say if there is one."""
        scale = 0.01 * _norm(start) / max(_norm(direction), 1e-30)
        for _ in range(_SEARCH_STEPS):
            _set(self.parameters, [p - scale * d for p, d in zip(start, direction, strict=True)])
            kl = self._mean_k3()
            if abs(kl / kl_target - 1) < _SEARCH_TOLERANCE:
                return True
            scale *= _next_stride(kl / kl_target)
        return False

    @torch.no_grad()
    def _mean_k3(self) -> float:
        total, num_tokens = 0.0, 0
        for index, (batch, exact_BT) in enumerate(zip(self.batches, self.exact, strict=True)):
            kl_BT = kl_estimate(self._logprobs(index, batch), exact_BT, estimator="k3")
            total += float((kl_BT * batch.mask_BT).sum())
            num_tokens += batch.num_completion_tokens
        return total / max(num_tokens, 1)

    def _gradient(self, loss: Loss) -> list[Tensor]:
        """Of the loss's mean over the tokens of all batches, but for a factor."""
        totals = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]
        for index, batch in enumerate(self.batches):
            mean = loss(index, self._logprobs(index, batch), batch)
            grads = torch.autograd.grad(
                mean * batch.num_completion_tokens, list(self.parameters), allow_unused=True
            )
            for total, grad in zip(totals, grads, strict=True):
                if grad is not None:
                    total += grad
        return totals

    def _logprobs(self, index: int, batch: CompletionBatch) -> Tensor:
        """Of the completion tokens, shape ``(B, T)``; 0 on padding."""
        logits_BTV = self.forward(index, batch).float() / self.penalty.temperature
        logits_BT = logits_BTV.gather(-1, batch.labels_BT[..., None])[..., 0]
        return (logits_BT - logits_BTV.logsumexp(dim=-1)) * batch.mask_BT


def _next_stride(share: float) -> float:
    """What to multiply a step with that led to this share of the KL, which grows as its square."""
    if not math.isfinite(share):
        return 0.1
    return 1 / math.sqrt(min(max(share, 0.01), 100.0))  # 0 or less: a step too small to see


def _push(index: int, logprobs_BT: Tensor, batch: CompletionBatch) -> Tensor:
    """A policy gradient: completions in turn get the advantages 1 and -1."""
    places_B = torch.arange(index, index + len(logprobs_BT), device=logprobs_BT.device)
    signs_B = 1.0 - 2.0 * (places_B % 2)  # from the batch's index: a batch may be one completion
    return -masked_mean(logprobs_BT * signs_B[:, None], batch.mask_BT)


def _whole(policy: PreTrainedModel) -> Forward:
    return lambda _, batch: completion_logits(policy, batch)


def _from_last_layer(policy: PreTrainedModel, batches: Sequence[CompletionBatch]) -> Forward:
    """A forward pass for which the layers below the last one have run once and for all."""
    layers = list(decoder_layers(policy))
    kept: list[LayerCall] = []
    below: list[Any] = []  # outputs of the layer before the last one: in the form that is expected

    def keep(index: int, layer: nn.Module, calls: Sequence[LayerCall]) -> list[Any]:
        outputs = call_each(index, layer, calls)
        if layer is layers[-1]:
            kept.extend(calls)
        else:
            below[:] = outputs
        return outputs

    with torch.no_grad():
        run_layerwise(
            layers,
            [functools.partial(policy.base_model, **b.inputs, use_cache=False) for b in batches],
            keep,
        )

    def forward(index: int, batch: CompletionBatch) -> Tensor:
        def skip(_: int, layer: nn.Module, __: Sequence[LayerCall]) -> list[Any]:
            if layer is layers[-1]:
                return [layer(*kept[index].args, **kept[index].kwargs)]
            return [below[index]]

        return run_layerwise(layers, [lambda: completion_logits(policy, batch)], skip)[0]

    return forward


def _cosine(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    norms = _norm(left) * _norm(right)
    dot = sum(float((a * b).sum()) for a, b in zip(left, right, strict=True))
    return dot / norms if norms > 0 else math.nan


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.float().square().sum()) for tensor in tensors))


@torch.no_grad()
def _set(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
