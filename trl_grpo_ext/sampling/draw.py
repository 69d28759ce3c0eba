"""Logits to drawn tokens, with their two log-probabilities.

Shapes: ``B`` rows, ``L`` tokens of the longest prompt and its completion so far, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from trl_grpo_ext.sampling.settings import SamplingSettings


class Draw:
    """Draws one token a row from the logits, with all that the settings ask for.

    The processors see prompt and completion of each row, padded on the left with a number that is
    no token, so that padding neither counts as repeated nor looks like the end of a text.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        prompts: Sequence[Sequence[int]],
        *,
        num_tokens: int,
        device: torch.device,
    ):
        self._settings = settings
        self._length = max(map(len, prompts))
        self._processors = settings.processors(prompt_length=self._length, device=device)
        self._warpers = settings.warpers(device)
        self._history_BL: Tensor | None = None
        if settings.reads_history:
            pads = [[num_tokens] * (self._length - len(prompt)) for prompt in prompts]
            padded = [[*pad, *prompt] for pad, prompt in zip(pads, prompts, strict=True)]
            self._history_BL = torch.tensor(padded, device=device)

    def __call__(self, logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, list[list[float]]]:
        """Return the tokens, and on the CPU the tokens with their two log-probabilities."""
        policy_BV = self._policy(logits_BV)
        sampling_BV = self._sampling(logits_BV, policy_BV)
        if self._settings.temperature == 0:
            drawn_B = sampling_BV.argmax(dim=-1)
        else:
            drawn_B = inverse_cdf(sampling_BV, uniforms_B)
        policy_B, sampling_B = (
            x.gather(1, drawn_B[:, None])[:, 0] for x in (policy_BV, sampling_BV)
        )
        # One transfer a step; float32 holds every integer up to 2^24.
        values: list[list[float]] = torch.stack([drawn_B.float(), policy_B, sampling_B]).tolist()
        return drawn_B, values

    def _policy(self, logits_BV: Tensor) -> Tensor:
        temperature = self._settings.temperature or 1.0
        scaled_BV = logits_BV.float() if temperature == 1.0 else logits_BV.float() / temperature
        return scaled_BV.log_softmax(dim=-1)

    def _sampling(self, logits_BV: Tensor, policy_BV: Tensor) -> Tensor:
        """Log-probabilities after the processors; they get what ``generate`` would give them."""
        if not self._processors and not self._warpers:
            return policy_BV
        scores_BV: Any = logits_BV.float()
        history_BL: Any = self._history_BL
        if history_BL is None:  # only its shape is read
            history_BL = torch.zeros(1, 1, dtype=torch.long, device=logits_BV.device).expand(
                len(logits_BV), self._length
            )
        scores_BV = self._processors(history_BL, scores_BV)
        if self._settings.temperature not in (0, 1):
            scores_BV = scores_BV / self._settings.temperature
        scores_BV = self._warpers(history_BL, scores_BV)
        return cast(Tensor, scores_BV.log_softmax(dim=-1))

    def keep(self, rows: Tensor) -> None:
        """Forget every row but these."""
        if self._history_BL is not None:
            self._history_BL = self._history_BL[rows]

    def extend(self, tokens_B: Tensor) -> None:
        """Add a token to each row."""
        self._length += 1
        if self._history_BL is not None:
            self._history_BL = torch.cat([self._history_BL, tokens_B[:, None]], dim=1)


def inverse_cdf(logprobs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Return for each row the first token whose cumulative probability exceeds the uniform number.

    A token of probability 0 never comes.

    Args:
        logprobs_BV: Shape ``(B, V)``; -inf where the probability is 0.
        uniforms_B: In [0, 1), shape ``(B,)``.

    Returns:
        Shape ``(B,)``, int64.

    Example:
        >>> inverse_cdf(torch.tensor([[0.5, 0.0, 0.5]]).log(), torch.tensor([0.5]))
        tensor([2])
    """
    probs_BV = logprobs_BV.exp()
    if probs_BV.device.type == "mps":  # has no float64
        probs_BV = probs_BV.cpu()
    cdf_BV = probs_BV.cumsum(dim=-1, dtype=torch.float64)
    targets_B1 = uniforms_B.to(cdf_BV)[:, None] * cdf_BV[:, -1:]
    tokens_B1 = torch.searchsorted(cdf_BV, targets_B1, right=True)
    tokens_B1 = tokens_B1.clamp_(max=cdf_BV.shape[1] - 1)
    if probs_BV.device.type == "cuda":  # a parallel sum may step up where it should stand still
        likeliest_B1 = probs_BV.argmax(dim=-1, keepdim=True)
        tokens_B1 = torch.where(probs_BV.gather(1, tokens_B1) > 0, tokens_B1, likeliest_B1)
    return tokens_B1[:, 0].to(logprobs_BV.device)
