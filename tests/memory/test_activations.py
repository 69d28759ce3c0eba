"""Cache and activations, against what real models keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from trl_grpo_ext.logprobs import pack_groups, prepare_shared_prefix
from trl_grpo_ext.memory import kv_cache_bytes, model_shape
from trl_grpo_ext.memory.activations import Tokens, activation_bytes

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16),
    "phi3": Phi3Config(**SIZES),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16),
}
GROUP = Tokens(num_completions=4, num_prompts=1, prompt=24, completion=16)


def test_kv_cache_bytes_equals_the_cache_of_a_real_forward_pass() -> None:
    config = FAMILIES["qwen3"]
    model = AutoModelForCausalLM.from_config(config)
    cache = model(torch.ones(2, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(config, num_tokens=10, dtype_bytes=4) == held
    assert 10 * model_shape(config).cache_width * 4 == held


def test_tokens_count_prompts_as_often_as_they_are_computed() -> None:
    # 4 completions of 16 tokens, prompts of 24
    assert GROUP.padded == 4 * (24 + 16)
    assert GROUP.cached_once == 24 + 4 * 16
    assert GROUP.packed == 24 + 4 * 15


@pytest.mark.parametrize("precision", ["bfloat16", "float32", "mixed"])
@pytest.mark.parametrize("shared_prefix", [False, True], ids=["padded", "shared_prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_bytes_are_close_to_what_autograd_saves(
    family: str, precision: str, shared_prefix: bool
) -> None:
    config = FAMILIES[family]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    mixed, shape = precision == "mixed", model_shape(config)

    saved = saved_for_backward(model, autocast=mixed, shared_prefix=shared_prefix)
    if mixed:  # the weights that autocast casts are saved too; a plan has them in a line of its own
        saved -= 2 * shape.num_linear

    planned = activation_bytes(
        shape,
        tokens=GROUP,
        weight_bytes=dtype.itemsize,
        compute_bytes=2 if mixed else dtype.itemsize,
        gradient_checkpointing=False,
        shared_prefix=shared_prefix,
    )
    # Phi-3 computes queries, keys and values in one layer, gate and up in another.
    assert planned == pytest.approx(saved, rel=0.1 if family == "phi3" else 0.03)


def group_of_rows() -> Tensor:
    """One prompt of 24 tokens, four times, each time with a completion of 16."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 16, (4, 40), generator=generator)
    ids[:, :24] = ids[0, :24]
    return ids


def saved_for_backward(model: Any, *, autocast: bool, shared_prefix: bool) -> int:
    """Return the bytes of the distinct buffers, the model's own excepted, that autograd keeps."""
    inputs: dict[str, Any] = {"input_ids": group_of_rows(), "use_cache": False}
    if shared_prefix:
        prepare_shared_prefix(model)
        ids = inputs["input_ids"]
        inputs = pack_groups(ids, torch.ones_like(ids), num_labels=16).inputs
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.model(**{name: value for name, value in inputs.items() if name in KEPT_INPUTS})
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in sizes.items() if pointer not in own_storage(model))


KEPT_INPUTS = {"input_ids", "position_ids", "attention_mask", "use_cache", "shared_prefix"}


def own_storage(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


def test_activation_bytes_keeps_layer_inputs_and_one_layer_when_checkpointing() -> None:
    shape = model_shape(FAMILIES["llama"])
    sizes: dict[str, Any] = {"tokens": GROUP, "weight_bytes": 4, "compute_bytes": 4}
    whole = activation_bytes(shape, gradient_checkpointing=False, **sizes)
    last = 160 * 96 * 12  # of the final norm: its input, the normed values, its output
    one_layer = (whole - last) // 4
    inputs = 4 * 160 * 96 * 4
    assert activation_bytes(shape, gradient_checkpointing=True, **sizes) == (
        inputs + one_layer + last
    )
