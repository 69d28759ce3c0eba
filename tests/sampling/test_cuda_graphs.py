"""Steps that stay in the same memory, and their graphs; on a CPU a tape of operations is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sampling.small import EOS, WORDS, build_small_model
from sampling.tapes import record_tapes
from sampling.test_decoding import PROMPTS, Row, assert_same, rows_of, sample
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from trl_grpo_ext.sampling import cuda_graphs
from trl_grpo_ext.sampling.decoding import Completion
from trl_grpo_ext.sampling.settings import SamplingSettings

LONG = SamplingSettings(max_new_tokens=40, stop_ids=frozenset([EOS]))
GROUP_SIZE = 12


def small_mixture() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.float().eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "dense": build_small_model,
    "mixture": small_mixture,
}


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return record_tapes(monkeypatch)


def count_passes(model: PreTrainedModel) -> list[None]:
    passes: list[None] = []
    model.register_forward_pre_hook(lambda *_: passes.append(None))
    return passes


def both_ways(model: PreTrainedModel, rows: list[Row]) -> Iterator[dict[Row, Completion]]:
    for fixed_shapes in (False, True):
        yield sample(model, rows, settings=LONG, fixed_shapes=fixed_shapes)


@pytest.mark.parametrize("name", MODELS)
def test_completions_are_the_same_in_fixed_shapes(name: str) -> None:
    growing, fixed = both_ways(MODELS[name](), rows_of(len(PROMPTS), GROUP_SIZE))
    assert len({len(completion.ids) for completion in growing.values()}) > 8
    assert_same(fixed, growing)


@pytest.mark.parametrize("name", MODELS)
def test_completions_are_the_same_from_a_tape(name: str, tapes: list[int]) -> None:
    model = MODELS[name]()
    rows = rows_of(len(PROMPTS), GROUP_SIZE)
    growing, taped = both_ways(model, rows)
    assert_same(taped, growing)
    assert len(tapes) > 2  # one a shape: rows leave when they are half of all
    steps = max(len(completion.ids) for completion in taped.values()) - 1
    passes = count_passes(model)
    del tapes[:]
    sample(model, rows, settings=LONG, fixed_shapes=True)
    # The prompts; for each tape the run before it, its recording, and if repeated the comparison.
    repeated = [repeats for repeats in tapes if repeats]
    assert len(passes) == 1 + 2 * len(tapes) + len(repeated)
    assert sum(tapes) == steps - len(tapes)


def test_a_growing_cache_is_taped_anew(tapes: list[int]) -> None:
    settings = SamplingSettings(max_new_tokens=150, stop_ids=frozenset())
    model = build_small_model()
    model.config.max_position_embeddings = 256
    rows = rows_of(2, 2)
    growing = sample(model, rows, settings=settings, fixed_shapes=False)
    assert tapes == []
    assert_same(sample(model, rows, settings=settings, fixed_shapes=True), growing)
    assert tapes == [63, 63, 20]  # of 64, 64 and 21 steps


def test_what_a_tape_would_get_wrong_is_found_and_told_once(
    tapes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    def roll(_: object, __: object, kwargs: dict[str, Any], output: Any) -> Any:
        output.logits = output.logits.roll(kwargs["shared_prefix"]._length, dims=-1)
        return output

    model = build_small_model()
    model.register_forward_hook(roll, with_kwargs=True)  # counts the tokens, but in Python
    rows = rows_of(2, 4)
    expected = sample(model, rows, settings=LONG, fixed_shapes=False)
    assert_same(sample(model, rows, settings=LONG, fixed_shapes=True), expected)
    assert tapes == [1]
    assert_same(sample(model, rows, settings=LONG, fixed_shapes=True), expected)
    assert tapes == [1]
    told = caplog.text
    assert told.count("no CUDA graph of LlamaForCausalLM") == 1
    assert "others than those of the kernels one by one" in told


def test_what_cannot_be_captured_is_told_once(
    tapes: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nthe rest of it")

    monkeypatch.setattr(cuda_graphs, "capture", fail)
    model = build_small_model()
    for _ in range(2):
        growing, fixed = both_ways(model, rows_of(2, 4))
        assert_same(fixed, growing)
    assert caplog.text.count("operation not permitted when stream is capturing") == 1
    assert "the rest of it" not in caplog.text


def test_a_model_on_the_cpu_is_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    model = build_small_model()
    assert cuda_graphs.capture_problem(model) == "the model is not on CUDA"
    sample(model, rows_of(2, 2), fixed_shapes=True)
    assert "CUDA graph" not in caplog.text


@pytest.mark.gpu
def test_a_model_that_waits_for_the_device_goes_on_without_a_graph(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build_small_model().cuda()
    model.register_forward_pre_hook(
        lambda _, __, kwargs: kwargs["position_ids"].max().item() and None, with_kwargs=True
    )
    stream = torch.cuda.current_stream()
    growing, fixed = both_ways(model, rows_of(2, 4))
    assert_same(fixed, growing)
    assert torch.cuda.current_stream() == stream
    assert caplog.text.count("no CUDA graph of LlamaForCausalLM") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_completions_are_the_same_from_a_cuda_graph(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = MODELS[name]().cuda()
    captured: list[None] = []
    capture = cuda_graphs.capture

    def count(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        captured.append(None)
        return capture(function)

    monkeypatch.setattr(cuda_graphs, "capture", count)
    growing, fixed = both_ways(model, rows_of(len(PROMPTS), GROUP_SIZE))
    assert_same(fixed, growing)
    assert len(captured) > 2
    assert "no CUDA graph" not in caplog.text
