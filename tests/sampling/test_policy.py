"""The model of a recipe that samples and trains nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM
from trl import ModelConfig

from trl_grpo_ext.sampling.policy import load_policy


def test_policy_is_loaded_for_sampling(tiny_model_dir: Path, tiny_model: LlamaForCausalLM) -> None:
    policy, tokenizer = load_policy(
        str(tiny_model_dir),
        model=ModelConfig(dtype="bfloat16"),
        trust_remote_code=False,
        device=torch.device("cpu"),
    )
    assert not policy.training
    assert policy.dtype == torch.bfloat16
    weight = tiny_model.get_input_embeddings().weight.to(torch.bfloat16)
    assert torch.equal(policy.get_input_embeddings().weight, weight)
    assert tokenizer.chat_template
