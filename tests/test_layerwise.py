"""Passes in step: their results, the order of the layers, and what an error leaves behind."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_grpo_ext.errors import LayerOrderError
from trl_grpo_ext.layerwise import decoder_layers, run_layerwise

IDS = torch.arange(5, 25).view(2, 10)


class AddMultiply(nn.Module):
    """Layer ``i`` adds ``i + 1``, between the layers a pass doubles: plain numbers to follow."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adds(i + 1) for i in range(num_layers))

    def forward(self, value: float) -> float:
        for layer in self.layers:
            value = 2 * layer(value)
        return value


class Adds(nn.Module):
    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount

    def forward(self, value: float) -> float:
        return value + self.amount


def calling(layers: nn.ModuleList, *order: int) -> Callable[[], None]:
    def run() -> None:
        for index in order:
            layers[index](0.0)

    return run


def assert_untouched(layers: nn.ModuleList) -> None:
    assert all("forward" not in vars(layer) for layer in layers)


# Results and order ------------------------------------------------------------------------------


def test_passes_give_their_own_results_in_order() -> None:
    model = AddMultiply(3)
    # (((x + 1) * 2 + 2) * 2 + 3) * 2 = 8 x + 22
    passes = [lambda: model(0.0), lambda: model(1.0), lambda: model(-2.0)]
    assert run_layerwise(list(model.layers), passes) == [22.0, 30.0, 6.0]
    assert_untouched(model.layers)


def test_no_pass_runs_no_layer() -> None:
    def run_layer(*_: Any) -> Any:
        raise AssertionError

    assert run_layerwise(list(AddMultiply(2).layers), [], run_layer) == []


def test_a_layer_sees_all_passes_before_the_next_layer_sees_one() -> None:
    model, seen = AddMultiply(3), []

    def run_layer(index: int, layer: nn.Module, calls: Any) -> list[Any]:
        assert layer is model.layers[index]
        seen.append((index, [call.args[0] for call in calls]))
        return [call.run(layer) for call in calls]

    run_layerwise(list(model.layers), [lambda: model(0.0), lambda: model(1.0)], run_layer)
    assert seen == [(0, [0.0, 1.0]), (1, [2.0, 4.0]), (2, [8.0, 12.0])]


def test_the_outputs_of_run_layer_are_what_the_passes_go_on_with() -> None:
    model = AddMultiply(2)
    found = run_layerwise(
        list(model.layers),
        [lambda: model(0.0), lambda: model(0.0)],
        lambda index, layer, calls: [10.0 * index, 100.0 * index],
    )
    assert found == [20.0, 200.0]


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=5), st.integers(1, 4))
def test_passes_in_step_equal_passes_one_by_one(values: list[float], num_layers: int) -> None:
    model = AddMultiply(num_layers)
    found = run_layerwise(list(model.layers), [lambda v=v: model(v) for v in values])
    assert found == [model(value) for value in values]


@pytest.mark.parametrize("num_passes", [1, 3])
def test_passes_of_a_model_equal_its_forward_bit_for_bit(
    tiny_model: LlamaForCausalLM, num_passes: int
) -> None:
    batches = [IDS + i for i in range(num_passes)]
    with torch.no_grad():
        expected = [tiny_model(input_ids=ids).logits for ids in batches]
        passes = [lambda ids=ids: tiny_model(input_ids=ids).logits for ids in batches]
        found = run_layerwise(list(decoder_layers(tiny_model)), passes)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_forward_that_was_replaced_is_used_and_comes_back() -> None:
    model = AddMultiply(1)
    replaced = model.layers[0].forward = lambda value: 7 * value
    assert run_layerwise(list(model.layers), [lambda: model(1.0)]) == [14.0]
    assert model.layers[0].forward is replaced


def test_hooks_of_a_layer_run_once_a_pass() -> None:
    model, seen = AddMultiply(1), []
    model.layers[0].register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    run_layerwise(list(model.layers), [lambda: model(0.0), lambda: model(1.0)])
    assert seen == [(0.0, 1.0), (1.0, 2.0)]


def test_decoder_layers_are_those_of_the_model_and_not_its_experts() -> None:
    config = Qwen3MoeConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
    )
    model = Qwen3MoeForCausalLM(config)
    assert decoder_layers(model) is model.model.layers


def test_decoder_layers_of_a_model_without_such_a_list_are_refused(
    tiny_model: LlamaForCausalLM,
) -> None:
    tiny_model.config.num_hidden_layers = 3
    with pytest.raises(LayerOrderError) as error:
        decoder_layers(tiny_model)
    assert str(error.value) == (
        "LlamaForCausalLM has no list of `num_hidden_layers`=3 layers, so it cannot run layer by "
        "layer. Use `reference: resident`, or `quantized` without calibration."
    )


# Modes ------------------------------------------------------------------------------------------


def test_each_pass_keeps_its_own_autocast(tiny_model: LlamaForCausalLM) -> None:
    """The first pass leaves its autocast while the second still has the head to compute."""

    def run(ids: Tensor, dtype: torch.dtype | None) -> Tensor:
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            logits: Tensor = tiny_model(input_ids=ids).logits
        return logits

    tiny_model.requires_grad_(False)  # else autocast keeps its casts of weights for all passes
    dtypes = [torch.bfloat16, None, torch.float16, torch.bfloat16]
    cases = [(IDS + i, dtype) for i, dtype in enumerate(dtypes)]
    with torch.no_grad():
        expected = [run(*case) for case in cases]
        passes = [lambda case=case: run(*case) for case in cases]
        found = run_layerwise(list(decoder_layers(tiny_model)), passes)
    assert [logits.dtype for logits in found] == [dtype or torch.float32 for dtype in dtypes]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_around_all_passes_equals_autocast_in_each(tiny_model: LlamaForCausalLM) -> None:
    passes = [lambda i=i: tiny_model(input_ids=IDS + i).logits for i in range(3)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = [run() for run in passes]
        found = run_layerwise(list(decoder_layers(tiny_model)), passes)
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_each_pass_keeps_its_own_grad_mode() -> None:
    weight = torch.ones(2, requires_grad=True)
    layers = [nn.Identity(), nn.Identity()]

    def without() -> Tensor:
        with torch.no_grad():
            return layers[1](layers[0](weight * 2) * 2) * 2

    def with_grad() -> Tensor:
        return layers[1](layers[0](weight * 2) * 2) * 2

    seen = []

    def run_layer(index: int, layer: nn.Module, calls: Any) -> list[Any]:
        seen.append(torch.is_grad_enabled())
        return [call.run(layer) for call in calls]

    found = run_layerwise(layers, [without, without, with_grad, without], run_layer)
    assert [tensor.requires_grad for tensor in found] == [False, False, True, False]
    assert seen == [True, True]
    assert torch.is_grad_enabled()


def test_no_grad_around_all_passes_holds_in_them() -> None:
    weight, layers = torch.ones(2, requires_grad=True), [nn.Linear(2, 2)]
    with torch.no_grad():
        found = run_layerwise(layers, [lambda: layers[0](weight)] * 2)
        assert not torch.is_grad_enabled()
    assert not any(tensor.requires_grad for tensor in found)


def test_passes_see_the_context_variables_of_the_caller() -> None:
    variable: ContextVar[int] = ContextVar("variable", default=0)
    model = AddMultiply(1)

    def run() -> float:
        variable.set(variable.get() + 1)  # its own copy
        return model(0.0) + variable.get()

    token = variable.set(40)
    try:
        assert run_layerwise(list(model.layers), [run, run]) == [43.0, 43.0]
        assert variable.get() == 40
    finally:
        variable.reset(token)


# Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "found", "expected"),
    [
        ((0, 0, 1), "layer 0", "layer 1"),
        ((1, 0), "layer 1", "layer 0"),
        ((0,), "its end", "layer 1"),
        ((), "its end", "layer 0"),
        ((0, 1, 1), "another layer", "its end"),
    ],
)
def test_a_model_that_repeats_or_skips_layers_is_refused(
    order: tuple[int, ...], found: str, expected: str
) -> None:
    layers = AddMultiply(2).layers
    with pytest.raises(LayerOrderError) as error:
        run_layerwise(list(layers), [calling(layers, 0, 1), calling(layers, *order)])
    assert str(error.value) == (
        f"A forward pass reached {found} where {expected} was expected: the model does not run its "
        "layers once each, in order, so its passes cannot run in step. "
        "Use `reference: resident`, or `quantized` without calibration."
    )
    assert_untouched(layers)


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_pass_that_raises_ends_the_others_and_leaves_the_layers_as_they_were(
    fails_at: int,
) -> None:
    model, ended = AddMultiply(2), []

    def waits(name: str) -> None:
        try:
            with torch.no_grad():
                model(0.0)
        finally:
            ended.append(name)

    def fails() -> None:
        for index in range(fails_at):
            model.layers[index](0.0)
        raise ValueError("of the model")

    with pytest.raises(ValueError, match="of the model"):
        run_layerwise(list(model.layers), [lambda: waits("a"), fails, lambda: waits("b")])
    # At layer 0, "b" has not begun.
    assert sorted(ended) == (["a"] if fails_at == 0 else ["a", "b"])
    assert torch.is_grad_enabled()
    assert_untouched(model.layers)
    assert run_layerwise(list(model.layers), [lambda: model(0.0)]) == [8.0]


def test_a_layer_that_raises_ends_all_passes() -> None:
    model, ended = AddMultiply(2), []

    def run() -> None:
        try:
            model(0.0)
        finally:
            ended.append(True)

    def run_layer(index: int, layer: nn.Module, calls: Any) -> list[Any]:
        if index == 1:
            raise MemoryError
        return [call.run(layer) for call in calls]

    with pytest.raises(MemoryError):
        run_layerwise(list(model.layers), [run, run], run_layer)
    assert ended == [True, True]
    assert_untouched(model.layers)


def test_a_pass_whose_end_raises_does_not_keep_the_others_waiting() -> None:
    model, ended = AddMultiply(2), []

    def run(name: str) -> None:
        try:
            model(0.0)
        finally:
            ended.append(name)
            if name == "b":
                raise KeyError(name)

    def run_layer(*_: Any) -> Any:
        raise MemoryError

    with pytest.raises(KeyError):
        run_layerwise(list(model.layers), [lambda n=n: run(n) for n in "abc"], run_layer)
    assert sorted(ended) == ["a", "b", "c"]
    assert_untouched(model.layers)


def test_a_wrong_number_of_outputs_is_refused() -> None:
    model = AddMultiply(1)
    with pytest.raises(ValueError, match="zip"):
        run_layerwise(
            list(model.layers), [lambda: model(0.0)] * 2, lambda index, layer, calls: [0.0]
        )
    assert_untouched(model.layers)


def test_nothing_of_a_pass_stays_in_memory() -> None:
    class Held:
        alive = 0

        def __init__(self) -> None:
            Held.alive += 1

        def __del__(self) -> None:
            Held.alive -= 1

    model = AddMultiply(1)

    def run() -> float:
        held = Held()
        assert held.alive
        return model(0.0)

    run_layerwise(list(model.layers), [run, run])
    with pytest.raises(MemoryError):
        run_layerwise(list(model.layers), [run, run], lambda *_: (_ for _ in ()).throw(MemoryError))
    gc.collect()
    assert Held.alive == 0
