"""What a run needs, against hand-worked numbers and against real tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from trl_grpo_ext.memory import (
    PARTS,
    MemoryEstimate,
    RunSettings,
    estimate_memory,
    estimate_run,
    model_shape,
)
from trl_grpo_ext.memory.settings import settings_problems

SIZES = {
    "micro_batch_size": 2,
    "generation_batch_size": 3,
    "num_prompt_tokens": 4,
    "num_completion_tokens": 6,
}
CONFIG = LlamaConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
SHAPE = model_shape(CONFIG)
SIZE = 2 * 80 + 3 * (576 + 16) + 8  # parameters
ON_8 = RunSettings(num_gpus=8, reference="resident")


def parts_of(**changes: Any) -> dict[str, int]:
    return estimate_run(SHAPE, replace(ON_8, **changes)).parts


def storage_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_estimate_memory_equals_real_tensors_for_weights_gradients_and_moments() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    parameters = list(model.parameters())
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]

    parts = estimate_memory(CONFIG, dtype_bytes=2, reference="resident", **SIZES).parts

    assert parts["weights"] == parts["reference"] == storage_bytes(parameters)
    assert parts["gradients"] == storage_bytes([p.grad for p in parameters])
    assert parts["optimizer"] == storage_bytes(moments)


def test_estimate_memory_counts_the_cache_in_the_compute_dtype_and_weights_that_are_cast() -> None:
    mixed = estimate_memory(CONFIG, compute_dtype_bytes=2, **SIZES).parts
    # 3 completions x 10 tokens x 3 layers x (key + value) x 1 head x 4 x 2 bytes
    assert mixed["kv_cache"] == 3 * 10 * 3 * 2 * 4 * 2
    assert mixed["casts"] == 2 * 3 * 576
    assert mixed["weights"] == 4 * SIZE
    assert estimate_memory(CONFIG, **SIZES).parts["casts"] == 0


def test_weights_that_autocast_casts_are_those_that_autograd_keeps() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model.model(torch.tensor([[1, 2, 3]]), use_cache=False)
    weights = {p.shape for p in model.model.layers.parameters() if p.ndim == 2}
    weights |= {shape[::-1] for shape in weights}
    half = {t.untyped_storage().data_ptr(): t for t in kept if t.dtype == torch.bfloat16}
    casts = sum(t.nbytes for t in half.values() if t.shape in weights)
    assert casts == parts_of()["casts"]


@pytest.mark.parametrize(
    ("sharding", "dtype", "weights", "gradients", "optimizer"),
    [
        # float32 weights and gradients, two float32 moments
        ("none", "mixed", 4, 4, 8),
        ("fsdp", "mixed", 4 / 8, 4 / 8, 8 / 8),
        # DeepSpeed: bfloat16 weights and gradients, float32 weights and moments in the optimizer
        ("zero1", "mixed", 2, 2, 12 / 8),
        ("zero2", "mixed", 2, 2 / 8, 12 / 8),
        ("zero3", "mixed", 2 / 8, 2 / 8, 12 / 8),
        ("zero2", "bfloat16", 2, 2 / 8, 12 / 8),
        # pure 16 bits: no float32 anywhere
        ("none", "bfloat16", 2, 2, 4),
        ("fsdp", "bfloat16", 2 / 8, 2 / 8, 4 / 8),
        ("none", "float32", 4, 4, 8),
        ("zero2", "float32", 4, 4 / 8, 8 / 8),
    ],
)
def test_estimate_run_splits_what_each_stage_splits(
    sharding: Any, dtype: Any, weights: float, gradients: float, optimizer: float
) -> None:
    parts = parts_of(sharding=sharding, dtype=dtype)
    assert parts["weights"] == weights * SIZE
    assert parts["gradients"] == gradients * SIZE
    assert parts["optimizer"] == optimizer * SIZE


def test_estimate_run_splits_a_full_reference_where_weights_are_split() -> None:
    assert parts_of()["reference"] == 4 * SIZE
    assert parts_of(sharding="zero2")["reference"] == 2 * SIZE
    assert parts_of(sharding="fsdp")["reference"] == 4 * SIZE / 8
    for whole, split in (("none", "fsdp"), ("zero2", "zero3")):
        quantized = [parts_of(reference="quantized", sharding=x) for x in (whole, split)]
        assert quantized[0]["reference"] == quantized[1]["reference"]


def test_estimate_run_counts_what_sharding_costs() -> None:
    assert parts_of()["buckets"] == 4 * SIZE  # DDP copies gradients
    assert parts_of(num_gpus=1)["buckets"] == parts_of(sharding="zero2")["buckets"] == 0
    # embeddings, head and last norm, two layers, and one layer's gradients, in bfloat16
    assert parts_of(sharding="fsdp")["gathered"] == 2 * (168 + 3 * 592)


def test_estimate_run_trains_an_adapter_on_each_linear_layer_in_float32() -> None:
    parts = parts_of(lora_rank=2, reference="adapter", dtype="bfloat16")
    # A layer: q and o 8+8, k and v 8+4, gate, up and down 8+16
    adapter = 3 * 2 * (2 * 16 + 2 * 12 + 3 * 24)
    assert parts["weights"] == 2 * SIZE
    assert parts["adapter"] == parts["gradients"] == 4 * adapter
    assert parts["optimizer"] == 8 * adapter
    assert parts["reference"] == 0


def test_estimate_run_counts_8_bit_moments_as_bitsandbytes_stores_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # transformers' trainer, in tests before, asks for 32 bits by the id of a parameter, and ids
    # return; and by its place in an optimizer, which is that of ours.
    manager = bnb.optim.GlobalOptimManager.get_instance()
    for kept in ("pid2config", "index2config"):
        monkeypatch.setattr(manager, kept, {})
    shape = model_shape(LlamaConfig(**{**CONFIG.to_dict(), "hidden_size": 256, "vocab_size": 64}))
    parameter = torch.nn.Parameter(torch.randn(64, 256))
    optimizer = bnb.optim.AdamW8bit([parameter])
    parameter.grad = torch.randn(64, 256)
    optimizer.step()
    state = optimizer.state[parameter]
    stored = [state[name] for name in ("state1", "state2", "absmax1", "absmax2")]
    a_weight = storage_bytes(stored) / parameter.numel()

    settings = RunSettings(optimizer="adamw_8bit")
    estimated = estimate_run(shape, settings).parts["optimizer"]

    embedded = 64 * 256  # transformers asks for float32 there
    expected = 8 * embedded + a_weight * (shape.num_parameters - embedded)
    assert estimated == pytest.approx(expected, rel=1e-4)


def test_estimate_run_moves_paged_states_to_the_host_and_sgd_has_none() -> None:
    paged = estimate_run(SHAPE, replace(ON_8, optimizer="paged_adamw_8bit"))
    on_gpu = estimate_run(SHAPE, replace(ON_8, optimizer="adamw_8bit"))
    assert paged.parts["optimizer"] == 0
    assert paged.host_bytes == on_gpu.parts["optimizer"]
    assert on_gpu.host_bytes == 0
    assert parts_of(optimizer="sgd")["optimizer"] == 0


def test_estimate_run_tells_the_host_memory_of_a_streamed_reference() -> None:
    estimate = estimate_run(SHAPE, replace(ON_8, reference="streamed"))
    assert estimate.host_bytes == 4 * 3 * 592
    assert estimate.parts["reference"] == 4 * (168 + 2 * 592)


def test_estimate_run_adds_reward_model_and_critic() -> None:
    plain, parts = parts_of(), parts_of(reward_parameters=1000, has_value_model=True)
    assert parts["reward"] == 2000
    assert parts["value"] == plain["weights"] + plain["gradients"] + plain["optimizer"]
    assert parts_of(reward_parameters=1000, sharding="zero3")["reward"] == 250


def test_estimate_run_counts_prompts_once_a_group_when_prefixes_are_shared() -> None:
    sizes = {"prompt_tokens": 100, "completion_tokens": 10, "num_generations": 8}
    padded, shared = parts_of(**sizes), parts_of(**sizes, shared_prefix=True)
    a_token = 2 * 3 * 4 * 2  # keys and values, layers, width, bytes
    assert padded["kv_cache"] == 8 * 110 * a_token
    assert shared["kv_cache"] == (100 + 8 * 10) * a_token
    assert shared["activations"] < padded["activations"]


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
    # nine parts are always held; gradients and activations are more than the cache
    assert table.splitlines()[-1].endswith("| **11.00** |")
    assert "approximate" in table


def test_memory_estimate_table_leaves_out_what_takes_nothing() -> None:
    table = MemoryEstimate(num_parameters=1, parts={"weights": 2**30, "reward": 0}).to_table()
    assert "reward model" not in table


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_gpus": 0}, "--gpus is 0"),
        ({"micro_batch": 0}, "--micro-batch is 0"),
        ({"num_generations": 1}, "--num-generations is 1"),
        ({"lora_rank": -1}, "A rank is negative"),
        ({"reference": "adapter"}, "no adapter to switch off. Add --lora RANK"),
        ({"num_gpus": 1, "sharding": "fsdp"}, "Use --gpus 2 or more, or --sharding none"),
        ({"num_generations": 7}, "does not divide the 64 completions of a step"),
    ],
)
def test_settings_problems_name_what_cannot_work(changes: dict[str, Any], expected: str) -> None:
    (problem,) = settings_problems(replace(ON_8, **changes))
    assert expected in problem
