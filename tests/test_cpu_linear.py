"""Linear layers in oneDNN against ``torch.nn.functional.linear``."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from trl_grpo_ext import cpu_linear
from trl_grpo_ext.cpu_linear import OneDNNLinear, cpu_is_intels, use_onednn

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def other_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests run oneDNN on Intel's CPUs too, where a user's run does not."""
    monkeypatch.setattr(cpu_linear, "cpu_is_intels", lambda: False)


def build_layer(*, bias: bool = True, num_outputs: int = 64) -> OneDNNLinear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(48, num_outputs, bias=bias)
    assert use_onednn(layer) == 1
    assert isinstance(layer, OneDNNLinear)
    return layer


def build_llama() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=80,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,  # keys and values have 32 outputs, too few
            tie_word_embeddings=True,
            initializer_range=0.1,
        )
        return LlamaForCausalLM(config).float().eval()


def inputs(*shape: int, requires_grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_(
        requires_grad
    )


# The product --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (5, 48), (2, 3, 48), (2, 1, 3, 48)])
def test_onednn_linear_equals_linear_forward_and_backward(
    shape: tuple[int, ...], bias: bool
) -> None:
    layer = build_layer(bias=bias)
    parameters = [layer.weight, *([layer.bias] if bias else [])]
    x = inputs(*shape, requires_grad=True)
    output = layer(x)
    expected = linear(x, layer.weight, layer.bias)
    assert output.shape == (*shape[:-1], 64)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    found: Any = torch.autograd.grad((output * weights).sum(), [x, *parameters])
    slow: Any = torch.autograd.grad((expected * weights).sum(), [x, *parameters])
    for gradient, reference in zip(found, slow, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 48), (2, 0, 48)])
def test_onednn_linear_takes_no_rows(shape: tuple[int, ...]) -> None:
    layer = build_layer()
    x = inputs(*shape, requires_grad=True)
    output = layer(x)
    assert output.shape == (*shape[:-1], 64)
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()
    assert layer.bias.grad is not None
    assert not layer.bias.grad.any()


def test_onednn_linear_reads_inputs_and_gradients_that_are_not_contiguous() -> None:
    layer = build_layer()
    x = inputs(48, 5).t().requires_grad_()
    output = layer(x)
    expected = linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    weights_ON = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))
    # A constant gradient arrives expanded from one number, a transposed one with other strides.
    for loss in (lambda y: (y.t() * weights_ON).sum(), lambda y: y.sum()):
        (found,) = torch.autograd.grad(loss(layer(x)), x)
        (slow,) = torch.autograd.grad(loss(linear(x, layer.weight, layer.bias)), x)
        torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-5)


def test_onednn_linear_leaves_a_frozen_weight_without_gradient() -> None:
    layer = build_layer()
    layer.weight.requires_grad_(False)
    x = inputs(5, 48, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [5.0] * 64
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(5, 48))


def test_onednn_linear_trains_when_its_input_needs_no_gradient() -> None:
    layer, x = build_layer(), inputs(5, 48)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.sum(dim=0).expand(64, 48))


def test_onednn_linear_needs_no_graph_when_nothing_requires_a_gradient() -> None:
    layer = build_layer().requires_grad_(False)
    assert not layer(inputs(5, 48)).requires_grad
    with torch.no_grad():
        assert not build_layer()(inputs(5, 48)).requires_grad
    with torch.inference_mode():
        assert build_layer()(inputs(5, 48)).shape == (5, 64)


def test_onednn_linear_adds_up_gradients_of_several_uses() -> None:
    layer, x = build_layer(bias=False), inputs(5, 48)
    (layer(x).sum() + 2 * layer(x).sum()).backward()
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, 4 * x.sum(dim=0).expand(64, 48))


def test_onednn_linear_follows_a_weight_that_changes_in_place() -> None:
    layer, x = build_layer(), inputs(5, 48)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before, rtol=1e-5, atol=1e-5)


# Where it falls back ------------------------------------------------------------------------------


def test_onednn_linear_is_torch_linear_under_autocast() -> None:
    layer, x = build_layer(), inputs(5, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = layer(x), linear(x, layer.weight, layer.bias)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    with torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_onednn_linear_is_torch_linear_once_its_dtype_changed(dtype: torch.dtype) -> None:
    layer = build_layer().to(dtype)
    x = inputs(5, 48).to(dtype)
    assert torch.equal(layer(x), linear(x, layer.weight, layer.bias))


def test_onednn_linear_refuses_two_dtypes_as_torch_does() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        build_layer()(inputs(5, 48).double())
    with pytest.raises(RuntimeError, match="dtype"):
        build_layer().bfloat16()(inputs(5, 48))


def test_onednn_linear_runs_on_a_device_that_has_no_onednn() -> None:
    layer = build_layer().to("meta")
    assert layer(torch.empty(5, 48, device="meta")).shape == (5, 64)


def test_onednn_linear_is_torch_linear_on_a_cpu_of_intels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "_multiply", None)  # it would fail, were it called
    with pytest.raises(TypeError):
        build_layer()(inputs(5, 48))
    monkeypatch.setattr(cpu_linear, "cpu_is_intels", lambda: True)
    layer, x = build_layer(), inputs(5, 48)
    assert torch.equal(layer(x), linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("vendor", "expected"), [("GenuineIntel", True), ("AuthenticAMD", False), ("", False)]
)
def test_the_makers_name_is_read_off_the_machine(
    vendor: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: a CPU\n")
    for there in (listing, tmp_path / "missing"):
        monkeypatch.setattr(cpu_linear, "Path", lambda _, there=there: there)
        monkeypatch.setattr(cpu_linear.platform, "processor", lambda: f"Family 6, {vendor}")
        assert cpu_is_intels.__wrapped__() is expected


# Which layers -------------------------------------------------------------------------------------


def test_use_onednn_counts_the_layers_and_changes_nothing_twice() -> None:
    model = build_llama()
    # q, o, gate, up, down of 2 layers, and the head; keys and values have fewer than 64 outputs
    assert use_onednn(model) == 11
    assert use_onednn(model) == 0
    assert type(model.model.layers[0].self_attn.k_proj) is nn.Linear
    assert type(model.lm_head) is OneDNNLinear


def test_use_onednn_leaves_half_precision_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 64).bfloat16(), nn.Linear(64, 64), nn.Linear(64, 63))
    assert use_onednn(model) == 1
    assert [type(layer) for layer in model] == [nn.Linear, OneDNNLinear, nn.Linear]


def test_use_onednn_leaves_a_replaced_forward_alone() -> None:
    layer = nn.Linear(8, 64)
    layer.forward = lambda x: x  # type: ignore[method-assign,assignment]
    assert use_onednn(layer) == 0
    assert type(layer) is nn.Linear


def test_use_onednn_leaves_quantized_and_derived_layers_alone() -> None:
    class Scaled(nn.Linear):
        pass

    kinds = [bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, Scaled]
    model = nn.Sequential(*(kind(64, 64) for kind in kinds))
    assert use_onednn(model) == 0
    assert [type(layer) for layer in model] == kinds


def test_use_onednn_keeps_parameters_and_hooks() -> None:
    layer = nn.Linear(48, 64)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda *call: seen.append(call[2]))
    weight, bias = layer.weight, layer.bias
    use_onednn(layer)
    output = layer(inputs(5, 48))
    assert layer.weight is weight
    assert layer.bias is bias
    assert [key for key, _ in layer.named_parameters()] == ["weight", "bias"]
    assert seen[0] is output


# A model ------------------------------------------------------------------------------------------


def logits_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(input_ids=torch.arange(12).view(2, 6)).logits
    logits.log_softmax(-1)[..., 0].sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def assert_same(
    found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]
) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_use_onednn_changes_a_model_by_rounding_only() -> None:
    model = build_llama()
    expected = logits_and_gradients(model)
    assert use_onednn(model) == 11
    assert_same(logits_and_gradients(model), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_use_onednn_works_with_gradient_checkpointing(use_reentrant: bool) -> None:
    model = build_llama()
    expected = logits_and_gradients(model)
    use_onednn(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    model.config.use_cache = False
    assert_same(logits_and_gradients(model), expected)


@pytest.mark.parametrize("before", [False, True])
def test_use_onednn_works_with_lora(before: bool) -> None:
    def adapted(*, onednn: bool) -> nn.Module:
        model = build_llama()
        if onednn and before:
            assert use_onednn(model) == 11
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
            model = get_peft_model(model, lora)
        if onednn and not before:
            # The bases of q, o, gate, up and down and the head, and those B with 64 outputs or more
            assert use_onednn(model) == 11 + 10
        return model

    expected = logits_and_gradients(adapted(onednn=False))
    assert len(expected[1]) == 2 * 7 * 2  # layers, linear layers in each, A and B
    assert_same(logits_and_gradients(adapted(onednn=True)), expected)


def test_use_onednn_lets_lora_be_merged() -> None:
    model = build_llama()
    use_onednn(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, lora)
    expected = adapted(input_ids=torch.arange(6)[None]).logits
    merged = adapted.merge_and_unload()
    found = merged(input_ids=torch.arange(6)[None]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Copies and files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_onednn_linear_survives_copying(copied: Any) -> None:
    layer, x = build_layer(), inputs(5, 48)
    twin = copied(layer)
    assert type(twin) is OneDNNLinear
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.weight.zero_()
    assert layer.weight.any()


def test_onednn_linear_exchanges_its_state_with_linear() -> None:
    layer, plain, x = build_layer(), nn.Linear(48, 64), inputs(5, 48)
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        plain.weight.mul_(3)
    layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)


def test_use_onednn_leaves_no_trace_in_a_saved_model(tmp_path: Path) -> None:
    model = build_llama()
    model.save_pretrained(tmp_path / "plain")
    use_onednn(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # still tied
    model.save_pretrained(tmp_path / "onednn")
    for file in ("config.json", "model.safetensors"):
        saved = (tmp_path / "onednn" / file).read_bytes()
        assert saved == (tmp_path / "plain" / file).read_bytes()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "onednn")
    assert type(loaded.lm_head) is nn.Linear
    ids = torch.arange(6)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
