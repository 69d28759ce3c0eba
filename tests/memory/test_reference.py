"""The bytes of references, against the tensors that a reference is made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from trl_grpo_ext.memory import ReferenceFormat, choose_reference, model_shape, reference_bytes
from trl_grpo_ext.memory.models import planned_config
from trl_grpo_ext.memory.reference import (
    _factor_bytes,
    _table_bytes,
    matrix_bytes,
    quantized_bytes,
)
from trl_grpo_ext.memory.shape import Matrix
from trl_grpo_ext.reference import build_reference
from trl_grpo_ext.reference.embeddings import QuantizedTable
from trl_grpo_ext.reference.mixed import bytes_within
from trl_grpo_ext.reference.quantized import QuantizedLinear
from trl_grpo_ext.reference.streamed import build_streamed_reference

WIDE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GB = 10**9


@pytest.mark.parametrize(
    ("num_weights", "expected"),
    [
        (64, 32 + 1 + 4),  # one block, one float32 for it
        (65, 33 + 2 + 4),  # a second block begins, half a byte is rounded up
        (64 * 257, 8224 + 257 + 8),  # a second float32 begins
    ],
)
def test_matrix_bytes_equals_a_sum_by_hand_at_the_edges_of_blocks(
    num_weights: int, expected: int
) -> None:
    tables = 4 * (16 + 256 + 1)  # levels of code and of scales, and an offset
    assert matrix_bytes(num_weights) == expected + tables


def test_matrix_bytes_is_4127_thousandths_of_a_bit_a_weight_for_a_large_matrix() -> None:
    assert matrix_bytes(8192 * 8192) * 8 / 8192**2 == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("block_size", [64, 256])
def test_matrix_bytes_equals_what_a_quantized_layer_stores(
    quantization: Any, double_quantization: bool, block_size: int
) -> None:
    options: dict[str, Any] = {
        "quantization": quantization,
        "block_size": block_size,
        "double_quantization": double_quantization,
    }
    layer = QuantizedLinear(torch.randn(192, 96), **options)
    assert matrix_bytes(192 * 96, ReferenceFormat(**options)) == layer.num_bytes


@pytest.mark.parametrize("width", [128, 100])
def test_table_bytes_equal_what_an_embedding_in_8_bits_stores(width: int) -> None:
    assert _table_bytes(Matrix(20, width)) == QuantizedTable(torch.randn(20, width)).num_bytes


MIXTURE = Qwen3MoeConfig(**WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256)


@pytest.mark.parametrize("config", [LlamaConfig(**WIDE), MIXTURE], ids=["llama", "moe"])
@pytest.mark.parametrize("embeddings", [None, "int8"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_reference_bytes_are_within_a_hundredth_of_a_reference_that_was_built(
    config: PreTrainedConfig, embeddings: Any, quantization: Any
) -> None:
    policy = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    reference = build_reference(
        policy, quantization=quantization, embedding_quantization=embeddings
    )
    stored = sum(t.nbytes for t in {*reference.parameters(), *reference.buffers()})
    storage = ReferenceFormat(quantization=quantization, embedding_bits=8 if embeddings else None)
    planned = reference_bytes(model_shape(config), kind="quantized", dtype_bytes=2, storage=storage)
    assert planned.device == pytest.approx(stored, rel=0.01)
    assert planned.host == 0


def test_reference_bytes_of_a_streamed_one_are_those_outside_the_layers_and_two_layers() -> None:
    policy = AutoModelForCausalLM.from_config(LlamaConfig(**WIDE | {"num_hidden_layers": 3}))
    reference = build_streamed_reference(policy)
    outside = sum(parameter.nbytes for parameter in reference.parameters())
    layer = sum(parameter.nbytes for parameter in policy.model.layers[0].parameters())
    planned = reference_bytes(model_shape(policy.config), kind="streamed", dtype_bytes=4)
    assert planned == (outside + 2 * layer, 3 * layer)


def test_factor_bytes_equal_what_a_layer_with_low_rank_factors_stores() -> None:
    layer = QuantizedLinear(torch.randn(192, 96))
    plain = layer.num_bytes
    layer.set_low_rank(torch.randn(8, 96), torch.randn(192, 8))
    assert _factor_bytes(Matrix(192, 96), ReferenceFormat(rank=8)) == layer.num_bytes - plain
    assert _factor_bytes(Matrix(192, 4), ReferenceFormat(rank=8)) == 2 * 4 * (192 + 4)


def test_reference_bytes_by_kind_equal_sums_by_hand() -> None:
    shape = model_shape(LlamaConfig(**WIDE))
    size = shape.num_parameters
    layer = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256 + 2 * 256
    outside = 2 * 512 * 256 + 256
    assert size == 2 * layer + outside
    three = replace(shape, num_layers=3, num_parameters=3 * layer + outside)
    assert reference_bytes(shape, kind="none", dtype_bytes=2) == (0, 0)
    assert reference_bytes(shape, kind="adapter", dtype_bytes=2) == (0, 0)
    assert reference_bytes(shape, kind="resident", dtype_bytes=4) == (4 * size, 0)
    streamed = reference_bytes(three, kind="streamed", dtype_bytes=2)
    assert streamed == (2 * (2 * layer + outside), 2 * 3 * layer)


def test_quantized_bytes_adds_low_rank_factors_in_16_bits_beside_every_matrix() -> None:
    shape = model_shape(LlamaConfig(**WIDE))
    plain = quantized_bytes(shape, ReferenceFormat(), 2)
    # q and o 256+256, k and v 128+256, gate, up and down 512+256; each times 2 bytes and the rank
    sides = 2 * 512 + 2 * 384 + 3 * 768
    assert quantized_bytes(shape, ReferenceFormat(rank=8), 2) - plain == 2 * 2 * 8 * sides


def test_quantized_bytes_of_a_budget_are_what_calibration_keeps_to() -> None:
    policy = AutoModelForCausalLM.from_config(LlamaConfig(**WIDE))
    reference = build_reference(policy)
    shape = model_shape(policy.config)
    kept = shape.num_parameters - shape.num_in_matrices
    planned = quantized_bytes(shape, ReferenceFormat(rank=32, bits=5.5), 4)
    assert planned - 4 * kept == bytes_within(reference, 5.5)


def test_quantized_bytes_with_embeddings_in_8_bits_replaces_both_tables() -> None:
    shape = model_shape(LlamaConfig(**WIDE))
    plain = quantized_bytes(shape, ReferenceFormat(), 4)
    saved = plain - quantized_bytes(shape, ReferenceFormat(embedding_bits=8), 4)
    # 512 x 256 twice: 4 bytes each become 1, and 2 for each 64
    assert saved == 2 * 512 * (256 * 4 - 256 - 2 * 4)


def test_quantized_llama_3_70b_takes_about_39_and_a_half_gigabytes() -> None:
    shape = model_shape(planned_config("Llama-3-70B"))
    embeddings = 2 * 128256 * 8192
    linear = shape.num_parameters - embeddings - 161 * 8192
    # 4.127 bits a weight, two tables and 161 norms in 16 bits; small tables of the layers on top
    by_hand = linear * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * (embeddings + 161 * 8192)
    planned = quantized_bytes(shape, ReferenceFormat(), 2)
    assert planned == pytest.approx(by_hand, rel=1e-4)
    assert planned / GB == pytest.approx(39.5, abs=0.05)


def choose(**changes: Any) -> str:
    numbers: dict[str, Any] = {
        "parameter_bytes": 14 * GB,
        "streamed_device_bytes": 2 * GB,
        "free_device_bytes": 20 * GB,
        "reserved_bytes": 10 * GB,
        "free_host_bytes": 64 * GB,
    }
    return choose_reference(**{**numbers, **changes}).kind


def test_choose_reference_takes_the_first_exact_one_that_fits() -> None:
    assert choose(has_adapter=True, free_device_bytes=0) == "adapter"
    assert choose(reserved_bytes=6 * GB) == "resident"
    assert choose(reserved_bytes=6 * GB + 1) == "streamed"


def test_choose_reference_quantizes_where_no_exact_one_fits() -> None:
    assert choose(free_host_bytes=None) == "quantized"
    assert choose(free_host_bytes=14 * GB - 1) == "quantized"
    assert choose(reserved_bytes=18 * GB + 1) == "quantized"
    assert choose(streamed_device_bytes=None) == "quantized"


def test_choose_reference_reads_from_disk_what_host_memory_cannot_hold() -> None:
    small: dict[str, Any] = {"free_host_bytes": 14 * GB - 1, "free_disk_bytes": 14 * GB}
    assert choose(**small) == "streamed"
    assert choose(**{**small, "free_host_bytes": None}) == "streamed"
    assert choose(**{**small, "free_disk_bytes": 14 * GB - 1}) == "quantized"
    assert choose(**{**small, "free_disk_bytes": GB, "disk_bytes": GB}) == "streamed"
    assert choose(**{**small, "reserved_bytes": 18 * GB + 1}) == "quantized"


def test_choose_reference_of_a_split_policy_counts_the_part_of_a_device() -> None:
    assert choose(reserved_bytes=13 * GB, num_shards=2) == "resident"
    assert choose(reserved_bytes=13 * GB + 1, num_shards=2) == "streamed"


def test_choose_reference_streams_where_nothing_fits_and_four_bits_are_more() -> None:
    full = {"reserved_bytes": 20 * GB}
    assert choose(**full, quantized_bytes=2 * GB) == "quantized"
    assert choose(**full, quantized_bytes=2 * GB + 1) == "streamed"
    assert choose(**full, quantized_bytes=2 * GB + 1, free_host_bytes=GB) == "quantized"
    assert choose(reserved_bytes=18 * GB + 1, quantized_bytes=GB) == "quantized"


def test_choose_reference_says_why_with_the_numbers() -> None:
    choice = choose_reference(
        parameter_bytes=14 * GB,
        streamed_device_bytes=2 * GB,
        free_device_bytes=20 * GB,
        reserved_bytes=10 * GB,
        free_host_bytes=8 * GB,
    )
    assert choice.reason == (
        "a copy of 14.0 GB does not fit into the 10.0 GB that are left on the device, nor into the "
        "8.0 GB free in host memory"
    )


@given(
    free=st.integers(0, 100),
    more=st.integers(0, 100),
    host=st.integers(0, 100),
    reserved=st.integers(0, 100),
)
def test_choose_reference_is_never_less_exact_with_more_memory(
    free: int, more: int, host: int, reserved: int
) -> None:
    order = ["quantized", "streamed", "resident"]
    kinds = [
        choose_reference(
            parameter_bytes=30,
            streamed_device_bytes=5,
            free_device_bytes=device,
            reserved_bytes=reserved,
            free_host_bytes=host,
        ).kind
        for device in (free, free + more)
    ]
    assert order.index(kinds[0]) <= order.index(kinds[1])
