"""Input embedding and LM head in 8 bits: alone, in a model, and under TRL's fused LM head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference import (
    QuantizedEmbedding,
    QuantizedHead,
    build_reference,
    summarize_reference,
)
from trl_grpo_ext.reference.embeddings import QuantizedTable

IDS = torch.arange(5, 25).view(2, 10)
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def small_llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()


def random_table(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


# The table --------------------------------------------------------------------------------------


def test_table_by_hand() -> None:
    weight = torch.tensor([[127.0, -127.0, 0.4, 1.6], [0.0, 0.0, 0.0, 0.0], [254.0, 3.0, 0.0, -2]])
    expected = [[127.0, -127.0, 0.0, 2.0], [0.0] * 4, [254.0, 4.0, 0.0, -2.0]]
    table = QuantizedTable(weight)
    assert table.weight(torch.float32).tolist() == expected
    assert table.scales_VK.tolist() == [[1.0], [0.0], [2.0]]


@given(
    num_rows=st.integers(1, 9),
    row_length=st.sampled_from([1, 5, 64, 100, 128]),
    magnitude=st.sampled_from([1e-30, 1e-6, 1.0, 1e4]),
    seed=st.integers(0, 100),
)
@hypothesis_settings(max_examples=40, deadline=None)
def test_a_weight_of_a_table_is_off_by_at_most_half_a_step(
    num_rows: int, row_length: int, magnitude: float, seed: int
) -> None:
    weight = magnitude * random_table(num_rows, row_length, seed=seed)
    size = 64 if row_length % 64 == 0 else row_length
    steps = weight.view(num_rows, -1, size).abs().amax(dim=2) / 127
    error = (QuantizedTable(weight).weight(torch.float32) - weight).view(num_rows, -1, size)
    # A scale in bfloat16 is off by 2^-9 at most: that of 127 steps is a quarter of a step.
    assert (error.abs() <= (0.5 + 127 / 512) * steps[..., None]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_table_are_those_of_its_weight_in_any_dtype(dtype: torch.dtype) -> None:
    table = QuantizedTable(1e-4 * random_table(50, 128))
    index = torch.tensor([[3, 49], [0, 3]])
    exact = table.weight(torch.float32)
    assert table.weight(dtype).dtype == dtype
    assert torch.equal(table.weight(dtype), exact.to(dtype))
    assert torch.equal(table.rows(index, dtype), exact.to(dtype)[index])


def test_table_takes_8_25_bits_a_weight_and_is_the_same_in_parts() -> None:
    weight = random_table(5000, 128)
    table = QuantizedTable(weight)
    assert table.num_bytes == sum(buffer.nbytes for buffer in table.buffers())
    assert 8 * table.num_bytes / table.num_weights == 8.25
    assert torch.equal(
        table.weight(torch.float32)[4990:], QuantizedTable(weight[4990:]).weight(torch.float32)
    )


# In a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_are_in_8_bits_and_stay_tied(tied: bool) -> None:
    policy = small_llama(tie_word_embeddings=tied)
    reference = build_reference(policy, embedding_quantization="int8")
    embedding, head = reference.get_input_embeddings(), reference.get_output_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert isinstance(head, QuantizedHead)
    assert (embedding.table is head.table) == tied
    assert policy.config.tie_word_embeddings == tied
    summary, tables = summarize_reference(reference), 1 if tied else 2
    assert summary.num_parameters == sum(p.numel() for p in policy.parameters())
    assert summary.num_quantized == 7 * 4096 + tables * 32 * 64
    plain = summarize_reference(build_reference(policy))
    table_bytes = 32 * 64 + 2 * 32
    assert summary.quantized_bytes == plain.quantized_bytes + tables * table_bytes
    assert summary.num_bytes == plain.num_bytes + tables * (table_bytes - 4 * 32 * 64)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_with_8_bit_embeddings_computes_with_their_weights(
    tied: bool, dtype: torch.dtype
) -> None:
    policy = small_llama(tie_word_embeddings=tied).to(dtype)
    reference = build_reference(policy, embedding_quantization="int8")
    expected = build_reference(policy)
    expected.get_input_embeddings().weight.data = reference.get_input_embeddings().weight
    expected.get_output_embeddings().weight.data = reference.get_output_embeddings().weight
    assert logits_of(reference).dtype == dtype
    assert torch.equal(logits_of(reference), logits_of(expected))
    assert not torch.equal(logits_of(reference), logits_of(build_reference(policy)))


def test_the_bias_of_a_head_is_kept() -> None:
    policy = PhiForCausalLM(PhiConfig(**SIZES)).eval()
    nn.init.normal_(policy.lm_head.bias)
    reference = build_reference(policy, quantization="int8", embedding_quantization="int8")
    assert torch.equal(reference.lm_head.bias, policy.lm_head.bias)
    assert reference.lm_head.bias is not policy.lm_head.bias
    assert summarize_reference(reference).num_parameters == policy.num_parameters()
    torch.testing.assert_close(logits_of(reference), logits_of(policy), rtol=0, atol=0.2)


def test_under_autocast_head_and_embedding_are_those_of_an_ordinary_model() -> None:
    policy = small_llama()
    reference = build_reference(policy, embedding_quantization="int8")
    expected = build_reference(policy)
    expected.get_input_embeddings().weight.data = reference.get_input_embeddings().weight
    expected.get_output_embeddings().weight.data = reference.get_output_embeddings().weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits_of(reference), logits_of(expected))
        assert logits_of(reference).dtype == torch.bfloat16


def test_under_autocast_the_head_never_makes_its_weight_in_full_precision() -> None:
    asked: list[torch.dtype] = []

    class Recording(QuantizedTable):
        def weight(self, dtype: torch.dtype) -> Tensor:
            asked.append(dtype)
            return super().weight(dtype)

    with torch.autocast("cpu", torch.bfloat16):
        QuantizedHead(Recording(random_table(8, 64)), torch.float32, None)(random_table(2, 64))
    assert asked == [torch.bfloat16]


def test_a_change_of_dtype_rounds_no_scale() -> None:
    reference = build_reference(small_llama(), embedding_quantization="int8")
    table = reference.lm_head.table
    before = table.weight(torch.float32)
    reference = copy.deepcopy(reference).to(torch.float16)
    assert reference.lm_head.weight.dtype == torch.float16
    assert torch.equal(reference.lm_head.table.weight(torch.float32), before)
    assert logits_of(reference).dtype == torch.float16


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_trl_s_fused_head_multiplies_with_the_dequantized_weight(tied: bool, cast: bool) -> None:
    policy = small_llama(tie_word_embeddings=tied).to(torch.bfloat16 if cast else torch.float32)
    reference = build_reference(policy, embedding_quantization="int8")
    if cast:  # as TRL does for `cast_lm_head_to_fp32`
        reference.lm_head = reference.lm_head.float()
    add_fused_lm_head(reference, cast_lm_head_to_fp32=cast)
    with torch.no_grad():
        found = reference(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs
        hidden = reference.model(input_ids=IDS).last_hidden_state[:, :-1]
    logits = hidden.float() @ reference.lm_head.table.weight(torch.float32).T
    expected = logits.log_softmax(dim=-1).gather(2, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_tie_weights_finds_nothing_to_tie() -> None:
    reference = build_reference(
        small_llama(tie_word_embeddings=True), embedding_quantization="int8"
    )
    before = logits_of(reference)
    reference.tie_weights()
    assert torch.equal(logits_of(reference), before)


def test_head_or_embedding_can_be_kept() -> None:
    policy = small_llama()
    reference = build_reference(policy, embedding_quantization="int8", keep_modules=["lm_head"])
    assert torch.equal(reference.lm_head.weight, policy.lm_head.weight)
    assert isinstance(reference.model.embed_tokens, QuantizedEmbedding)
    tied = small_llama(tie_word_embeddings=True)
    reference = build_reference(tied, embedding_quantization="int8", keep_modules=["lm_head"])
    assert torch.equal(reference.lm_head.weight, tied.lm_head.weight)


def test_training_the_policy_does_not_move_8_bit_embeddings() -> None:
    policy = small_llama(tie_word_embeddings=True)
    reference = build_reference(policy, embedding_quantization="int8")
    before = logits_of(reference)
    with torch.no_grad():
        policy.lm_head.weight.add_(1.0)
    assert torch.equal(logits_of(reference), before)
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_state_dict_restores_8_bit_embeddings() -> None:
    source, target = (
        build_reference(small_llama(tie_word_embeddings=True), embedding_quantization="int8")
        for _ in range(2)
    )
    assert not torch.equal(logits_of(target), logits_of(source))
    target.load_state_dict(source.state_dict())
    assert torch.equal(logits_of(target), logits_of(source))


def test_an_embedding_that_does_more_than_look_up_is_refused() -> None:
    config = Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=16, pad_token_id=0)
    policy = Gemma3ForCausalLM(config)
    with pytest.raises(ReferenceModelError) as caught:
        build_reference(policy, embedding_quantization="int8")
    assert str(caught.value) == (
        "The policy has a Gemma3TextScaledWordEmbedding, which may do more than look up rows or "
        "multiply, so in 8 bits it might be another model. "
        "Remove `reference_embedding_quantization`."
    )
