"""The shape of models, against sums by hand and against real models."""

from __future__ import annotations

import pytest
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from trl_grpo_ext.memory import reference_bytes
from trl_grpo_ext.memory.shape import Matrix, model_shape
from trl_grpo_ext.reference.layer_stream import streamed_layers
from trl_grpo_ext.reference.streamed import build_streamed_reference

SIZES = {
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}


def test_model_shape_equals_a_sum_by_hand_for_an_untied_model() -> None:
    shape = model_shape(LlamaConfig(**SIZES, tie_word_embeddings=False))
    # q 8x8, k and v 4x8, o 8x8, gate and up 16x8, down 8x16; the head is no matrix, but a table
    layer = [(8, 8), (4, 8), (4, 8), (8, 8), (16, 8), (16, 8), (8, 16)]
    assert shape.matrices == tuple(Matrix(*size) for size in layer) * 3
    assert shape.num_in_matrices == shape.num_linear == 3 * 576
    assert shape.tables == (Matrix(10, 8), Matrix(10, 8))
    # embedding and head 10x8 each, two norms of 8 a layer and one at the end
    assert shape.num_parameters == 2 * 80 + 3 * (576 + 16) + 8
    assert shape.largest_layer == 576 + 16
    assert shape.outside_layers == 2 * 80 + 8
    assert (shape.query_width, shape.kv_width, shape.mlp_width) == (8, 4, 16)
    assert shape.cache_width == 2 * 3 * 4
    assert (shape.num_norms, shape.has_query_norm) == (2, False)


def test_model_shape_counts_a_tied_table_once() -> None:
    shape = model_shape(LlamaConfig(**SIZES, tie_word_embeddings=True))
    assert shape.tables == (Matrix(10, 8),)
    assert shape.num_parameters == 80 + 3 * (576 + 16) + 8


def test_model_shape_counts_experts_one_by_one() -> None:
    shape = model_shape(Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=4, tie_word_embeddings=True))
    # gate_up_proj (4, 2 x 6, 8), down_proj (4, 8, 6); the router (4, 8) is no linear layer
    experts = [matrix for matrix in shape.matrices if matrix.is_expert]
    assert experts == [Matrix(12, 8, 4, True), Matrix(8, 6, 4, True)] * 3
    assert shape.num_in_matrices == 3 * (4 * (96 + 48) + 8 * 8 + 2 * 4 * 8 + 8 * 8)
    assert shape.num_linear == 3 * (8 * 8 + 2 * 4 * 8 + 8 * 8)
    assert (shape.mlp_width, shape.expert_width, shape.num_experts_per_token) == (0, 12, 2)


def test_model_shape_reads_norms_off_the_layer() -> None:
    qwen = model_shape(Qwen3Config(**SIZES, head_dim=4))
    gemma = model_shape(Gemma3TextConfig(**SIZES, head_dim=4))
    assert (qwen.num_norms, qwen.has_query_norm, qwen.has_float32_norms) == (2, True, False)
    assert (gemma.num_norms, gemma.has_query_norm, gemma.has_float32_norms) == (4, True, True)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=4),
        GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=3, n_head=2, bos_token_id=None,
                   eos_token_id=None),
    ],
    ids=["llama", "moe", "gpt2"],
)  # fmt: skip
def test_model_shape_has_the_parameters_of_the_real_model(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    shape = model_shape(config)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.num_layers == 3


def test_layers_of_several_kinds_are_counted_one_by_one() -> None:
    config = Qwen3MoeConfig(
        vocab_size=4000,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=2,
        mlp_only_layers=[0, 1],
    )
    policy = AutoModelForCausalLM.from_config(config).float()
    reference = build_streamed_reference(policy)
    planned = reference_bytes(model_shape(config), kind="streamed", dtype_bytes=4)
    stream = streamed_layers(reference)[0].stream
    outside = sum(parameter.nbytes for parameter in reference.parameters())
    found = (outside + stream.slot_bytes, stream.host_bytes)
    assert planned == pytest.approx(found, rel=1e-3)  # each tensor begins on a boundary
