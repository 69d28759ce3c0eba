"""References in 4 and 8 bits: which layers get 8, against the slow way, and what that gains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibrating import (
    Batches,
    batches_of,
    calibrated,
    codes,
    deepseek_v3,
    divergence,
    each_mixture,
    gpt2,
    opt,
    qwen3_moe,
)
from transformers import LlamaForCausalLM, PreTrainedModel

from trl_grpo_ext.cpu_linear import use_onednn
from trl_grpo_ext.reference import (
    QuantizedExperts,
    build_reference,
    calibrate_mixed,
    summarize_reference,
)
from trl_grpo_ext.reference.calibration import rank_up_to
from trl_grpo_ext.reference.completions import CompletionBatch, completion_logits
from trl_grpo_ext.reference.mixed import (
    NUM_ROWS,
    bytes_within,
    layer_divergences,
    most_sensitive,
    quantized_linears,
    source_weight,
    widen,
)

FAMILIES = [gpt2, opt, qwen3_moe, deepseek_v3]
each_family = pytest.mark.parametrize("make_policy", FAMILIES, ids=lambda make: make.__name__)


def num_bytes(reference: PreTrainedModel) -> int:
    return sum(linear.num_bytes for linear in quantized_linears(reference).values())


def slow_divergences(
    policy: PreTrainedModel, reference: PreTrainedModel, batches: Batches
) -> dict[str, float]:
    """From whole gradients of the policy, completion after completion."""
    errors = {
        name: linear.dequantized_weight(torch.float32) - source_weight(policy, reference, name)
        for name, linear in quantized_linears(reference).items()
    }
    rows = [(batch, i) for batch in batches for i in range(len(batch.input_ids_BW))]
    rows = rows[:: -(-len(rows) // NUM_ROWS)]
    totals = dict.fromkeys(errors, 0.0)
    for batch, i in rows:
        policy.zero_grad()
        logprobs = completion_logits(policy, batch)[i].log_softmax(-1)
        drawn = logprobs[torch.arange(batch.num_labels), batch.labels_BT[i]]
        drawn[batch.mask_BT[i].bool()].sum().backward()
        for name, error in errors.items():
            totals[name] += float((error * gradient(policy, reference, name)).sum()) ** 2
    policy.zero_grad()
    return {name: total / (2 * len(rows)) for name, total in totals.items()}


def gradient(policy: PreTrainedModel, reference: PreTrainedModel, name: str) -> torch.Tensor:
    stack_name, _, expert = name.rpartition(".layers.")
    stack = reference.get_submodule(stack_name)
    if isinstance(stack, QuantizedExperts):
        found: Any = policy.get_parameter(stack_name).grad[int(expert)]
        return found.T if stack.transposed else found
    found = policy.get_submodule(name).weight.grad
    return found.T if type(policy.get_submodule(name)).__name__ == "Conv1D" else found


@each_family
def test_divergences_are_those_of_whole_gradients(
    make_policy: Callable[[], PreTrainedModel],
) -> None:
    policy = make_policy()
    batches = batches_of(policy, count=6)
    reference = calibrated(policy, batches)
    expected = slow_divergences(policy, reference, batches)
    found = layer_divergences(reference, policy, batches)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert sum(value > 0 for value in found.values()) > len(found) / 2


def test_divergences_are_those_of_differences(tiny_model: LlamaForCausalLM) -> None:
    name, step = "model.layers.0.mlp.up_proj", 1e-2
    reference, batches = build_reference(tiny_model), batches_of(tiny_model, count=6)
    found = layer_divergences(reference, tiny_model, batches)
    tiny_model.double()
    weight = tiny_model.get_submodule(name).weight
    linear = quantized_linears(reference)[name]
    error = linear.dequantized_weight(torch.float32).double() - weight.detach()
    logprobs = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * error
            logprobs.append(torch.cat([sequence_logprobs(tiny_model, b) for b in batches]))
            weight -= sign * step * error
    slopes = (logprobs[0] - logprobs[1]) / (2 * step)
    assert found[name] == pytest.approx(float(slopes.square().mean() / 2), rel=1e-2)


def sequence_logprobs(model: PreTrainedModel, batch: CompletionBatch) -> torch.Tensor:
    logprobs = completion_logits(model, batch).log_softmax(dim=-1)
    return (logprobs.gather(-1, batch.labels_BT[..., None])[..., 0] * batch.mask_BT).sum(dim=1)


def test_divergences_are_the_same_in_onednn(tiny_model: LlamaForCausalLM) -> None:
    batches = batches_of(tiny_model, count=40)
    reference = calibrated(tiny_model, batches)
    expected = layer_divergences(reference, tiny_model, batches)
    use_onednn(reference)
    found = layer_divergences(reference, tiny_model, batches)
    assert found == pytest.approx(expected, rel=1e-3)


def test_measuring_changes_nothing(tiny_model: LlamaForCausalLM) -> None:
    batches = batches_of(tiny_model, count=6)
    reference = calibrated(tiny_model, batches)
    before = codes(reference)
    with torch.no_grad():
        logits = completion_logits(reference, batches[0])
    layer_divergences(reference, tiny_model, batches)
    assert all(torch.equal(code, before[name]) for name, code in codes(reference).items())
    with torch.no_grad():
        assert torch.equal(completion_logits(reference, batches[0]), logits)
    for model in (reference, tiny_model):
        assert all(parameter.grad is None for parameter in model.parameters())
        for module in model.modules():
            assert not {"forward", "dequantized_weight"} & vars(module).keys()


def test_the_largest_gain_a_byte_comes_first_and_what_fits_goes_on(
    tiny_model: LlamaForCausalLM,
) -> None:
    reference = build_reference(tiny_model)
    linears = quantized_linears(reference)
    small, large = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"
    sizes = {name: linears[name].num_weights for name in (small, large)}
    assert sizes[large] > 2 * sizes[small]
    lost = {large: 1.5 * sizes[large], small: 1.0 * sizes[small]}
    have, wide = num_bytes(reference), build_reference(tiny_model, quantization="int8")
    extra = {n: quantized_linears(wide)[n].num_bytes - linears[n].num_bytes for n in sizes}

    def chosen(spare: int, **changes: float) -> list[str]:
        return most_sensitive(linears, lost | changes, max_bytes=have + spare)

    assert chosen(extra[large] + extra[small]) == [large, small]
    assert chosen(extra[large] + extra[small] - 1) == [large]
    assert chosen(extra[large] - 1) == [small]
    assert chosen(extra[small] - 1) == []
    assert chosen(10**9, **{small: 0.0}) == [large]  # what loses nothing gains nothing


@each_family
@pytest.mark.parametrize("narrow", ["nf4", "fp4"])
def test_layers_widen_and_narrow_again(
    make_policy: Callable[[], PreTrainedModel], narrow: Any
) -> None:
    policy = make_policy()
    reference = build_reference(policy, quantization=narrow)
    names = list(quantized_linears(reference))
    wide = names[1::3]
    expected = quantized_linears(build_reference(policy, quantization="int8"))
    widen(reference, wide, narrow=narrow, policy=policy)
    for name, linear in quantized_linears(reference).items():
        assert linear.quantization == ("int8" if name in wide else narrow)
        if name in wide:
            assert torch.equal(linear.codes(), expected[name].codes())
            assert linear.num_bytes == expected[name].num_bytes
    widen(reference, [], narrow=narrow)
    assert {linear.quantization for linear in quantized_linears(reference).values()} == {narrow}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_floor_falls_within_the_bytes(tiny_model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    policy = tiny_model.to(dtype)
    batches, held_out = batches_of(policy), batches_of(policy, seed=1)
    rounded = calibrated(policy, batches)
    reference = build_reference(policy)
    narrow = summarize_reference(reference).bits_per_weight
    wide = calibrate_mixed(reference, policy, batches, bits=1.5 * narrow)
    assert 0 < len(wide) < len(quantized_linears(reference))
    assert 1.25 * narrow < summarize_reference(reference).bits_per_weight <= 1.5 * narrow
    floors = [divergence(policy, model, held_out) for model in (reference, rounded)]
    assert floors[0] < 0.8 * floors[1]


@each_mixture
def test_experts_are_chosen_one_by_one(make_policy: Callable[[], PreTrainedModel]) -> None:
    policy = make_policy()
    batches, held_out = batches_of(policy, count=96), batches_of(policy, seed=1)
    reference = build_reference(policy)
    bits = 1.6 * summarize_reference(reference).bits_per_weight
    wide = calibrate_mixed(reference, policy, batches, bits=bits)
    experts = [name for name in quantized_linears(reference) if "experts" in name]
    assert 0 < len(set(wide) & set(experts)) < len(experts)
    assert divergence(policy, reference, held_out) < divergence(
        policy, calibrated(policy, batches), held_out
    )


def test_by_default_it_takes_the_bytes_of_factors_of_rank_32(tiny_model: LlamaForCausalLM) -> None:
    reference = build_reference(tiny_model)
    with_factors = calibrated(tiny_model, batches_of(tiny_model), rank=rank_up_to(32))
    assert bytes_within(reference, None) == num_bytes(with_factors)
    assert bytes_within(reference, 8.0) == summarize_reference(reference).num_quantized


def test_all_layers_are_in_8_bits_if_there_is_room(tiny_model: LlamaForCausalLM) -> None:
    reference = build_reference(tiny_model)
    batches = batches_of(tiny_model)
    wide = calibrate_mixed(reference, tiny_model, batches, bits=99)
    assert sorted(wide) == sorted(quantized_linears(reference))
