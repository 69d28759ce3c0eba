"""TRL's trainer that can decode greedily, and score completions without their log-probabilities."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trl_grpo_ext._trl.seams import SeamedGRPOTrainer

# What shapes a draw only, at the values that leave it as it is.
_NO_DRAW: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_p": None,
    "top_h": None,
}


class GreedySeams(SeamedGRPOTrainer):
    """``trl.GRPOTrainer`` with greedy decoding by whichever engine the run has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._without_logprobs = False
        super().__init__(*args, **kwargs)

    @contextmanager
    def _greedy(self) -> Iterator[None]:
        """Take the likeliest token each time, and one completion a prompt."""
        group_size, self.num_generations_eval = self.num_generations_eval, 1
        try:
            with self._greedy_vllm() if self.use_vllm else self._greedy_transformers():
                yield
        finally:
            self.num_generations_eval = group_size

    @contextmanager
    def _greedy_transformers(self) -> Iterator[None]:
        """For the engines that read TRL's generation configuration, ours among them."""
        given = self.generation_config
        self.generation_config = copy.deepcopy(given)
        for name, value in _NO_DRAW.items():
            setattr(self.generation_config, name, value)
        try:
            yield
        finally:
            self.generation_config = given

    @contextmanager
    def _greedy_vllm(self) -> Iterator[None]:
        """For vLLM, where temperature 0 is greedy whatever else shapes a draw."""
        engine = self.vllm_generation
        temperature, options = engine.temperature, engine.generation_kwargs
        engine.temperature = 0.0
        engine.generation_kwargs = {k: v for k, v in options.items() if k != "temperature"}
        try:
            yield
        finally:
            engine.temperature, engine.generation_kwargs = temperature, options

    @contextmanager
    def _only_scores(self) -> Iterator[None]:
        """Let TRL generate and score without a forward pass: its log-probabilities are 0."""
        self._without_logprobs = True
        try:
            yield
        finally:
            self._without_logprobs = False

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        **kwargs: Any,
    ) -> Any:
        if self._without_logprobs:
            shape = len(input_ids), logits_to_keep
            return torch.zeros(shape, device=input_ids.device), None, None
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, **kwargs
        )
