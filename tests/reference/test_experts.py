"""Experts quantized one by one: against each matrix alone, and in models of four families."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trl_grpo_ext.reference import (
    QuantizedExperts,
    QuantizedLinear,
    build_reference,
    summarize_reference,
)

IDS = torch.arange(5, 25).view(2, 10)
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=64, num_experts=8, head_dim=16)
    return Qwen3MoeForCausalLM(config).eval()


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).eval()


def gpt_oss() -> PreTrainedModel:
    layer_types = ["sliding_attention", "full_attention"]
    config = GptOssConfig(**SIZES, num_local_experts=4, head_dim=16, layer_types=layer_types)
    return GptOssForCausalLM(config).eval()


def deepseek_v3() -> PreTrainedModel:
    settings: dict[str, Any] = SIZES | {"num_key_value_heads": 4}
    settings |= dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 32)
    settings |= dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"], 16)
    settings |= {"moe_intermediate_size": 64, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**settings, first_k_dense_replace=1)).eval()


MODELS = [qwen3_moe, mixtral, gpt_oss, deepseek_v3]
each_model = pytest.mark.parametrize("make_policy", MODELS, ids=lambda make: make.__name__)


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def expert_names(policy: nn.Module) -> set[str]:
    return {name for name, parameter in policy.named_parameters() if parameter.dim() == 3}


def with_each_matrix_quantized_alone(policy: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """The policy as an ordinary model: each expert and linear layer as 4 bits would have it."""
    model = copy.deepcopy(policy)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                quantized = QuantizedLinear(module.weight, **settings)
                module.weight.copy_(quantized.dequantized_weight(torch.float32))
        for name in expert_names(policy):
            parameter = model.get_parameter(name)
            for expert in range(len(parameter)):
                matrix = parameter[expert]
                matrix = matrix.T if isinstance(model, GptOssForCausalLM) else matrix
                quantized = QuantizedLinear(matrix.clone(), **settings)
                matrix.copy_(quantized.dequantized_weight(torch.float32))
    return model


@each_model
def test_at_least_95_percent_of_a_mixture_are_in_4_bits(
    make_policy: Callable[[], PreTrainedModel],
) -> None:
    policy = make_policy()
    reference = build_reference(policy)
    summary = summarize_reference(reference)
    assert summary.num_parameters == sum(p.numel() for p in policy.parameters())
    embeddings = 2 * policy.get_input_embeddings().weight.numel()
    assert summary.num_quantized >= 0.95 * (summary.num_parameters - embeddings)
    names = {n for n, m in reference.named_modules() if isinstance(m, QuantizedExperts)}
    assert names == expert_names(policy)
    assert not expert_names(reference)


@each_model
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_mixture_computes_as_if_each_matrix_was_quantized_alone(
    make_policy: Callable[[], PreTrainedModel], quantization: Any
) -> None:
    policy = make_policy()
    for name, parameter in policy.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    reference = build_reference(policy, quantization=quantization)
    expected = logits_of(with_each_matrix_quantized_alone(policy, quantization=quantization))
    torch.testing.assert_close(logits_of(reference), expected, rtol=1e-3, atol=1e-3)


@each_model
def test_a_mixture_in_8_bits_is_near_the_policy(
    make_policy: Callable[[], PreTrainedModel],
) -> None:
    torch.manual_seed(0)
    policy = make_policy()
    exact = logits_of(policy)
    error = logits_of(build_reference(policy, quantization="int8")) - exact
    assert 0 < error.norm() < 0.05 * exact.norm()


@each_model
def test_the_policy_keeps_its_parameters_and_its_experts_implementation(
    make_policy: Callable[[], PreTrainedModel],
) -> None:
    policy = make_policy()
    names, before = expert_names(policy), policy.get_experts_implementation()
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    reference = build_reference(policy)
    assert set(reference.get_experts_implementation().values()) == {"eager"}
    assert policy.get_experts_implementation() == before
    assert "eager" not in before.values()
    assert expert_names(policy) == names
    assert all(torch.equal(weights[n], tensor) for n, tensor in policy.state_dict().items())


@each_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mixture_follows_the_dtype_of_the_model(
    make_policy: Callable[[], PreTrainedModel], dtype: torch.dtype
) -> None:
    for reference in (
        build_reference(make_policy().to(dtype)),
        build_reference(make_policy()).to(dtype),
    ):
        experts = [m for m in reference.modules() if isinstance(m, QuantizedExperts)]
        assert {weights[0].dtype for weights in experts} == {dtype}
        assert logits_of(reference).dtype == dtype


@each_model
def test_a_mixture_runs_under_autocast(make_policy: Callable[[], PreTrainedModel]) -> None:
    reference = build_reference(make_policy(), quantization="int8")
    experts = next(m for m in reference.modules() if isinstance(m, QuantizedExperts))
    with torch.autocast("cpu", torch.bfloat16):
        assert experts[0].dtype == torch.bfloat16
        assert logits_of(reference).isfinite().all()
    assert experts[0].dtype == torch.float32


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(3, 32, 64), (2, 5, 7), (2, 96, 40)])
def test_an_expert_is_its_matrix_quantized_alone(
    shape: tuple[int, int, int], transposed: bool
) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    experts = QuantizedExperts(weights, transposed=transposed)
    assert len(experts) == shape[0]
    for index, weight in enumerate(weights):
        alone = QuantizedLinear(weight.T if transposed else weight)
        expected = alone.dequantized_weight(torch.float32)
        expected = expected.T if transposed else expected
        assert torch.equal(experts[index], expected)
        assert torch.equal(experts[torch.tensor(index)], expected)


def test_low_rank_factors_of_an_expert_are_part_of_its_weight() -> None:
    experts = QuantizedExperts(torch.randn(2, 8, 64))
    before = [experts[0], experts[1]]
    layer = experts.layers[1]
    assert isinstance(layer, QuantizedLinear)
    layer.set_low_rank(torch.ones(1, 64), torch.ones(8, 1))
    assert torch.equal(experts[0], before[0])
    torch.testing.assert_close(experts[1], before[1] + 1.0)


def test_not_more_than_one_expert_is_copied_while_the_reference_is_built() -> None:
    class Sizes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.largest = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **kwargs or {})
            if isinstance(result, Tensor) and result.is_floating_point() and not func.is_view:
                self.largest = max(self.largest, result.numel())
            return result

    policy = gpt_oss()
    experts = [policy.get_parameter(name) for name in expert_names(policy)]
    one_expert = max(parameter[0].numel() for parameter in experts)
    with Sizes() as sizes:
        build_reference(policy)
    assert sizes.largest == one_expert
    with Sizes() as sizes:
        build_reference(policy, kind="resident")
    assert sizes.largest == 4 * one_expert  # so that the check above can fail


@pytest.mark.parametrize("kept", ["down_proj", "experts"])
def test_experts_can_be_kept(kept: str) -> None:
    policy = qwen3_moe()
    reference = build_reference(policy, keep_modules=[kept])
    names = {name for name in expert_names(policy) if kept in name.split(".")}
    assert expert_names(reference) == names
    for name in names:
        assert torch.equal(reference.get_parameter(name), policy.get_parameter(name))
    expected = "eager" if kept == "down_proj" else policy.get_experts_implementation()[""]
    assert reference.get_experts_implementation()[""] == expected
    assert logits_of(reference).isfinite().all()


def test_a_three_dimensional_parameter_of_another_module_stays() -> None:
    policy = qwen3_moe()
    policy.model.norm.register_parameter("table", nn.Parameter(torch.randn(2, 4, 64)))
    reference = build_reference(policy)
    assert torch.equal(reference.model.norm.table, policy.model.norm.table)


def test_a_mixture_s_state_dict_loads_into_a_fresh_reference() -> None:
    source, target = build_reference(mixtral()), build_reference(mixtral())
    layer = source.model.layers[0].mlp.experts.gate_up_proj.layers[1]
    layer.set_low_rank(torch.randn(2, 64), torch.randn(256, 2))
    assert not torch.equal(logits_of(target), logits_of(source))
    target.load_state_dict(source.state_dict())
    assert torch.equal(logits_of(target), logits_of(source))
