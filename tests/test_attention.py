"""Routing attention: what other calls see of it, what it hands over, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3NextConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_grpo_ext.attention import (
    causal_attention,
    lower_right_mask,
    route_attention,
    shared_prefix_inputs,
    shared_prefix_problem,
    sliding_window,
    text_config,
)
from trl_grpo_ext.errors import SharedPrefixError

SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def build(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
        return model.float().eval()


def build_llama(**options: Any) -> LlamaForCausalLM:
    return build(LlamaConfig(**SIZES), **options)  # type: ignore[return-value]


class Recorder:
    """Stands in for the attention of every layer with the values of each token itself."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.scalings: list[float | None] = []
        self.shapes: list[tuple[tuple[int, ...], ...]] = []

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None
    ) -> Tensor:
        self.layers.append(layer)
        self.scalings.append(scaling)
        self.shapes.append((tuple(query.shape), tuple(key.shape), tuple(value.shape)))
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


@pytest.fixture
def unrouted_sdpa() -> Iterator[None]:
    """The registry as transformers ships it, whatever ran before."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    yield
    AttentionInterface.register("sdpa", before)


# Other calls --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unrouted_sdpa")
@pytest.mark.parametrize("padded", [False, True])
def test_route_attention_changes_no_bit_of_other_calls(padded: bool) -> None:
    model = build_llama()
    ids = torch.arange(18).view(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0 if padded else 1

    def logits_and_gradient() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits
        logits.square().mean().backward()
        gradient = model.get_input_embeddings().weight.grad
        return logits.detach(), gradient.clone()

    before = logits_and_gradient()
    route_attention(model)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward
    after = logits_and_gradient()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


@pytest.mark.usefixtures("unrouted_sdpa")
def test_route_attention_changes_no_token_of_greedy_generation() -> None:
    model = build_llama()
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "max_new_tokens": 8,
        "pad_token_id": 0,
    }
    before = model.generate(ids, **options)
    route_attention(model)
    assert torch.equal(model.generate(ids, **options), before)


@pytest.mark.usefixtures("unrouted_sdpa")
def test_route_attention_wraps_once_when_done_twice() -> None:
    route_attention(build_llama())
    first = ALL_ATTENTION_FUNCTIONS["sdpa"]
    route_attention(build_llama())
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is first
    assert first.__wrapped__ is sdpa_attention_forward


@pytest.mark.usefixtures("unrouted_sdpa")
def test_route_attention_leaves_the_configuration_alone() -> None:
    model = build_llama()
    before = model.config.to_dict()
    route_attention(model)
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "sdpa"


# What is handed over ------------------------------------------------------------------------------


def test_shared_prefix_receives_every_layer_with_its_key_value_heads_and_scaling() -> None:
    model = build_llama()
    route_attention(model)
    recorder = Recorder()
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    model(**shared_prefix_inputs(ids, torch.arange(5)[None], recorder))
    assert recorder.layers == [0, 1]
    assert recorder.scalings == [4**-0.5] * 2  # heads of 16 / 4
    assert recorder.shapes == [((1, 4, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4))] * 2


def test_shared_prefix_output_is_the_attention_of_the_model() -> None:
    # Each token attends to itself alone, so a row of tokens is as good as rows of one token.
    model = build_llama()
    route_attention(model)
    ids = torch.tensor([[3, 4, 5]])
    positions = torch.zeros_like(ids)
    mixed = model(**shared_prefix_inputs(ids, positions, Recorder())).logits
    alone = model(input_ids=ids.T, position_ids=positions.T).logits
    torch.testing.assert_close(mixed[0], alone[:, 0], rtol=1e-5, atol=1e-6)


def test_a_stand_in_is_all_that_the_model_sees_of_a_mask() -> None:
    ids = torch.tensor([[3, 4, 5]])
    mask = shared_prefix_inputs(ids, torch.arange(3)[None], Recorder())["attention_mask"]
    assert mask.shape == (1, 1, 1, 1)
    assert mask.dtype == torch.bool
    assert mask.all()


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_shared_prefix_is_refused_when_attention_is_more_than_causal(name: str) -> None:
    model = build_llama()
    route_attention(model)
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    x = torch.zeros(1, 2, 3, 4)
    layer = model.model.layers[0].self_attn
    with pytest.raises(
        SharedPrefixError, match=f"LlamaAttention uses {name}, .*`shared_prefix: never`"
    ):
        attention(layer, x, x, x, None, shared_prefix=Recorder(), **{name: torch.ones(2)})
    attended, weights = attention(layer, x, x, x, None, shared_prefix=Recorder(), **{name: None})
    assert attended.shape == (1, 3, 2, 4)
    assert weights is None


@pytest.mark.parametrize("name", ["eager", "flex_attention", "paged|eager"])
def test_route_attention_refuses_what_it_cannot_route(name: str) -> None:
    model = build_llama()
    model.config._attn_implementation = name
    with pytest.raises(SharedPrefixError, match=r"attention implementation is '.*'.* Load the"):
        route_attention(model)


# What is known beforehand -------------------------------------------------------------------------


def test_shared_prefix_problem_is_none_for_rotary_attention_of_any_length() -> None:
    assert shared_prefix_problem(build_llama(), longest=1000) is None


def test_shared_prefix_problem_names_an_implementation_that_is_not_looked_up() -> None:
    model = build_llama(attn_implementation="eager")
    assert shared_prefix_problem(model, longest=4) == "its attention implementation is 'eager'"


def test_shared_prefix_problem_compares_the_sliding_window_with_the_longest_row() -> None:
    model = build(MistralConfig(**SIZES, sliding_window=8))
    assert shared_prefix_problem(model, longest=8) is None
    assert shared_prefix_problem(model, longest=9) == (
        "its sliding window of 8 tokens is shorter than some rows"
    )


def test_shared_prefix_problem_counts_a_window_in_any_layer() -> None:
    layers = ["full_attention", "sliding_attention"]
    model = build(Gemma3TextConfig(**SIZES, head_dim=4, sliding_window=8, layer_types=layers))
    assert sliding_window(model) == 8
    assert shared_prefix_problem(model, longest=8) is None
    assert "window of 8 tokens" in str(shared_prefix_problem(model, longest=9))


def test_shared_prefix_problem_ignores_a_window_that_no_layer_uses() -> None:
    layers = ["full_attention"] * 2
    model = build(Gemma3TextConfig(**SIZES, head_dim=4, sliding_window=8, layer_types=layers))
    assert sliding_window(model) is None
    assert shared_prefix_problem(model, longest=20) is None
    assert sliding_window(build(Qwen2Config(**SIZES, sliding_window=8))) is None  # not in use
    assert sliding_window(build_llama()) is None


def test_shared_prefix_problem_names_linear_attention() -> None:
    config = Qwen3NextConfig(
        **SIZES,
        head_dim=4,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        layer_types=["linear_attention", "full_attention"],
    )
    assert shared_prefix_problem(build(config), longest=4) == (
        "it has layers of another kind than attention (linear_attention)"
    )


def test_shared_prefix_problem_refuses_a_model_without_attention() -> None:
    model = build(MambaConfig(vocab_size=24, hidden_size=16, num_hidden_layers=1, state_size=4))
    assert shared_prefix_problem(model, longest=4) is not None


def test_shared_prefix_problem_compares_learned_positions_with_the_longest_row() -> None:
    model = build(GPT2Config(vocab_size=24, n_embd=16, n_head=2, n_layer=1, n_positions=8))
    assert shared_prefix_problem(model, longest=8) is None
    assert shared_prefix_problem(model, longest=9) == (
        "it has 8 learned positions, fewer than a row of 9"
    )


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_shared_prefix_problem_names_a_soft_cap_of_the_attention(implementation: str) -> None:
    model = build(Gemma2Config(**SIZES, head_dim=4, sliding_window=32))
    assert shared_prefix_problem(model, longest=4) is not None  # Gemma 2 is eager by itself
    model.config._attn_implementation = implementation
    assert "softcap" in str(shared_prefix_problem(model, longest=4))


def test_shared_prefix_problem_names_attention_sinks() -> None:
    model = build(GptOssConfig(**SIZES, head_dim=4, num_local_experts=2, sliding_window=32))
    assert shared_prefix_problem(model, longest=4) is not None  # GPT-OSS is eager by itself
    model.config._attn_implementation = "flash_attention_3"
    assert "sink" in str(shared_prefix_problem(model, longest=4))


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 32),
        (
            {
                "rope_type": "longrope",
                "factor": 4.0,
                "short_factor": [1.0, 1.0],
                "long_factor": [4.0, 4.0],
                "original_max_position_embeddings": 8,
            },
            8,
        ),
    ],
)
def test_shared_prefix_problem_refuses_rotary_angles_that_depend_on_the_length(
    rope: dict[str, Any], limit: int
) -> None:
    # The padded path has the angles of the padded width, the packed one those of its longest row.
    model = build(LlamaConfig(**SIZES, rope_parameters={**rope, "rope_theta": 10000.0}))
    assert shared_prefix_problem(model, longest=limit) is None
    assert rope["rope_type"] in str(shared_prefix_problem(model, longest=limit + 1))


def test_text_config_is_the_configuration_of_a_text_model_itself() -> None:
    model = build_llama()
    assert text_config(model) is model.config


# Causal attention ---------------------------------------------------------------------------------


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """One query after the other, one head after the other; shapes as ``causal_attention``."""
    batch, num_queries, num_heads, width = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    output = torch.zeros(batch, num_queries, num_heads, width)
    for b in range(batch):
        for n in range(num_queries):
            seen = num_keys - num_queries + n + 1
            for h in range(num_heads):
                k = h * num_kv_heads // num_heads
                scores = torch.tensor(
                    [float(query[b, n, h] @ key[b, s, k]) * scaling for s in range(seen)]
                )
                output[b, n, h] = scores.softmax(0) @ value[b, :seen, k]
    return output


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 5), (3, 5), (1, 5), (1, 1)])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_causal_attention_equals_attention_by_hand(
    num_kv_heads: int, num_queries: int, num_keys: int, scaling: float | None
) -> None:
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(2, num_queries, 4, 8, generator=generator)
    key, value = torch.randn(2, 2, num_keys, num_kv_heads, 8, generator=generator)
    expected = attention_by_hand(query, key, value, scaling or 1 / math.sqrt(8))
    for make_mask in (lower_right_mask, causal_lower_right):  # of a CPU, and of CUDA
        found = causal_attention(query, key, value, scaling=scaling, make_mask=make_mask)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make_mask", [lower_right_mask, causal_lower_right])
def test_causal_attention_takes_the_dtypes_that_autocast_leaves(
    make_mask: Callable[[int, int], Tensor],
) -> None:
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(2, 3, 4, 8, generator=generator, requires_grad=True)
    key, value = torch.randn(2, 2, 5, 2, 8, generator=generator)
    key, value = (
        key.bfloat16().float(),
        value.bfloat16(),
    )  # keys come rotated, in float32
    rounded = query.detach().bfloat16().float()
    expected = attention_by_hand(rounded, key, value.float(), 1 / math.sqrt(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = causal_attention(query, key, value, scaling=None, make_mask=make_mask)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    found.sum().backward()
    assert query.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_causal_attention_of_cuda_equals_that_of_the_cpu(
    dtype: torch.dtype, num_kv_heads: int
) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = [(2, 70, 4, 64), *2 * [(2, 200, num_kv_heads, 64)]]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.to(device).requires_grad_() for x in inputs]
        output = causal_attention(*leaves, scaling=None)
        output.float().square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for on_cpu, on_cuda in zip(*results, strict=True):
        atol = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=atol, atol=atol)
