"""The memory planner against hand-worked numbers and against real tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from trl_grpo_ext.memory import (
    PARTS,
    MemoryEstimate,
    _cgroup_available_bytes,
    activation_bytes,
    available_memory_bytes,
    count_parameters,
    estimate_memory,
    kv_cache_bytes,
    nf4_bytes,
    reference_bytes,
)

SIZES = {
    "micro_batch_size": 2,
    "generation_batch_size": 3,
    "num_prompt_tokens": 4,
    "num_completion_tokens": 6,
}


@pytest.fixture
def tiny_config() -> LlamaConfig:
    """Width 8, 2 heads of 4 (1 key-value head), MLP 16, 3 layers, 10 tokens, untied."""
    return LlamaConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )


def storage_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_count_parameters_counts_tied_embeddings_once_for_smollm2_135m() -> None:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    count = count_parameters(config)
    assert count.total == 134_515_008
    # A layer: q and o 576 x 576, k and v 576 x 192, gate, up and down 576 x 1536; not the head.
    assert sum(count.linear_sizes) == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)


def test_count_parameters_equals_a_sum_by_hand_for_an_untied_model(
    tiny_config: LlamaConfig,
) -> None:
    count = count_parameters(tiny_config)
    # q 8x8, k 8x4, v 8x4, o 8x8, gate, up, down 8x16 each; head left out
    assert count.linear_sizes == (64, 32, 32, 64, 128, 128, 128) * 3
    # embedding and head 10x8 each, two norms of 8 a layer and one at the end
    assert count.total == 2 * 80 + 3 * (576 + 16) + 8


def test_estimate_memory_equals_real_tensors_for_weights_gradients_and_moments(
    tiny_config: LlamaConfig,
) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    parameters = list(model.parameters())
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]

    parts = estimate_memory(tiny_config, dtype_bytes=2, reference="resident", **SIZES).parts

    assert parts["weights"] == parts["reference"] == storage_bytes(parameters)
    assert parts["gradients"] == storage_bytes([p.grad for p in parameters])
    assert parts["optimizer"] == storage_bytes(moments)


def test_estimate_memory_shrinks_gradients_and_moments_when_few_parameters_are_trainable(
    tiny_config: LlamaConfig,
) -> None:
    parts = estimate_memory(tiny_config, num_trainable=5, **SIZES).parts
    assert (parts["gradients"], parts["optimizer"], parts["reference"]) == (20, 40, 0)
    assert parts["weights"] == 4 * 1944


def test_estimate_memory_counts_cache_and_activations_in_the_compute_dtype_when_it_is_given(
    tiny_config: LlamaConfig,
) -> None:
    parts = estimate_memory(
        tiny_config, compute_dtype_bytes=2, gradient_checkpointing=False, **SIZES
    ).parts
    # 3 completions x 10 tokens x 3 layers x (key + value) x 1 head x 4 x 2 bytes
    assert parts["kv_cache"] == 3 * 10 * 3 * 2 * 4 * 2
    # 2 completions x 10 tokens x 3 layers x (8h + 2 (4h + 2q + 2k + 4f))
    assert parts["activations"] == 2 * 10 * 3 * (64 + 2 * (32 + 16 + 8 + 64))


@pytest.mark.parametrize(
    ("num_weights", "expected"),
    [
        (64, 32 + 1 + 4),  # one block, one float32 for it
        (65, 33 + 2 + 4),  # a second block begins, half a byte is rounded up
        (64 * 257, 8224 + 257 + 8),  # a second float32 begins
    ],
)
def test_nf4_bytes_equals_a_sum_by_hand_at_the_edges_of_blocks(
    num_weights: int, expected: int
) -> None:
    assert nf4_bytes(num_weights) == expected


def test_nf4_bytes_is_4127_thousandths_of_a_bit_for_a_large_matrix() -> None:
    assert nf4_bytes(4096 * 4096) * 8 / 4096**2 == pytest.approx(4.127, abs=1e-4)


def test_nf4_bytes_equals_what_bitsandbytes_stores_when_it_quantizes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(192, 96)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    stored = [packed, state.absmax, state.state2.absmax]
    assert nf4_bytes(weight.numel()) == storage_bytes(stored)


def test_reference_bytes_keeps_embeddings_head_and_norms_in_the_dtype_when_quantized(
    tiny_config: LlamaConfig,
) -> None:
    count = count_parameters(tiny_config)
    # 216 unquantized: embedding, head, seven norms. NF4 of 32, 64, 128: 16+1+4, 32+1+4, 64+2+4
    quantized = 216 * 2 + 3 * (2 * 21 + 2 * 37 + 3 * 70)
    assert reference_bytes(count, kind="quantized", dtype_bytes=2) == quantized
    assert reference_bytes(count, kind="resident", dtype_bytes=2) == 1944 * 2
    assert reference_bytes(count, kind="none", dtype_bytes=2) == 0


def test_kv_cache_bytes_equals_the_cache_of_a_real_forward_pass(tiny_config: LlamaConfig) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config)
    cache = model(torch.ones(2, 5, dtype=torch.long), use_cache=True).past_key_values
    held = storage_bytes([t for layer in cache.layers for t in (layer.keys, layer.values)])
    assert kv_cache_bytes(tiny_config, num_tokens=10, dtype_bytes=4) == held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_bytes_is_within_a_tenth_of_what_autograd_saves_for_a_llama(
    dtype: torch.dtype,
) -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    saved = saved_for_backward(model.model, torch.ones(2, 64, dtype=torch.long))
    estimate = activation_bytes(
        config, num_tokens=128, dtype_bytes=dtype.itemsize, gradient_checkpointing=False
    )
    assert estimate == pytest.approx(saved, rel=0.1)


def saved_for_backward(model: nn.Module, input_ids: Tensor) -> int:
    """Return the bytes of the distinct buffers, weights excepted, that autograd keeps."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids, use_cache=False)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


def test_activation_bytes_keeps_layer_inputs_and_one_layer_when_checkpointing(
    tiny_config: LlamaConfig,
) -> None:
    one_layer = 64 + 4 * (32 + 16 + 8 + 64)
    held = activation_bytes(tiny_config, num_tokens=5, dtype_bytes=4, gradient_checkpointing=True)
    assert held == 5 * (3 * 8 * 4 + one_layer)


def test_memory_estimate_total_is_the_larger_phase_on_top_of_what_is_always_held() -> None:
    always = {"weights": 100, "reference": 20, "optimizer": 200}
    update = {"gradients": 50, "activations": 7}
    small = MemoryEstimate(num_parameters=1, parts={**always, "kv_cache": 40, **update})
    large = MemoryEstimate(num_parameters=1, parts={**always, "kv_cache": 60, **update})
    assert small.total_bytes == 320 + 57
    assert large.total_bytes == 320 + 60


def test_memory_estimate_table_names_every_part_and_the_peak_in_gib() -> None:
    estimate = MemoryEstimate(num_parameters=1, parts=dict.fromkeys(PARTS, 2**30))
    table = estimate.to_table()
    assert all(f"| {title} | {phase} | 1.00 |" in table for title, phase in PARTS.values())
    assert table.splitlines()[-1].endswith("| **5.00** |")
    assert "approximate" in table


def test_cgroup_available_bytes_is_the_limit_less_what_cannot_be_reclaimed(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 450\ninactive_file 250\n")
    assert _cgroup_available_bytes(tmp_path) == 550


def test_cgroup_available_bytes_is_none_without_a_limit(tmp_path: Path) -> None:
    assert _cgroup_available_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("inactive_file 250\n")
    assert _cgroup_available_bytes(tmp_path) is None


def test_available_memory_bytes_is_at_most_the_memory_of_the_machine() -> None:
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
    else:
        total = pytest.importorskip("psutil").virtual_memory().total
    assert 2**20 < available_memory_bytes() <= total
