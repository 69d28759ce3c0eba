"""Distillation: the KL falls, and nothing but the factors changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference import QuantizedLinear, build_reference
from trl_grpo_ext.reference.calibration import calibrate
from trl_grpo_ext.reference.completions import CompletionBatch, completion_batches
from trl_grpo_ext.reference.distillation import distill
from trl_grpo_ext.reference.fidelity import measure_fidelity

Batches = list[CompletionBatch]


def random_batches(*, seed: int = 0, count: int = 48) -> Batches:
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest: int) -> list[int]:
        length = int(torch.randint(2, longest + 1, (), generator=generator))
        return torch.randint(3, 64, (length,), generator=generator).tolist()

    prompts, completions = zip(*((tokens(6), tokens(12)) for _ in range(count)), strict=True)
    return completion_batches(prompts, completions, max_tokens=200)


def calibrated(policy: PreTrainedModel) -> PreTrainedModel:
    reference = build_reference(policy)
    calibrate(reference, policy, random_batches(), rank=4)
    return reference


def qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(config).eval()


def floor(policy: PreTrainedModel, reference: PreTrainedModel) -> float:
    """On completions that the reference was not made with."""
    return measure_fidelity(policy, reference, random_batches(seed=1)).kl_full


def layers_of(reference: nn.Module) -> list[QuantizedLinear]:
    return [module for module in reference.modules() if isinstance(module, QuantizedLinear)]


@pytest.mark.parametrize("make", ["llama", "qwen3_moe"])
def test_the_floor_falls_on_other_completions(tiny_model: LlamaForCausalLM, make: str) -> None:
    policy = tiny_model if make == "llama" else qwen3_moe()
    reference = calibrated(policy)
    before = floor(policy, reference)
    distill(reference, policy, random_batches(count=256), num_steps=60, learning_rate=3e-3)
    assert floor(policy, reference) < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_floor_falls_in_16_bits(tiny_model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    policy = tiny_model.to(dtype)
    reference = calibrated(policy)
    before = floor(policy, reference)
    distill(reference, policy, random_batches(count=256), num_steps=20, learning_rate=3e-3)
    assert floor(policy, reference) < before


def test_only_the_factors_change_and_they_stay_16_bit_buffers(tiny_model: LlamaForCausalLM) -> None:
    reference = calibrated(tiny_model)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    types = {name: tensor.dtype for name, tensor in before.items()}
    parameters = {name for name, _ in reference.named_parameters()}
    with torch.no_grad():  # it needs no grad mode around it
        distill(reference, tiny_model, random_batches(), num_steps=3)
    after = reference.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (".factor_" not in name), name
        assert tensor.dtype.itemsize == types[name].itemsize
    assert {name for name, _ in reference.named_parameters()} == parameters
    assert not any(p.requires_grad for p in reference.parameters())
    for layer in layers_of(reference):
        for factor in (layer.factor_in, layer.factor_out):
            assert type(factor) is torch.Tensor
            assert not factor.requires_grad


def test_the_policy_is_unchanged(tiny_model: LlamaForCausalLM) -> None:
    tiny_model.train()
    tiny_model.model.norm.eval()
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    training = [module.training for module in tiny_model.modules()]
    distill(calibrated(tiny_model), tiny_model, random_batches(), num_steps=2)
    assert [module.training for module in tiny_model.modules()] == training
    for name, parameter in tiny_model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None


def test_it_is_the_same_each_time(tiny_model: LlamaForCausalLM) -> None:
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        reference = calibrated(tiny_model)
        distill(reference, tiny_model, random_batches(), num_steps=4)
        found.append(reference.state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor)


def test_batches_are_taken_in_turn(tiny_model: LlamaForCausalLM) -> None:
    """As many steps as batches, and one batch more: the first one again."""
    batches = random_batches()
    first, second = calibrated(tiny_model), calibrated(tiny_model)
    distill(first, tiny_model, batches, num_steps=len(batches) + 1)
    distill(second, tiny_model, [*batches, batches[0]], num_steps=len(batches) + 1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)


def test_the_first_step_is_one_of_adam_along_the_gradient_of_the_divergence(
    tiny_model: LlamaForCausalLM,
) -> None:
    """Adam's first step is the learning rate in each element, against the gradient's sign.

    The gradient is of a factor as a whole matrix, by changing one element at a time.
    """
    reference, batches = calibrated(tiny_model), random_batches(count=4)
    layer = layers_of(reference)[-1]
    assert layer.factor_out is not None
    start = layer.factor_out.float()

    def divergence(factor_out: Any) -> float:
        layer.factor_out = factor_out
        total, count = 0.0, 0
        with torch.no_grad():
            for ids, mask in zip(
                batches[0].input_ids_BW, batches[0].attention_mask_BW, strict=True
            ):
                length = int(mask[-batches[0].num_labels :].sum())
                p, q = (
                    model(input_ids=ids[mask.bool()][None]).logits[0, -length - 1 : -1] / 0.5
                    for model in (tiny_model, reference)
                )
                p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
                total += float((p.exp() * (p - q)).sum())
                count += length
        return total / count

    signs, slopes = [], []
    for row in range(0, 32, 4):
        moved = []
        for step in (0.02, -0.02):
            changed = start.clone()
            changed[row, 0] += step
            moved.append(divergence(changed))
        slopes.append((moved[0] - moved[1]) / 0.04)
    divergence(start.half())
    distill(reference, tiny_model, batches, num_steps=1, learning_rate=0.01, temperature=0.5)
    assert layer.factor_out is not None
    change = layer.factor_out.float()[::4, 0] - start[::4, 0]
    for slope, step in zip(slopes, change.tolist(), strict=True):
        if abs(slope) > 1e-3:
            signs.append(step * slope < 0)
            assert abs(step) == pytest.approx(0.01, rel=0.1)
    assert len(signs) >= 4
    assert all(signs)


def test_the_learning_rate_falls_along_a_cosine(tiny_model: LlamaForCausalLM) -> None:
    """Where the gradient stays the same, the second of two steps is half as large: 1.5 in all."""
    reference, batches = calibrated(tiny_model), random_batches(count=4)[:1]
    before = [layer.factor_in.float() for layer in layers_of(reference)]
    distill(reference, tiny_model, batches, num_steps=2, learning_rate=0.01)
    after = [layer.factor_in.float() for layer in layers_of(reference)]
    changes = [(a - b).abs().flatten() for a, b in zip(after, before, strict=True)]
    assert float(torch.cat(changes).quantile(0.9)) == pytest.approx(0.015, rel=0.1)


def test_no_step_changes_nothing(tiny_model: LlamaForCausalLM) -> None:
    reference = calibrated(tiny_model)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    distill(reference, tiny_model, random_batches(), num_steps=0)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_error_leaves_a_reference_that_can_be_used(tiny_model: LlamaForCausalLM) -> None:
    reference, batches = calibrated(tiny_model), random_batches()
    wrong = CompletionBatch(
        torch.full((1, 4), 10_000), torch.ones(1, 4, dtype=torch.long), num_labels=2
    )
    with pytest.raises(IndexError):
        distill(reference, tiny_model, [batches[0], wrong], num_steps=2)
    assert all(layer.factor_in.dtype.itemsize == 2 for layer in layers_of(reference))
    assert not any(buffer.requires_grad for buffer in reference.buffers())


def test_a_reference_without_factors_is_refused(tiny_model: LlamaForCausalLM) -> None:
    with pytest.raises(ReferenceModelError) as error:
        distill(build_reference(tiny_model), tiny_model, random_batches(), num_steps=1)
    assert str(error.value) == (
        "The reference has no low-rank factors to train. "
        "Set `reference_compensation: low_rank`, or `reference_distillation_steps: 0`."
    )


def test_progress_counts_the_steps(
    tiny_model: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(calibrated(tiny_model), tiny_model, random_batches(), num_steps=1)
    assert not capsys.readouterr().err
    distill(calibrated(tiny_model), tiny_model, random_batches(), num_steps=1, progress=True)
    assert "Distilling the reference: 100%" in capsys.readouterr().err
