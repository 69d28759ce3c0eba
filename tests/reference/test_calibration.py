"""Calibration: what it gains on other completions, against slow sums, and what it leaves alone."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from calibrating import (
    MIXTURES,
    SIZES,
    Batches,
    batches_of,
    calibrated,
    codes,
    divergence,
    each_mixture,
    gpt2,
    gpt_oss,
    opt,
    qwen3_moe,
    seeded,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.layerwise import LayerCall, decoder_layers
from trl_grpo_ext.reference import QuantizedExperts, QuantizedLinear, build_reference
from trl_grpo_ext.reference.calibration import _input_moments, calibrate, check_ranks
from trl_grpo_ext.reference.rounding import round_with_feedback


def share_of_equal_codes(left: PreTrainedModel, right: PreTrainedModel) -> float:
    found = [
        (a == b).float().mean()
        for a, b in zip(codes(left).values(), codes(right).values(), strict=True)
    ]
    return float(torch.stack(found).min())


def scales_of(linear: QuantizedLinear) -> Tensor:
    scales = linear.scales().repeat_interleave(linear.block_size)[: linear.num_weights]
    return scales.view(linear.out_features, linear.in_features)


def slow_moments(rows: Sequence[Tensor], prior: Tensor | None = None) -> Tensor:
    """Token after token; then correlations count N to I, or as many tokens like the prior."""
    count, size = len(rows), len(rows[0])
    total = torch.zeros(size, size, dtype=torch.float64)
    for row in rows:
        total += torch.outer(row, row)
    if prior is not None:
        return (total + size * prior) / (count + size)
    moments = total / count * count / (count + size)
    return moments.diagonal_scatter(total.diagonal() / count)


def expected_codes(linear: QuantizedLinear, weight: Tensor, covariance: Tensor) -> Tensor:
    return round_with_feedback(
        weight, covariance_II=covariance, scales_OI=scales_of(linear), levels=linear.levels
    )


# What it gains ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_floor_falls_on_other_completions(
    tiny_model: LlamaForCausalLM, dtype: torch.dtype
) -> None:
    policy = tiny_model.to(dtype)
    batches, held_out = batches_of(policy), batches_of(policy, seed=1)
    plain = divergence(policy, build_reference(policy), held_out)
    rounded = divergence(policy, calibrated(policy, batches), held_out)
    low_rank = divergence(policy, calibrated(policy, batches, rank=4), held_out)
    assert low_rank < 0.7 * rounded < 0.7 * plain


@pytest.mark.parametrize("make_policy", [gpt2, opt, *MIXTURES], ids=lambda make: make.__name__)
def test_the_floor_falls_in_other_families(make_policy: Callable[[], PreTrainedModel]) -> None:
    policy = make_policy()
    batches, held_out = batches_of(policy, count=96), batches_of(policy, seed=1)
    plain = divergence(policy, build_reference(policy), held_out)
    rounded = divergence(policy, calibrated(policy, batches), held_out)
    low_rank = divergence(policy, calibrated(policy, batches, rank=8), held_out)
    assert low_rank < rounded < plain


@pytest.mark.parametrize("quantization", ["fp4", "int8"])
def test_the_floor_falls_in_other_codes(tiny_model: LlamaForCausalLM, quantization: Any) -> None:
    reference = build_reference(tiny_model, quantization=quantization)
    held_out = batches_of(tiny_model, seed=1)
    plain = divergence(tiny_model, reference, held_out)
    calibrate(reference, tiny_model, batches_of(tiny_model))
    assert divergence(tiny_model, reference, held_out) < plain


def test_a_handful_of_tokens_does_no_harm(tiny_model: LlamaForCausalLM) -> None:
    """Two completions have fewer tokens than a layer has inputs."""
    held_out = batches_of(tiny_model, seed=1)
    plain = divergence(tiny_model, build_reference(tiny_model), held_out)
    few = calibrated(tiny_model, batches_of(tiny_model, count=2))
    assert divergence(tiny_model, few, held_out) < 1.1 * plain


def test_full_rank_is_exact_but_for_16_bits(tiny_model: LlamaForCausalLM) -> None:
    reference = build_reference(tiny_model, keep_modules=["k_proj", "v_proj"])
    calibrate(reference, tiny_model, batches_of(tiny_model), rank=32)
    held_out = batches_of(tiny_model, seed=1)
    assert divergence(tiny_model, reference, held_out) < 1e-5


# Against slow sums --------------------------------------------------------------------------------


def inputs_of_linear_layers(
    policy: PreTrainedModel, reference: PreTrainedModel, batches: Batches, *, index: int
) -> dict[str, list[Tensor]]:
    """What the policy's layer gets, token after token, if the layers below are the reference's.

    Each completion runs alone, without padding.
    """
    hybrid = copy.deepcopy(policy)
    layers = decoder_layers(hybrid)
    for below in range(index):
        layers[below] = decoder_layers(reference)[below]
    found: dict[str, list[Tensor]] = defaultdict(list)

    def note(name: str) -> Callable[..., None]:
        return lambda _, args: found[name].extend(args[0].reshape(-1, args[0].shape[-1]).double())

    for name, module in layers[index].named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(name))
    for batch in batches:
        for ids, mask in zip(batch.input_ids_BW, batch.attention_mask_BW, strict=True):
            with torch.no_grad():
                hybrid(input_ids=ids[mask.bool()][None])
    return found


@pytest.mark.parametrize("index", [0, 1])
def test_codes_are_those_for_a_slow_sum_over_the_tokens(
    tiny_model: LlamaForCausalLM, index: int
) -> None:
    batches = batches_of(tiny_model)
    reference = calibrated(tiny_model, batches)
    inputs = inputs_of_linear_layers(tiny_model, reference, batches, index=index)
    layer = decoder_layers(reference)[index]
    linears = {n: m for n, m in layer.named_modules() if isinstance(m, QuantizedLinear)}
    assert linears.keys() == inputs.keys()
    num_tokens = sum(int(batch.attention_mask_BW.sum()) for batch in batches)
    for name, linear in linears.items():
        assert len(inputs[name]) == num_tokens
        weight = decoder_layers(tiny_model)[index].get_submodule(name).weight
        expected = expected_codes(linear, weight.detach(), slow_moments(inputs[name]))
        assert (linear.codes() == expected).float().mean() > 0.98  # ties fall either way
        nearest = QuantizedLinear(weight.detach()).codes()
        assert (linear.codes() == nearest).float().mean() < 0.95  # so that the above can fail


def test_low_rank_makes_up_for_what_the_codes_lost(tiny_model: LlamaForCausalLM) -> None:
    """The weighted error of the effective weight, against that of the code alone."""
    batches = batches_of(tiny_model)
    reference = calibrated(tiny_model, batches, rank=8)
    inputs = inputs_of_linear_layers(tiny_model, reference, batches, index=1)
    for name, rows in inputs.items():
        linear = decoder_layers(reference)[1].get_submodule(name)
        exact = decoder_layers(tiny_model)[1].get_submodule(name).weight.detach()
        stacked = torch.stack(rows).float()
        lost = [
            (stacked @ (exact - weight).T).square().sum()
            for weight in (
                linear.effective_weight(torch.float32),
                linear.dequantized_weight(torch.float32),
            )
        ]
        assert lost[0] < 0.6 * lost[1]
        assert linear.factor_in.shape == (8, linear.in_features)


def test_layers_with_the_same_inputs_share_one_computation(tiny_model: LlamaForCausalLM) -> None:
    layer = decoder_layers(tiny_model)[0]
    hidden = torch.randn(2, 5, 32)
    position = tiny_model.model.rotary_emb(hidden, torch.arange(5)[None])
    call = LayerCall((hidden,), {"position_embeddings": position}, lambda: None)
    with torch.no_grad():
        moments = _input_moments(layer, [call, call], [torch.ones(2, 5)] * 2)
    groups = defaultdict(set)
    for name, tensor in moments.items():
        groups[id(tensor)].add(name.rpartition(".")[2])
    expected = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, expected))


@pytest.mark.parametrize("make_policy", [None, qwen3_moe], ids=["llama", "qwen3_moe"])
def test_neither_padding_nor_the_order_of_the_batches_matters(
    tiny_model: LlamaForCausalLM, make_policy: Callable[[], PreTrainedModel] | None
) -> None:
    policy = make_policy() if make_policy else tiny_model
    padded = calibrated(policy, batches_of(policy, max_tokens=500))
    single = batches_of(policy, max_tokens=1)
    assert all(batch.attention_mask_BW.all() for batch in single)
    assert share_of_equal_codes(padded, calibrated(policy, single)) > 0.97
    assert share_of_equal_codes(padded, calibrated(policy, single[::-1])) > 0.97
    other = batches_of(policy, seed=1)
    assert share_of_equal_codes(padded, calibrated(policy, other)) < 0.95  # so that it can fail


def test_it_is_the_same_each_time(tiny_model: LlamaForCausalLM) -> None:
    torch.manual_seed(0)
    first = calibrated(tiny_model, batches_of(tiny_model), rank=4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second = calibrated(tiny_model, batches_of(tiny_model), rank=4)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)


def test_autocast_around_it_changes_nothing(tiny_model: LlamaForCausalLM) -> None:
    batches = batches_of(tiny_model)
    expected = calibrated(tiny_model, batches, rank=2)
    reference = build_reference(tiny_model)
    with torch.autocast("cpu", torch.bfloat16):
        calibrate(reference, tiny_model, batches, rank=2)
        assert torch.is_autocast_enabled("cpu")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(reference.state_dict()[name], tensor)


# What it leaves alone -----------------------------------------------------------------------------


@pytest.mark.parametrize("make_policy", [None, gpt2, *MIXTURES])
def test_the_policy_is_unchanged(
    tiny_model: LlamaForCausalLM, make_policy: Callable[[], PreTrainedModel] | None
) -> None:
    policy = make_policy() if make_policy else tiny_model
    policy.train()
    next(policy.children()).eval()
    policy.get_input_embeddings().weight.requires_grad_(False)
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}

    def state() -> list[Any]:
        hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in policy.modules()]
        attributes = [sorted(vars(module)) for module in policy.modules()]
        return [
            [module.training for module in policy.modules()],
            [(p.requires_grad, p.grad is None) for p in policy.parameters()],
            hooks,
            attributes,
            policy.config.to_dict(),
            policy.get_experts_implementation(),
        ]

    before = state()
    calibrated(policy, batches_of(policy, count=8), rank=2)
    assert state() == before
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_dropout_of_a_training_policy_is_off(tiny_model: LlamaForCausalLM) -> None:
    batches = batches_of(tiny_model)
    expected = calibrated(tiny_model, batches)
    tiny_model.config.attention_dropout = 0.5
    for layer in decoder_layers(tiny_model):
        layer.self_attn.attention_dropout = 0.5
    assert share_of_equal_codes(calibrated(tiny_model.train(), batches), expected) == 1


def test_an_error_leaves_no_hook_behind(tiny_model: LlamaForCausalLM) -> None:
    reference = build_reference(tiny_model)
    tiny_model.model.layers[1].mlp.act_fn = None
    with pytest.raises(TypeError):
        calibrate(reference, tiny_model, batches_of(tiny_model))
    assert not any(module._forward_pre_hooks for module in tiny_model.modules())
    assert not any("forward" in vars(module) for module in reference.modules())


def test_the_rest_of_the_reference_is_unchanged(tiny_model: LlamaForCausalLM) -> None:
    """Scales, norms and the embedding, which is tied to the head; only codes are chosen."""
    plain, reference = build_reference(tiny_model), calibrated(tiny_model, batches_of(tiny_model))
    found = reference.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(found[name], tensor) == (not name.endswith("packed")), name
    assert reference.lm_head.weight is reference.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_layers_outside_the_decoder_layers_keep_their_codes() -> None:
    policy = opt()
    plain, found = build_reference(policy), calibrated(policy, batches_of(policy), rank=2)
    for name, before in codes(plain).items():
        module = found.get_submodule(name)
        inside = ".layers." in name
        assert torch.equal(module.codes(), before) == (not inside)
        assert module.has_low_rank == inside


def test_kept_modules_stay_as_they_are(tiny_model: LlamaForCausalLM) -> None:
    reference = build_reference(tiny_model, keep_modules=["down_proj"])
    calibrate(reference, tiny_model, batches_of(tiny_model), rank=2)
    for ours, theirs in zip(reference.model.layers, tiny_model.model.layers, strict=True):
        assert torch.equal(ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight)


def test_progress_counts_the_layers(
    tiny_model: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrated(tiny_model, batches_of(tiny_model, count=2))
    assert not capsys.readouterr().err
    calibrated(tiny_model, batches_of(tiny_model, count=2), progress=True)
    assert "Calibrating the reference: 100%" in capsys.readouterr().err


# Mixtures -----------------------------------------------------------------------------------------


def routed_rows(
    policy: PreTrainedModel, batches: Batches, path: str
) -> tuple[list[Tensor], list[list[int]]]:
    """Hidden states of the tokens that reach experts, and the experts of each; row by row."""
    hidden: list[Tensor] = []
    chosen: list[list[int]] = []

    def note(_: nn.Module, args: Any) -> None:
        hidden.extend(args[0])
        chosen.extend(args[1].tolist())

    with policy.get_submodule(path).register_forward_pre_hook(note), torch.no_grad():
        for batch in batches:
            for ids, mask in zip(batch.input_ids_BW, batch.attention_mask_BW, strict=True):
                policy(input_ids=ids[mask.bool()][None])
    return hidden, chosen


def qwen_between(experts: Any, expert: int, row: Tensor) -> Tensor:
    gate, up = (experts.gate_up_proj[expert] @ row).chunk(2)
    return F.silu(gate) * up


def gpt_oss_between(experts: Any, expert: int, row: Tensor) -> Tensor:
    both = row @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
    gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize(
    ("make_policy", "between"), [(qwen3_moe, qwen_between), (gpt_oss, gpt_oss_between)]
)
def test_codes_of_experts_are_those_for_a_slow_sum_over_their_tokens(
    make_policy: Callable[[], PreTrainedModel], between: Callable[[Any, int, Tensor], Tensor]
) -> None:
    """In the first layer, where attention is kept, so that experts get what the policy's get."""
    policy = make_policy()
    batches = batches_of(policy, count=24)
    reference = build_reference(policy, keep_modules=["self_attn"])
    calibrate(reference, policy, batches)
    path = "model.layers.0.mlp.experts"
    hidden, chosen = routed_rows(policy, batches, path)
    assert len(hidden) == sum(int(batch.attention_mask_BW.sum()) for batch in batches)
    ours, theirs = reference.get_submodule(path), policy.get_submodule(path)
    common = sum(torch.outer(row, row) for row in hidden) / len(hidden)
    for expert in range(4):
        rows = [row for row, experts in zip(hidden, chosen, strict=True) if expert in experts]
        inner = [between(theirs, expert, row).detach() for row in rows]
        for name, moments in (
            ("gate_up_proj", slow_moments(rows, prior=common)),
            ("down_proj", slow_moments(inner)),
        ):
            stack, weight = getattr(ours, name), getattr(theirs, name)[expert].detach()
            linear = stack.layers[expert]
            expected = expected_codes(linear, weight.T if stack.transposed else weight, moments)
            assert (linear.codes() == expected).float().mean() > 0.98


@each_mixture
def test_the_way_experts_are_computed_does_not_matter(
    make_policy: Callable[[], PreTrainedModel],
) -> None:
    policy = make_policy()
    found = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        policy.set_experts_implementation(implementation)
        found.append(calibrated(policy, batches_of(policy, count=16)))
        assert policy.config._experts_implementation == implementation
    assert min(share_of_equal_codes(found[0], other) for other in found[1:]) > 0.95


def test_an_expert_without_tokens_goes_by_those_of_the_others() -> None:
    policy = gpt_oss()
    router = policy.model.layers[0].mlp.router
    nn.init.constant_(router.bias.data[2:3], -1e6)
    batches = batches_of(policy, count=24)
    reference = build_reference(policy, keep_modules=["self_attn"])
    calibrate(reference, policy, batches)
    path = "model.layers.0.mlp.experts"
    hidden, chosen = routed_rows(policy, batches, path)
    assert not any(2 in experts for experts in chosen)
    common = sum(torch.outer(row, row) for row in hidden) / len(hidden)
    ours, theirs = reference.get_submodule(path), policy.get_submodule(path)
    first, second = ours.gate_up_proj.layers[2], ours.down_proj.layers[2]
    expected = expected_codes(first, theirs.gate_up_proj[2].detach().T, common)
    assert (first.codes() == expected).float().mean() > 0.98
    # Nothing is known of the inputs of its second matrix: each weight is rounded alone.
    expected = expected_codes(second, theirs.down_proj[2].detach().T, torch.eye(128))
    assert torch.equal(second.codes(), expected)


@each_mixture
def test_experts_get_low_rank_factors(make_policy: Callable[[], PreTrainedModel]) -> None:
    policy = make_policy()
    reference = calibrated(policy, batches_of(policy, count=16), rank=3)
    stacks = [module for module in reference.modules() if isinstance(module, QuantizedExperts)]
    assert stacks
    for linear in (linear for stack in stacks for linear in stack.layers):
        assert linear.factor_in.shape == (3, linear.in_features)


def test_experts_that_are_kept_stay_as_they_are() -> None:
    policy = qwen3_moe()
    reference = build_reference(policy, keep_modules=["down_proj"])
    plain = build_reference(policy, keep_modules=["down_proj"])
    calibrate(reference, policy, batches_of(policy, count=16))
    for index in range(2):
        ours = reference.model.layers[index].mlp.experts
        theirs = policy.model.layers[index].mlp.experts
        assert torch.equal(ours.down_proj, theirs.down_proj)
        before = plain.model.layers[index].mlp.experts.gate_up_proj.layers[0].codes()
        assert not torch.equal(ours.gate_up_proj.layers[0].codes(), before)


# Errors -------------------------------------------------------------------------------------------


def test_a_rank_larger_than_a_layer_is_refused(tiny_model: LlamaForCausalLM) -> None:
    reference = build_reference(tiny_model)
    before = codes(reference)
    with pytest.raises(ReferenceModelError) as error:
        calibrate(reference, tiny_model, batches_of(tiny_model), rank=17)
    assert str(error.value) == (
        "`reference_rank` is 17, but model.layers.0.self_attn.k_proj is a layer of 16 x 32: a rank "
        "above 16 adds nothing. Set `reference_rank` to at most 16, or name the layer in "
        "`reference_keep_modules`."
    )
    assert all(torch.equal(before[name], found) for name, found in codes(reference).items())
    check_ranks(reference, 16)


def test_a_rank_larger_than_an_expert_is_refused() -> None:
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=8, num_experts=4, head_dim=16)
    reference = build_reference(seeded(Qwen3MoeForCausalLM, config))
    with pytest.raises(ReferenceModelError, match=r"mlp\.experts\..*at most 8"):
        check_ranks(reference, 9)
