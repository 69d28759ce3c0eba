"""A model with six words, for counting probabilities out: ``from sampling.small import ...``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

WORDS = ["<eos>", "a", "b", "c", "d", "e"]
EOS = 0


def small_config(**options: Any) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": len(WORDS),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "attention_dropout": 0.5,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": EOS,
            "pad_token_id": None,
            **options,
        }
    )


def build_small_model() -> LlamaForCausalLM:
    """A Llama that ends about every fifth time; dropout would show in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return LlamaForCausalLM(small_config()).float().eval()


def next_token_logits(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    """What the model says before each token of the completion: no padding, no cache."""
    logits_TV = model(torch.tensor([prompt + completion]), use_cache=False).logits[0].float()
    return logits_TV[len(prompt) - 1 :][: max(len(completion), 1)]
