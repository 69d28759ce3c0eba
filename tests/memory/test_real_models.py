"""Plans against real models of full size, with random weights; run with -s to see the figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trl_grpo_ext.memory import RunSettings, estimate_run, model_shape
from trl_grpo_ext.memory.models import planned_config
from trl_grpo_ext.reference import build_reference

MB = 10**6
SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "reference": "quantized",
    "micro_batch": 4,
    "generation_batch": 4,
    "num_generations": 4,
    "prompt_tokens": 64,
    "completion_tokens": 32,
    "gradient_checkpointing": False,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SmolLM2-135M", "SmolLM2-360M", "Qwen2.5-0.5B", "Qwen3-0.6B"])
def test_plan_is_within_a_twentieth_of_a_real_model(name: str) -> None:
    config = planned_config(name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    planned = estimate_run(model_shape(config), RunSettings(**SETTINGS)).parts
    measured = {
        "weights": stored_bytes(model),
        "reference": stored_bytes(build_reference(model)),
        "kv_cache": cache_bytes(model),
        "activations": saved_bytes(model.model),
    }
    for part, size in measured.items():
        print(f"| {name} | {part} | {size / MB:.1f} | {planned[part] / MB:.1f} |")
    for part, size in measured.items():
        assert planned[part] == pytest.approx(size, rel=0.05), part


def stored_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


def cache_bytes(model: Any) -> int:
    with torch.no_grad():
        cache = model(torch.ones(4, 96, dtype=torch.long), use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def saved_bytes(backbone: nn.Module) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*backbone.parameters(), *backbone.buffers())}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        backbone(torch.ones(4, 96, dtype=torch.long), use_cache=False)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in sizes.items() if pointer not in own)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_activations_are_within_a_fifth_of_what_cuda_allocates(
    dtype: Any, gradient_checkpointing: bool
) -> None:
    config = planned_config("Qwen2.5-0.5B")
    changes = {"dtype": dtype, "gradient_checkpointing": gradient_checkpointing}
    sizes = {"micro_batch": 8, "prompt_tokens": 512, "completion_tokens": 512}
    settings = RunSettings(**{**SETTINGS, **sizes, **changes})
    parts = estimate_run(model_shape(config), settings).parts
    weights = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=weights).cuda().train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "mixed"):
        hidden = model.model(torch.ones(8, 1024, dtype=torch.long, device="cuda"), use_cache=False)
    hidden.last_hidden_state.float().mean().backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    used = torch.cuda.max_memory_allocated() - before
    planned = parts["activations"] + parts["casts"]
    # Gradients arrive while activations go: at the peak there are between none and all of them.
    assert 0.8 * (used - gradients) <= planned <= 1.2 * used
