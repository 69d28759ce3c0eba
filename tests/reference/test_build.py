"""The frozen reference: what it holds, what it shares with the policy, what is refused."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference import (
    QuantizedLinear,
    ReferenceSummary,
    build_reference,
    summarize_reference,
)

IDS = torch.arange(5, 25).view(2, 10)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def logits_of(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits


def small_llama(**changes: Any) -> LlamaForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def small_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=32,
        n_positions=16,
        n_embd=32,
        n_layer=1,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def quantized_by_name(reference: nn.Module) -> dict[str, QuantizedLinear]:
    return {
        name: module
        for name, module in reference.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def with_dequantized_weights(policy: PreTrainedModel, reference: nn.Module) -> PreTrainedModel:
    """The policy as an ordinary model whose linear layers hold what 4 bits made of them."""
    model = copy.deepcopy(policy)
    for name, quantized in quantized_by_name(reference).items():
        module = model.get_submodule(name)
        weight = quantized.dequantized_weight(policy.dtype)
        module.weight.data = weight.T.clone() if isinstance(module, Conv1D) else weight
    return model


# What is quantized ------------------------------------------------------------------------------


def test_quantized_reference_has_every_linear_layer_but_the_lm_head_in_4_bits(
    tiny_model: LlamaForCausalLM,
) -> None:
    reference = build_reference(tiny_model)
    assert type(reference) is LlamaForCausalLM
    quantized = {name.rpartition(".")[2] for name in quantized_by_name(reference)}
    assert quantized == set(LINEARS)
    assert len(quantized_by_name(reference)) == 7 * 2
    assert [n for n, m in reference.named_modules() if isinstance(m, nn.Linear)] == ["lm_head"]
    assert type(reference.get_input_embeddings()) is nn.Embedding
    assert torch.equal(
        reference.get_input_embeddings().weight, tiny_model.get_input_embeddings().weight
    )


def test_quantized_reference_keeps_an_lm_head_that_is_not_tied() -> None:
    policy = small_llama(tie_word_embeddings=False)
    reference = build_reference(policy)
    assert type(reference.lm_head) is nn.Linear
    assert torch.equal(reference.lm_head.weight, policy.lm_head.weight)
    assert reference.lm_head.weight is not policy.lm_head.weight


def test_quantized_reference_keeps_the_modules_it_is_told_to(tiny_model: LlamaForCausalLM) -> None:
    reference = build_reference(tiny_model, keep_modules=["down_proj", "q_proj"])
    names = {name.rpartition(".")[2] for name in quantized_by_name(reference)}
    assert names == set(LINEARS) - {"down_proj", "q_proj"}
    kept = reference.model.layers[1].mlp.down_proj
    assert type(kept) is nn.Linear
    assert torch.equal(kept.weight, tiny_model.model.layers[1].mlp.down_proj.weight)
    assert kept.weight is not tiny_model.model.layers[1].mlp.down_proj.weight


def test_quantized_reference_is_quantized_as_asked(tiny_model: LlamaForCausalLM) -> None:
    reference = build_reference(
        tiny_model, quantization="fp4", block_size=128, double_quantization=False
    )
    for name, layer in quantized_by_name(reference).items():
        assert (layer.quantization, layer.block_size) == ("fp4", 128)
        assert layer.nested_absmax is None
        expected = QuantizedLinear(
            tiny_model.get_submodule(name).weight,
            quantization="fp4",
            block_size=128,
            double_quantization=False,
        )
        assert torch.equal(
            layer.dequantized_weight(torch.float32), expected.dequantized_weight(torch.float32)
        )


@pytest.mark.parametrize(
    "make_policy",
    [small_gpt2, lambda: small_llama(attention_bias=True, mlp_bias=True, initializer_range=0.3)],
    ids=["gpt2", "llama with biases"],
)
def test_quantized_reference_computes_with_the_dequantized_weights(
    make_policy: Callable[[], PreTrainedModel],
) -> None:
    policy = make_policy()
    for name, parameter in policy.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter)
    reference = build_reference(policy)
    assert quantized_by_name(reference)
    expected = logits_of(with_dequantized_weights(policy, reference))
    torch.testing.assert_close(logits_of(reference), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(reference), logits_of(policy), rtol=1e-4, atol=1e-4)


def test_conv1d_weights_are_read_transposed() -> None:
    policy = small_gpt2()
    layer = build_reference(policy).transformer.h[0].attn.c_attn
    assert isinstance(layer, QuantizedLinear)
    assert (layer.in_features, layer.out_features) == (32, 96)
    error = layer.dequantized_weight(torch.float32) - policy.transformer.h[0].attn.c_attn.weight.T
    assert error.abs().max() < 0.2 * policy.transformer.h[0].attn.c_attn.weight.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantized_reference_is_near_the_policy_but_not_equal(
    tiny_model: LlamaForCausalLM, dtype: torch.dtype
) -> None:
    policy = tiny_model.to(dtype)
    reference = build_reference(policy)
    assert reference.dtype == dtype
    logprobs, ref_logprobs = (
        logits_of(model).double().log_softmax(dim=-1) for model in (policy, reference)
    )
    kl = (logprobs.exp() * (logprobs - ref_logprobs)).sum(dim=-1).mean()
    untrained = small_llama(vocab_size=policy.config.vocab_size, initializer_range=0.2)
    elsewhere = logits_of(untrained).double().log_softmax(dim=-1)
    far = (logprobs.exp() * (logprobs - elsewhere)).sum(dim=-1).mean()
    assert 1e-4 < kl < 0.1 * far


def test_resident_reference_has_exactly_the_logits_of_the_policy(
    tiny_model: LlamaForCausalLM,
) -> None:
    reference = build_reference(tiny_model, kind="resident")
    assert quantized_by_name(reference) == {}
    assert torch.equal(logits_of(reference), logits_of(tiny_model))


def test_int8_reference_is_nearer_to_the_policy_than_4_bits(tiny_model: LlamaForCausalLM) -> None:
    exact = logits_of(tiny_model)
    errors = {
        quantization: (logits_of(build_reference(tiny_model, quantization=quantization)) - exact)
        for quantization in ("nf4", "int8")
    }
    assert 0 < 5 * errors["int8"].norm() < errors["nf4"].norm()


def test_a_name_of_a_module_keeps_everything_in_it(tiny_model: LlamaForCausalLM) -> None:
    reference = build_reference(tiny_model, keep_modules=["self_attn"])
    names = {name.rpartition(".")[2] for name in quantized_by_name(reference)}
    assert names == {"gate_proj", "up_proj", "down_proj"}


# What it costs ----------------------------------------------------------------------------------


def test_no_linear_weight_is_in_the_reference_in_full_precision(
    tiny_model: LlamaForCausalLM,
) -> None:
    reference = build_reference(tiny_model)
    shapes = {(q.out_features, q.in_features) for q in quantized_by_name(reference).values()}
    shapes |= {shape[::-1] for shape in shapes}
    held = [*reference.parameters(), *reference.buffers()]
    assert [t.shape for t in held if t.is_floating_point() and tuple(t.shape) in shapes] == []


def test_no_linear_weight_is_copied_while_the_reference_is_built(
    tiny_model: LlamaForCausalLM,
) -> None:
    class Copies(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.shapes: set[tuple[int, ...]] = set()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.clone.default and args[0].is_floating_point():
                self.shapes.add(tuple(args[0].shape))
            return func(*args, **kwargs or {})

    linears = {
        tuple(module.weight.shape)
        for module in tiny_model.model.modules()
        if isinstance(module, nn.Linear)
    }
    with Copies() as quantized:
        build_reference(tiny_model)
    with Copies() as resident:
        build_reference(tiny_model, kind="resident")
    assert linears & quantized.shapes == set()
    assert linears <= resident.shapes  # so that the check above can fail


@pytest.mark.parametrize("double_quantization", [True, False])
def test_summary_by_hand(double_quantization: bool) -> None:
    reference = build_reference(
        small_llama(attention_bias=True), double_quantization=double_quantization
    )
    summary = summarize_reference(reference)
    # q, k, v, o and gate, up, down are 64 x 64; q, k, v, o have biases.
    assert summary.num_quantized == 7 * 4096
    # embeddings and LM head 32 x 64 each, three norms
    num_float = 2 * 32 * 64 + 3 * 64
    assert summary.num_parameters == 7 * 4096 + 4 * 64 + num_float
    rotary = sum(buffer.nbytes for buffer in reference.model.rotary_emb.buffers())
    scales = 64 * 1 + 4 + 4 if double_quantization else 64 * 4
    tables = (16 + 256 * double_quantization) * 4
    num_bytes = 7 * (2048 + scales + tables) + (num_float + 4 * 64) * 4 + rotary
    assert summary.num_bytes == num_bytes
    assert summary.quantized_bytes == 7 * (2048 + scales + tables)
    assert summary.bits_per_weight == 8 * (2048 + scales + tables) / 4096
    assert summary.quantized_to_bfloat16 == (2048 + scales + tables) / 8192
    assert summary.model_to_bfloat16 == num_bytes / (2 * summary.num_parameters)


def test_summary_counts_tied_embeddings_once_and_a_resident_reference_as_it_is() -> None:
    policy = small_llama(tie_word_embeddings=True)
    summary = summarize_reference(build_reference(policy, kind="resident"))
    assert summary.num_parameters == 7 * 4096 + 32 * 64 + 3 * 64
    assert summary.num_quantized == 0
    assert (summary.quantized_bytes, summary.bits_per_weight) == (0, 0.0)
    assert str(summary) == "0.0M parameters, none quantized, 0 MB (200% of bfloat16)"


def test_summary_counts_low_rank_factors() -> None:
    reference = build_reference(small_llama())
    before = summarize_reference(reference)
    layer = reference.model.layers[0].mlp.up_proj
    layer.set_low_rank(torch.ones(4, 64), torch.ones(64, 4))
    after = summarize_reference(reference)
    assert after.num_parameters == before.num_parameters
    assert after.quantized_bytes == before.quantized_bytes + 2 * 2 * 4 * 64
    assert after.num_bytes == before.num_bytes + 2 * 2 * 4 * 64


def test_summary_reads_as_a_line() -> None:
    summary = ReferenceSummary(494_032_768, 357_826_560, 475_500_000, 184_644_864)
    assert str(summary) == (
        "494.0M parameters, 72% in 4.13 bits (26% of bfloat16), 476 MB (48% of bfloat16)"
    )


# Frozen, and apart from the policy --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["quantized", "resident"])
@pytest.mark.parametrize("training", [True, False])
def test_reference_is_frozen_and_the_policy_is_not_touched(
    tiny_model: LlamaForCausalLM, kind: Any, training: bool
) -> None:
    policy = tiny_model.train(training)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    modules = {name: id(module) for name, module in policy.named_modules()}
    reference = build_reference(policy, kind=kind)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert not any(module.training for module in reference.modules())
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert all(module.training == training for module in policy.modules())
    assert {name: id(module) for name, module in policy.named_modules()} == modules
    assert policy.state_dict().keys() == before.keys()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("kind", ["quantized", "resident"])
def test_training_the_policy_does_not_move_the_reference(
    tiny_model: LlamaForCausalLM, kind: Any
) -> None:
    policy = tiny_model.train()
    reference = build_reference(policy, kind=kind)
    before, policy_before = logits_of(reference), logits_of(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    policy(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(logits_of(policy), policy_before)
    assert torch.equal(logits_of(reference), before)
    own = {t.data_ptr() for t in [*reference.parameters(), *reference.buffers()]}
    assert not own & {t.data_ptr() for t in [*policy.parameters(), *policy.buffers()]}


def test_biases_are_the_reference_s_own() -> None:
    policy = small_llama(attention_bias=True)
    reference = build_reference(policy)
    before = logits_of(reference)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    assert torch.equal(logits_of(reference), before)


@pytest.mark.parametrize("kind", ["quantized", "resident"])
def test_tied_embeddings_stay_tied(tiny_model: LlamaForCausalLM, kind: Any) -> None:
    reference = build_reference(tiny_model, kind=kind)
    assert reference.lm_head.weight is reference.model.embed_tokens.weight
    assert reference.lm_head.weight is not tiny_model.lm_head.weight


def test_a_forward_that_was_set_on_the_policy_is_not_inherited(
    tiny_model: LlamaForCausalLM,
) -> None:
    expected = logits_of(tiny_model)

    def patched(*_: Any, **__: Any) -> Any:
        raise AssertionError("the policy's own forward")

    tiny_model.forward = patched  # type: ignore[method-assign]
    assert torch.equal(logits_of(build_reference(tiny_model, kind="resident")), expected)
    with pytest.raises(AssertionError, match="the policy's own forward"):
        tiny_model(input_ids=IDS)


def test_gradient_checkpointing_is_off_in_the_reference_alone(tiny_model: LlamaForCausalLM) -> None:
    tiny_model.gradient_checkpointing_enable()
    assert tiny_model.is_gradient_checkpointing
    reference = build_reference(tiny_model)
    assert not reference.is_gradient_checkpointing
    assert tiny_model.is_gradient_checkpointing


# What is refused --------------------------------------------------------------------------------


def test_a_peft_model_is_refused(tiny_model: LlamaForCausalLM) -> None:
    policy = get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ReferenceModelError) as caught:
        build_reference(policy)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "The policy is a PEFT model: with its adapter switched off it is its own exact reference, "
        "at no memory. Remove `reference`, or set `reference: auto`."
    )


def test_a_quantized_policy_is_refused(tiny_model: LlamaForCausalLM) -> None:
    tiny_model.is_quantized = True
    with pytest.raises(ReferenceModelError) as caught:
        build_reference(tiny_model)
    assert str(caught.value) == (
        "The policy is already quantized, so a reference cannot be built from its weights. "
        "Set `reference: auto`."
    )


def test_a_policy_that_zero3_has_partitioned_is_refused(tiny_model: LlamaForCausalLM) -> None:
    tiny_model.model.norm.weight.ds_id = 0  # type: ignore[attr-defined]  # as DeepSpeed marks it
    with pytest.raises(ReferenceModelError) as caught:
        build_reference(tiny_model, kind="resident")
    assert str(caught.value) == (
        "The policy is partitioned by DeepSpeed ZeRO-3: no process holds its weights. Let the "
        "trainer build the reference, or build it from "
        "`trl_grpo_ext.reference.whole.whole_policy(policy, blueprint(policy))`."
    )


def test_a_policy_without_weights_on_this_process_is_refused() -> None:
    with torch.device("meta"):
        policy = small_llama()
    with pytest.raises(ReferenceModelError) as caught:
        build_reference(policy)
    assert str(caught.value) == (
        "This process holds no weights of the policy (meta device). "
        "Set `fsdp_cpu_ram_efficient_loading: false` in the accelerate configuration, "
        "or `reference: auto`."
    )


def test_a_device_without_kernels_is_refused(
    tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsandbytes.supported_torch_devices", {"xpu", "cuda"})
    with pytest.raises(ReferenceModelError) as caught:
        build_reference(tiny_model)
    assert str(caught.value) == (
        "The policy is on cpu, where bitsandbytes has no kernels (it has them for cuda, xpu), so "
        "its weights cannot be quantized there. "
        "Use `reference: resident` or `reference: streamed`."
    )
    assert build_reference(tiny_model, kind="resident") is not tiny_model


def test_without_bitsandbytes_only_the_quantized_kind_is_refused(
    tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    build_reference(tiny_model, kind="resident")
    with pytest.raises(ReferenceModelError, match="Run `pip install bitsandbytes`, or set"):
        build_reference(tiny_model)


def test_a_policy_with_nothing_to_quantize_is_refused(tiny_model: LlamaForCausalLM) -> None:
    with pytest.raises(ReferenceModelError) as caught:
        build_reference(tiny_model, keep_modules=LINEARS)
    assert str(caught.value) == (
        "LlamaForCausalLM has no linear layer to quantize besides its embeddings and "
        f"`reference_keep_modules`={LINEARS}. Use `reference: resident`, or keep fewer modules."
    )
