"""Policies of several families, and what a reference loses: ``from calibrating import ...``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trl_grpo_ext.reference import QuantizedLinear, build_reference
from trl_grpo_ext.reference.calibration import calibrate
from trl_grpo_ext.reference.completions import (
    CompletionBatch,
    completion_batches,
    completion_logits,
)

Batches = list[CompletionBatch]

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def seeded(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model


def gpt2() -> PreTrainedModel:
    """Its linear layers are ``Conv1D``: weights transposed."""
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2)
    return seeded(GPT2LMHeadModel, config)


def opt() -> PreTrainedModel:
    """It has linear layers before and after its decoder layers."""
    sizes = SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 32, "init_std": 0.2}
    return seeded(OPTForCausalLM, OPTConfig(**sizes))


def qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=64, num_experts=4, head_dim=16)
    return seeded(Qwen3MoeForCausalLM, config)


def gpt_oss() -> PreTrainedModel:
    """Its experts are transposed and have biases, and a gate of their own."""
    layer_types = ["sliding_attention", "full_attention"]
    config = GptOssConfig(**SIZES, num_local_experts=4, head_dim=16, layer_types=layer_types)
    return seeded(GptOssForCausalLM, config)


def deepseek_v3() -> PreTrainedModel:
    """Its first layer has no experts, and its second a shared one besides."""
    settings: dict[str, Any] = SIZES | {"num_key_value_heads": 4}
    settings |= dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 32)
    settings |= dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"], 16)
    settings |= {"moe_intermediate_size": 64, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
    return seeded(DeepseekV3ForCausalLM, DeepseekV3Config(**settings, first_k_dense_replace=1))


MIXTURES = [qwen3_moe, gpt_oss, deepseek_v3]
each_mixture = pytest.mark.parametrize("make_policy", MIXTURES, ids=lambda make: make.__name__)


def batches_of(
    policy: PreTrainedModel, *, seed: int = 0, count: int = 48, max_tokens: int = 200
) -> Batches:
    """Prompts of 2 to 6 and completions of 2 to 12 tokens, all of them random."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest: int) -> list[int]:
        length = int(torch.randint(2, longest + 1, (), generator=generator))
        size = min(64, policy.config.vocab_size)
        return torch.randint(3, size, (length,), generator=generator).tolist()

    prompts, completions = zip(*((tokens(6), tokens(12)) for _ in range(count)), strict=True)
    return completion_batches(prompts, completions, max_tokens=max_tokens)


def divergence(policy: PreTrainedModel, reference: PreTrainedModel, batches: Batches) -> float:
    """Mean KL from the policy to the reference over the whole vocabulary, nats a token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            mask = batch.mask_BT.bool()
            exact, found = (
                completion_logits(model, batch)[mask].float().log_softmax(dim=-1)
                for model in (policy, reference)
            )
            total += float((exact.exp() * (exact - found)).sum())
            count += len(exact)
    return total / count


def calibrated(policy: PreTrainedModel, batches: Batches, **settings: Any) -> PreTrainedModel:
    reference = build_reference(policy)
    calibrate(reference, policy, batches, **settings)
    return reference


def codes(reference: PreTrainedModel) -> dict[str, Tensor]:
    return {
        name: module.codes()
        for name, module in reference.named_modules()
        if isinstance(module, QuantizedLinear)
    }
