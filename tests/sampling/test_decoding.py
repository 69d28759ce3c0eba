"""Completions: right in distribution, the same however the batch is cut, and out at once."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from sampling.small import EOS, WORDS, build_small_model, next_token_logits, small_config
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from trl_grpo_ext.sampling.decoding import Completion, sample_completions
from trl_grpo_ext.sampling.settings import SamplingSettings
from trl_grpo_ext.sampling.streams import CompletionKey

PROMPTS = [[1, 2, 3, 4], [5], [2, 2], [4, 3, 3]]
SETTINGS = SamplingSettings(max_new_tokens=10, stop_ids=frozenset([EOS]))
Row = tuple[int, int]  # number of the prompt, index in the group


@pytest.fixture
def small_model() -> LlamaForCausalLM:
    return build_small_model()


def rows_of(num_prompts: int, group_size: int) -> list[Row]:
    return list(itertools.product(range(num_prompts), range(group_size)))


def sample(model: PreTrainedModel, rows: list[Row], **options: Any) -> dict[Row, Completion]:
    completions = sample_completions(
        model,
        [PROMPTS[prompt] for prompt, _ in rows],
        [CompletionKey(*row) for row in rows],
        **{"settings": SETTINGS, "seed": 0, "step": 0, **options},
    )
    return dict(zip(rows, completions, strict=True))


def assert_same(actual: dict[Row, Completion], expected: dict[Row, Completion]) -> None:
    assert {row: c.ids for row, c in actual.items()} == {row: expected[row].ids for row in actual}
    for row, completion in actual.items():
        for name in ("policy_logprobs", "sampling_logprobs"):
            assert getattr(completion, name) == pytest.approx(
                getattr(expected[row], name), abs=1e-5
            )
        assert completion.stopped == expected[row].stopped


# --- the distribution ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.5, "min_p": 0.2}, {"repetition_penalty": 2.0}],
    ids=["plain", "min_p", "repetition_penalty"],
)
def test_completions_come_with_their_exact_probabilities(
    small_model: LlamaForCausalLM, options: dict[str, float]
) -> None:
    num_draws, prompt = 6000, [1, 4]
    completions = sample_completions(
        small_model,
        [prompt] * num_draws,
        [CompletionKey(0, g) for g in range(num_draws)],
        settings=SamplingSettings(max_new_tokens=3, stop_ids=frozenset([EOS]), **options),
        seed=1,
        step=2,
    )
    drawn = Counter(tuple(completion.ids) for completion in completions)
    exact = exact_probabilities(small_model, prompt, 3, **options)
    assert sum(exact.values()) == pytest.approx(1.0)
    assert set(drawn) <= set(exact)
    assert chi_square_excess(drawn, exact) < 3.5  # standard deviations
    for completion in completions[:100]:
        assert sum(completion.sampling_logprobs) == pytest.approx(
            math.log(exact[tuple(completion.ids)]), abs=1e-4
        )


def exact_probabilities(
    model: LlamaForCausalLM, prompt: list[int], length: int, **options: float
) -> dict[tuple[int, ...], float]:
    """All completions that can come, counted out one by one."""
    found: dict[tuple[int, ...], float] = {}
    growing: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for ids, p in growing.items():
            logits = next_token_logits(model, prompt, [*ids, 1])[-1].tolist()
            for token, q in enumerate(draw_probabilities(logits, {*prompt, *ids}, **options)):
                if p * q > 0:
                    longer[*ids, token] = p * q
        found |= {ids: p for ids, p in longer.items() if ids[-1] == EOS}
        growing = {ids: p for ids, p in longer.items() if ids[-1] != EOS}
    return found | growing


def draw_probabilities(
    logits: list[float],
    seen: set[int],
    *,
    temperature: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> list[float]:
    for token in seen:
        logits[token] *= repetition_penalty if logits[token] < 0 else 1 / repetition_penalty
    weights = [math.exp(logit / temperature) for logit in logits]
    weights = [weight if weight >= min_p * max(weights) else 0.0 for weight in weights]
    return [weight / sum(weights) for weight in weights]


def chi_square_excess(
    drawn: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float]
) -> float:
    """How far the statistic lies above its mean, in standard deviations (Wilson, Hilferty)."""
    num_draws = sum(drawn.values())
    rare = [ids for ids, p in exact.items() if p * num_draws < 5]
    cells = [[ids] for ids in exact if ids not in rare] + ([rare] if rare else [])
    df, statistic = len(cells) - 1, 0.0
    for cell in cells:
        expected = sum(exact[ids] for ids in cell) * num_draws
        statistic += (sum(drawn[ids] for ids in cell) - expected) ** 2 / expected
    return ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


# --- the cut of the batch --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}],
    ids=["plain", "processed"],
)
def test_completions_are_the_same_however_the_batch_is_cut(
    small_model: LlamaForCausalLM, options: dict[str, Any]
) -> None:
    settings = SamplingSettings(max_new_tokens=10, stop_ids=frozenset([EOS]), **options)
    rows = rows_of(4, 6)
    together = sample(small_model, rows, settings=settings)
    assert len({len(c.ids) for c in together.values()}) > 4
    assert len({tuple(c.ids) for c in together.values()}) > 12
    cuts: dict[str, list[list[Row]]] = {
        "reversed": [rows[::-1]],
        "interleaved": [sorted(rows, key=lambda row: row[1])],
        "a prompt at a time": [[row for row in rows if row[0] == p] for p in range(4)],
        "parts of groups": [rows[:4], rows[4:9], rows[9:10], rows[10:]],
        "one at a time": [[row] for row in rows],
    }
    for parts in cuts.values():
        for part in parts:
            assert_same(sample(small_model, part, settings=settings), together)


@pytest.mark.parametrize(
    ("max_live_tokens", "num_waves"), [(14, 12), (25, 8), (44, 4), (70, 2), (1000, 1)]
)
def test_completions_are_the_same_in_waves_that_keep_below_the_cap(
    small_model: LlamaForCausalLM, max_live_tokens: int, num_waves: int
) -> None:
    rows = rows_of(4, 3)  # prompts of 4, 1, 2 and 3 tokens, each with 3 completions of up to 10
    expected = sample(small_model, rows)
    live: list[int] = []  # tokens that each wave may come to hold
    finished: list[int] = []

    def count_prompts(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        if "logits_to_keep" in kwargs:
            live.append(kwargs["input_ids"].shape[1])

    def count_completion(index: int, _completion: Completion) -> None:
        live[-1] += 10
        finished.append(index)

    small_model.register_forward_pre_hook(count_prompts, with_kwargs=True)
    actual = sample(
        small_model, rows, max_live_tokens=max_live_tokens, on_finished=count_completion
    )
    assert_same(actual, expected)
    assert sorted(finished) == list(range(len(rows)))
    assert len(live) == num_waves
    assert max(live) <= max_live_tokens


def test_equal_prompts_are_computed_once_wherever_they_stand(small_model: LlamaForCausalLM) -> None:
    widths: list[int] = []
    small_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: widths.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    sample(small_model, [(0, 0), (3, 0), (0, 1), (3, 1), (0, 2)])
    assert widths[0] == len(PROMPTS[0]) + len(PROMPTS[3])
    assert set(widths[1:]) == {1}


def test_seed_and_step_give_other_completions(small_model: LlamaForCausalLM) -> None:
    rows = rows_of(2, 4)
    first = sample(small_model, rows)
    assert sample(small_model, rows) == first
    assert sample(small_model, rows, seed=1) != first
    assert sample(small_model, rows, step=1) != first


def test_a_longer_limit_goes_on_where_the_shorter_one_stopped(
    small_model: LlamaForCausalLM,
) -> None:
    rows = rows_of(2, 6)
    long = sample(small_model, rows)
    short = sample(small_model, rows, settings=SamplingSettings(max_new_tokens=4, stop_ids={EOS}))
    for row in rows:
        assert short[row].ids == long[row].ids[:4]
        assert short[row].stopped == (long[row].stopped and len(long[row].ids) <= 4)


def test_greedy_completions_are_those_of_an_argmax_loop(small_model: LlamaForCausalLM) -> None:
    settings = SamplingSettings(max_new_tokens=6, stop_ids=frozenset([EOS]), temperature=0)
    for (prompt, _), completion in sample(small_model, rows_of(4, 2), settings=settings).items():
        ids: list[int] = []
        while len(ids) < 6 and EOS not in ids:
            ids.append(int(next_token_logits(small_model, PROMPTS[prompt], [*ids, 1])[-1].argmax()))
        assert completion.ids == ids


# --- the log-probabilities -------------------------------------------------------------------


def test_logprobs_equal_those_of_a_full_forward_pass(small_model: LlamaForCausalLM) -> None:
    assert_logprobs_of_a_full_pass(small_model, sample(small_model, rows_of(4, 6)))


def assert_logprobs_of_a_full_pass(
    model: PreTrainedModel, completions: dict[Row, Completion], *, atol: float = 1e-5
) -> None:
    for (prompt, _), completion in completions.items():
        logprobs_TV = next_token_logits(model, PROMPTS[prompt], completion.ids).log_softmax(-1)
        expected = logprobs_TV.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert completion.policy_logprobs == pytest.approx(expected.tolist(), abs=atol)
        assert completion.sampling_logprobs == completion.policy_logprobs


# --- models whose prompts cannot be shared ---------------------------------------------------


def test_a_model_that_cannot_be_routed_gives_the_same_completions(
    small_model: LlamaForCausalLM,
) -> None:
    rows = rows_of(4, 5)
    expected = sample(small_model, rows)
    other = build_small_model()
    other.set_attn_implementation("eager")
    heights: list[int] = []
    other.register_forward_pre_hook(
        lambda _module, _args, kwargs: heights.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert_same(sample(other, rows), expected)
    assert heights[0] == 4  # the prompts stand below each other, padded
    assert_same(sample(other, rows, max_live_tokens=40), expected)


def test_a_sliding_window_shorter_than_the_rows_is_respected() -> None:
    config = MistralConfig(**{**small_config().to_diff_dict(), "sliding_window": 3})
    config.num_key_value_heads = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = MistralForCausalLM(config).float().eval()
    completions = sample(model, rows_of(4, 5))
    assert max(len(completion.ids) for completion in completions.values()) > 5
    assert_logprobs_of_a_full_pass(model, completions)


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_values_of_another_width_than_keys(fixed_shapes: bool) -> None:
    config = DeepseekV3Config(
        **{**small_config().to_diff_dict(), "attention_dropout": 0.0, "head_dim": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
    )
    config.num_key_value_heads = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = DeepseekV3ForCausalLM(config).float().eval()
    completions = sample(model, rows_of(4, 5), fixed_shapes=fixed_shapes)
    assert_logprobs_of_a_full_pass(model, completions)


def test_a_layer_that_attends_twice_has_each_row_computed_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = DiffLlamaConfig(**{**small_config().to_diff_dict(), "attention_dropout": 0.0})
    config.num_key_value_heads = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = DiffLlamaForCausalLM(config).float().eval()
    assert_logprobs_of_a_full_pass(model, sample(model, rows_of(4, 5)))
    assert "a layer of it attends more than once in a pass" in caplog.text


def test_a_hybrid_model_drops_rows_of_its_recurrent_states_too() -> None:
    config = Qwen3NextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=0,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        initializer_range=0.3,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3NextForCausalLM(config).float().eval()
    completions = sample(model, rows_of(4, 5))
    assert len({len(completion.ids) for completion in completions.values()}) > 3
    # A pass over a text computes the recurrence in chunks, in another order of sums.
    assert_logprobs_of_a_full_pass(model, completions, atol=1e-4)


def small_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).float().eval()


def test_learned_positions_count_from_each_prompts_own_start() -> None:
    model = small_gpt2()
    assert_logprobs_of_a_full_pass(model, sample(model, rows_of(4, 5)))


@pytest.mark.gpu
def test_logprobs_equal_those_of_a_full_forward_pass_on_a_cuda_device() -> None:
    model = build_small_model().cuda()
    rows = rows_of(4, 50)
    completions = sample(model, rows)
    assert_same(sample(model, rows, max_live_tokens=300), completions)
    assert_logprobs_of_a_full_pass(model.cpu(), completions)


# --- leaving at once -------------------------------------------------------------------------


def test_a_completion_is_handed_over_before_the_next_token_of_the_others(
    small_model: LlamaForCausalLM,
) -> None:
    num_passes = 0
    handed: list[tuple[int, Completion, int]] = []

    def count(*_: object) -> None:
        nonlocal num_passes
        num_passes += 1

    small_model.register_forward_pre_hook(count)
    rows = rows_of(3, 4)
    completions = sample(
        small_model,
        rows,
        on_finished=lambda index, completion: handed.append((index, completion, num_passes)),
    )
    assert {index for index, _, _ in handed} == set(range(12))
    assert len({passes for _, _, passes in handed}) > 3
    for index, completion, passes in handed:
        assert completion is completions[rows[index]]
        assert passes == len(completion.ids)


def test_an_error_of_the_callback_comes_through_and_the_modes_come_back(
    small_model: LlamaForCausalLM,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("reward")

    small_model.train()
    small_model.model.layers[0].eval()  # a frozen layer
    with pytest.raises(RuntimeError, match="reward"):
        sample(small_model, rows_of(1, 2), on_finished=fail)
    assert small_model.training
    assert small_model.model.layers[1].mlp.training
    assert not small_model.model.layers[0].mlp.training


def test_the_progress_bar_counts_completions_and_shows_only_if_asked_for(
    small_model: LlamaForCausalLM, capfd: pytest.CaptureFixture[str]
) -> None:
    sample(small_model, rows_of(2, 3))
    assert capfd.readouterr().err == ""
    sample(small_model, rows_of(2, 3), progress=True)
    assert "6/6" in capfd.readouterr().err


# --- bad input -------------------------------------------------------------------------------


def test_no_prompt_gives_no_completion(small_model: LlamaForCausalLM) -> None:
    assert sample(small_model, []) == {}


@pytest.mark.parametrize(
    ("prompts", "keys", "options", "message"),
    [
        ([[1], []], [(0, 0), (1, 0)], {}, "`prompts[1]` has no token"),
        ([[1]], [(0, 0), (1, 0)], {}, "there are 2 `keys` for 1 prompts"),
        ([[1], [2]], [(0, 0), (0, 0)], {}, "`keys` has a key twice"),
        ([[1], [1] * 65], [(0, 0), (1, 0)], {}, "`prompts[1]` has 65 tokens, but the model has 64"),
        (
            [[1, 2, 3]],
            [(0, 0)],
            {"max_live_tokens": 12},
            "`max_live_tokens` is 12, but one completion of prompt 0 needs 3 + 10 tokens",
        ),
    ],
)
def test_sample_completions_refuses_what_cannot_work(
    small_model: LlamaForCausalLM,
    prompts: list[list[int]],
    keys: list[Row],
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match="`") as caught:
        sample_completions(
            small_model,
            prompts,
            [CompletionKey(*key) for key in keys],
            settings=SETTINGS,
            seed=0,
            step=0,
            **options,
        )
    assert message in str(caught.value)


def test_rotary_positions_may_go_beyond_the_trained_ones_during_a_completion(
    small_model: LlamaForCausalLM,
) -> None:
    settings = SamplingSettings(max_new_tokens=3)
    keys = [CompletionKey(0, 0)]
    rows = sample_completions(small_model, [[1] * 64], keys, settings=settings, seed=0, step=0)
    assert len(rows[0].ids) == 3


def test_learned_positions_must_suffice_for_the_whole_completion() -> None:
    options: dict[str, Any] = {"settings": SETTINGS, "seed": 0, "step": 0}
    keys = [CompletionKey(0, 0)]
    assert sample_completions(small_gpt2(), [[1] * 6], keys, **options)
    with pytest.raises(ValueError, match=r"has 7 tokens \+ 10 new ones, but the model has 16"):
        sample_completions(small_gpt2(), [[1] * 7], keys, **options)


def test_a_model_without_a_cache_is_refused() -> None:
    config = OpenAIGPTConfig(vocab_size=6, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    model = OpenAIGPTLMHeadModel(config).eval()
    with pytest.raises(ValueError, match="OpenAIGPTLMHeadModel fills no key-value cache"):
        sample(model, [(0, 0)])


def test_options_that_leave_no_token_are_named(small_model: LlamaForCausalLM) -> None:
    settings = SamplingSettings(max_new_tokens=3, suppress_tokens=list(range(len(WORDS))))
    with pytest.raises(ValueError, match="leave no token to draw after 0 tokens of a completion"):
        sample(small_model, [(0, 0)], settings=settings)


def test_logits_that_are_not_finite_are_named(small_model: LlamaForCausalLM) -> None:
    small_model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits after 0 tokens of a completion are not finite"):
        sample(small_model, [(0, 0)])
