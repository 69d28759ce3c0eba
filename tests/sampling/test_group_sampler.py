"""Every log-probability against a plain forward pass, and the draws against exact probabilities."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from sampling.small import EOS, WORDS, build_small_model, next_token_logits
from tiny import BOS, build_tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from trl_grpo_ext.sampling import GroupSamples, group_sample, token_logprobs

PROMPTS = ["2 + 3 =", "x", "What is the sum of the first twenty odd numbers?"]
WARPED = {"temperature": 0.7, "top_p": 0.8, "top_k": 5}


@pytest.fixture(scope="module")
def small_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture
def small_model() -> LlamaForCausalLM:
    return build_small_model()


def warped_probs(
    logits_V: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> list[float]:
    """Temperature, then the top_k likeliest, of these the fewest that hold top_p of the mass."""
    weights = [math.exp(logit / temperature) for logit in logits_V.double().tolist()]
    likeliest = sorted(range(len(weights)), key=lambda token: -weights[token])
    likeliest = likeliest[: top_k or None]
    mass = sum(weights[token] for token in likeliest)
    kept: list[int] = []
    while sum(weights[token] for token in kept) < top_p * mass and len(kept) < len(likeliest):
        kept.append(likeliest[len(kept)])
    total = sum(weights[token] for token in kept)
    return [weight / total if token in kept else 0.0 for token, weight in enumerate(weights)]


# --- log-probabilities -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, WARPED], ids=["plain", "warped"])
def test_logprobs_equal_those_of_a_full_forward_pass(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]
) -> None:
    samples = group_sample(
        tiny_model,
        tiny_tokenizer,
        PROMPTS,
        num_generations=3,
        max_new_tokens=12,
        seed=1,
        **options,
    )
    temperature = options.get("temperature", 1.0)
    for prompt, completion, policy, sampling in zip(
        samples.prompt_ids,
        samples.completion_ids,
        samples.policy_logprobs,
        samples.sampling_logprobs,
        strict=True,
    ):
        logits_TV = next_token_logits(tiny_model, prompt, completion)
        expected_policy = [
            row[token].item()
            for row, token in zip(
                (logits_TV / temperature).log_softmax(dim=-1), completion, strict=True
            )
        ]
        expected_sampling = [
            math.log(warped_probs(row, **options)[token])
            for row, token in zip(logits_TV, completion, strict=True)
        ]
        assert policy.dtype == sampling.dtype == torch.float32
        torch.testing.assert_close(policy, torch.tensor(expected_policy), atol=1e-5, rtol=0)
        torch.testing.assert_close(sampling, torch.tensor(expected_sampling), atol=1e-5, rtol=0)


def test_logprobs_equal_those_of_a_full_forward_pass_after_rows_have_left_the_batch(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert_recomputable(small_model, small_tokenizer)


def test_logprobs_equal_those_of_a_full_forward_pass_with_absolute_positions(
    small_tokenizer: PreTrainedTokenizerFast,
) -> None:
    # Llama only sees distances between tokens; GPT-2 sees where each stands, padding or not.
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).float().eval()
    assert_recomputable(model, small_tokenizer)


def assert_recomputable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """What the sampler recorded, and what it recomputes, is what a plain forward pass says."""
    samples = group_sample(
        model, tokenizer, ["a b c d", "e", "b b"], num_generations=4, max_new_tokens=10, seed=0
    )
    assert len({len(ids) for ids in samples.completion_ids}) > 3
    recomputed_BT = token_logprobs(model, samples)
    for prompt, completion, policy, recomputed_T in zip(
        samples.prompt_ids,
        samples.completion_ids,
        samples.policy_logprobs,
        recomputed_BT,
        strict=True,
    ):
        logprobs_TV = next_token_logits(model, prompt, completion).log_softmax(dim=-1)
        expected = logprobs_TV.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
        torch.testing.assert_close(policy, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(recomputed_T[: len(completion)], expected, atol=1e-5, rtol=0)


def test_token_logprobs_equal_what_the_sampler_recorded(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    samples = group_sample(
        small_model,
        small_tokenizer,
        ["a b c d", "e", "b b"],
        num_generations=4,
        max_new_tokens=10,
        seed=0,
        **WARPED,
    )
    lengths = [len(ids) for ids in samples.completion_ids]
    logprobs_BT = token_logprobs(small_model, samples, temperature=0.7)
    torch.testing.assert_close(logprobs_BT, samples.policy_logprobs_BT, atol=1e-5, rtol=0)
    assert min(lengths) < max(lengths)
    for row, length in zip(logprobs_BT.tolist(), lengths, strict=True):
        assert row[length:] == [0.0] * (max(lengths) - length)
        assert all(logprob < 0 for logprob in row[:length])


def test_token_logprobs_have_the_gradient_of_a_full_forward_pass_where_it_is_enabled(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    samples = group_sample(
        small_model, small_tokenizer, ["a b c", "d"], num_generations=2, max_new_tokens=4, seed=0
    )
    with torch.no_grad():
        assert not token_logprobs(small_model, samples).requires_grad
    parameters = list(small_model.parameters())
    actual = torch.autograd.grad(token_logprobs(small_model, samples).sum(), parameters)
    total = torch.zeros(())
    for prompt, completion in zip(samples.prompt_ids, samples.completion_ids, strict=True):
        logprobs_TV = next_token_logits(small_model, prompt, completion).log_softmax(dim=-1)
        total = total + logprobs_TV.gather(1, torch.tensor(completion)[:, None]).sum()
    expected = torch.autograd.grad(total, parameters)
    assert all(gradient.abs().max() > 0.01 for gradient in expected)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_token_logprobs_hide_the_padding_of_both_sides(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    samples = group_sample(
        small_model, small_tokenizer, ["a b c", "d"], num_generations=4, max_new_tokens=6, seed=0
    )
    masks: list[list[list[int]]] = []
    small_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: masks.append(kwargs["attention_mask"].tolist()),
        with_kwargs=True,
    )
    token_logprobs(small_model, samples)
    lengths = [len(ids) for ids in samples.completion_ids]
    assert masks == [
        [
            [0] * (3 - len(prompt)) + [1] * (len(prompt) + length) + [0] * (max(lengths) - length)
            for prompt, length in zip(samples.prompt_ids, lengths, strict=True)
        ]
    ]


def test_samples_are_padded_on_the_right_and_summed_by_completion(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    samples = group_sample(
        small_model, small_tokenizer, ["a"], num_generations=6, max_new_tokens=8, seed=0
    )
    lengths = [len(ids) for ids in samples.completion_ids]
    assert samples.mask_BT.tolist() == [
        [1.0] * length + [0.0] * (max(lengths) - length) for length in lengths
    ]
    for total, padded, logprobs in zip(
        samples.logprob_sums, samples.policy_logprobs_BT, samples.policy_logprobs, strict=True
    ):
        assert padded[: len(logprobs)].tolist() == logprobs.tolist()
        assert total.item() == pytest.approx(sum(logprobs.tolist()), abs=1e-5)


# --- the distribution of the draws -----------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "top_p": 0.9, "top_k": 5}], ids=["plain", "warped"]
)
def test_two_token_completions_come_with_their_exact_probabilities(
    small_model: LlamaForCausalLM,
    small_tokenizer: PreTrainedTokenizerFast,
    options: dict[str, Any],
) -> None:
    num_draws = 10_000
    samples = group_sample(
        small_model,
        small_tokenizer,
        ["a b c d", "e"],
        num_generations=num_draws,
        max_new_tokens=2,
        seed=0,
        **options,
    )
    for index in range(2):
        prompt = samples.prompt_ids[index * num_draws]
        drawn = Counter(map(tuple, samples.completion_ids[index * num_draws :][:num_draws]))
        exact = two_token_probabilities(small_model, prompt, options)
        assert sum(exact.values()) == pytest.approx(1.0)
        assert set(drawn) <= set(exact)
        assert chi_square_p(drawn, exact) > 1e-3


def two_token_probabilities(
    model: LlamaForCausalLM, prompt: list[int], options: dict[str, Any]
) -> dict[tuple[int, ...], float]:
    """All completions that can come, with their probabilities; nothing follows the EOS token."""
    first = warped_probs(next_token_logits(model, prompt, [])[0], **options)
    exact: dict[tuple[int, ...], float] = {(EOS,): first[EOS]}
    for token, second in product(range(len(WORDS)), repeat=2):
        if token != EOS:
            logits_TV = next_token_logits(model, prompt, [token, second])
            exact[token, second] = first[token] * warped_probs(logits_TV[1], **options)[second]
    return {completion: p for completion, p in exact.items() if p > 0}


def chi_square_p(drawn: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
    """Probability of a fit as bad as this one; outcomes expected below 5 times share a cell."""
    num_draws = sum(drawn.values())
    rare = [outcome for outcome, p in exact.items() if p * num_draws < 5]
    cells = [[outcome] for outcome in exact if outcome not in rare] + ([rare] if rare else [])
    statistic = 0.0
    for cell in cells:
        expected = sum(exact[outcome] for outcome in cell) * num_draws
        statistic += (sum(drawn[outcome] for outcome in cell) - expected) ** 2 / expected
    half_df = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    half_statistic = torch.tensor(statistic / 2, dtype=torch.float64)
    return torch.special.gammaincc(half_df, half_statistic).item()


def test_chi_square_p_agrees_with_the_table() -> None:
    # 5 degrees of freedom: the 5 % point is 11.07. Of six cells of 100 each, two are off by d.
    shift = math.sqrt(11.07 * 100 / 2)
    counts = Counter({(0,): 100 + shift, (1,): 100 - shift, (2,): 100, (3,): 100, (4,): 100})
    counts[5,] = 100
    assert chi_square_p(counts, {(i,): 1 / 6 for i in range(6)}) == pytest.approx(0.05, abs=1e-4)


def test_top_k_draws_only_from_the_likeliest_tokens(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    samples = group_sample(
        small_model,
        small_tokenizer,
        ["a b"],
        num_generations=300,
        max_new_tokens=1,
        top_k=3,
        temperature=3.0,
        seed=0,
    )
    logits_V = next_token_logits(small_model, samples.prompt_ids[0], [])[0]
    likeliest = set(logits_V.argsort(descending=True)[:3].tolist())
    assert {ids[0] for ids in samples.completion_ids} == likeliest


def test_top_p_draws_from_the_fewest_tokens_that_hold_the_mass(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    small_model.lm_head.weight.data.zero_()  # uniform: 1/6 a token, so 0.4 takes three
    options: dict[str, Any] = {"num_generations": 300, "max_new_tokens": 1, "seed": 0}
    three = group_sample(small_model, small_tokenizer, ["a"], top_p=0.4, **options)
    one = group_sample(small_model, small_tokenizer, ["a"], top_p=0.01, **options)
    assert len({ids[0] for ids in three.completion_ids}) == 3
    assert len({ids[0] for ids in one.completion_ids}) == 1
    assert {ids[0] for ids in one.completion_ids} <= {ids[0] for ids in three.completion_ids}


def test_temperature_zero_takes_the_likeliest_token_with_the_logprobs_of_temperature_one(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = ["1+2=", "b?", "a"]
    samples = group_sample(
        tiny_model,
        tiny_tokenizer,
        prompts,
        num_generations=2,
        max_new_tokens=12,
        temperature=0.0,
    )
    alone = [
        tiny_model.generate(
            torch.tensor([tiny_tokenizer(prompt).input_ids]), do_sample=False, max_new_tokens=12
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert samples.completion_ids == [ids for ids in alone for _ in range(2)]
    assert [len(ids) for ids in alone] == [1, 4, 12]  # the model ends two of them
    logprobs_BT = token_logprobs(tiny_model, samples, temperature=1.0)
    torch.testing.assert_close(samples.policy_logprobs_BT, logprobs_BT, atol=1e-5, rtol=0)


# --- how completions end ---------------------------------------------------------------------


def test_completions_end_with_the_eos_token_or_at_the_limit(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    samples = group_sample(
        small_model,
        small_tokenizer,
        ["a b c", "d"],
        num_generations=40,
        max_new_tokens=5,
        seed=0,
    )
    for ids, reason in zip(samples.completion_ids, samples.finish_reasons, strict=True):
        assert EOS not in ids[:-1]
        assert reason == ("stop" if ids[-1] == EOS else "length")
        assert len(ids) == 5 if reason == "length" else len(ids) <= 5
    assert set(samples.finish_reasons) == {"stop", "length"}


def test_completions_leave_out_special_tokens_in_their_text(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    samples = group_sample(
        small_model, small_tokenizer, ["a b c"], num_generations=20, max_new_tokens=5, seed=0
    )
    assert samples.completions == [
        " ".join(WORDS[token] for token in ids if token != EOS) for ids in samples.completion_ids
    ]


@pytest.mark.parametrize("declared", [3, [3, 4]], ids=["one", "several"])
def test_every_stop_token_of_the_generation_config_ends_a_completion(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast, declared: Any
) -> None:
    small_model.generation_config.eos_token_id = declared
    stops = {EOS, 3} if declared == 3 else {EOS, 3, 4}
    samples = group_sample(
        small_model, small_tokenizer, ["a"], num_generations=60, max_new_tokens=8, seed=0
    )
    assert {ids[-1] for ids in samples.completion_ids if len(ids) < 8} == stops
    assert not stops & {token for ids in samples.completion_ids for token in ids[:-1]}


# --- one computation for a group -------------------------------------------------------------


def test_completions_of_a_group_stand_together_and_share_the_prompt(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    samples = group_sample(
        tiny_model, tiny_tokenizer, ["1+1=", "x"], num_generations=3, max_new_tokens=6, seed=0
    )
    assert samples.group_size == 3
    assert samples.prompts == ["1+1="] * 3 + ["x"] * 3
    assert [tiny_tokenizer.decode(ids) for ids in samples.prompt_ids] == samples.prompts
    assert len(set(samples.completions)) == 6  # each draw is its own


def test_a_prompt_runs_once_and_finished_completions_leave_the_batch(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    shapes: list[tuple[int, ...]] = []
    small_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    samples = group_sample(
        small_model, small_tokenizer, ["a b c", "d"], num_generations=5, max_new_tokens=6, seed=0
    )
    unfinished = [sum(len(ids) > done for ids in samples.completion_ids) for done in range(1, 6)]
    assert unfinished[0] > unfinished[-1]
    # "a b c" and "d" stand in one row, one after the other.
    assert shapes == [(1, 4)] + [(rows, 1) for rows in unfinished if rows]


# --- seeds and modes -------------------------------------------------------------------------


def test_the_seed_decides_the_completions_and_spares_the_global_random_state(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def draw(seed: int | None) -> list[list[int]]:
        return group_sample(
            tiny_model, tiny_tokenizer, ["1+1="], num_generations=2, max_new_tokens=8, seed=seed
        ).completion_ids

    before = torch.get_rng_state()
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first, second = draw(None), draw(None)
        torch.manual_seed(5)
        assert draw(None) == first
    assert first != second


@pytest.mark.parametrize("training", [True, False])
def test_sampling_is_done_in_evaluation_mode_and_the_training_mode_comes_back(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast, training: bool
) -> None:
    options: dict[str, Any] = {"num_generations": 4, "max_new_tokens": 6, "seed": 0}
    expected = group_sample(small_model, small_tokenizer, ["a b c"], **options)
    small_model.train(training)
    samples = group_sample(small_model, small_tokenizer, ["a b c"], **options)
    assert small_model.training is training
    # Half the attention would be dropped in training mode.
    assert torch.equal(samples.policy_logprobs_BT, expected.policy_logprobs_BT)


def test_the_training_mode_comes_back_after_an_error(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    small_model.train()
    small_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        group_sample(small_model, small_tokenizer, ["a"])
    assert small_model.training


def test_sampling_computes_no_gradient(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    enabled: list[bool] = []
    small_model.register_forward_pre_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    group_sample(small_model, small_tokenizer, ["a"], num_generations=2, max_new_tokens=1, seed=0)
    assert enabled == [False]
    assert torch.is_grad_enabled()


def test_a_prompts_index_decides_its_completions_and_not_its_place_in_the_batch(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    options: dict[str, Any] = {"num_generations": 5, "max_new_tokens": 6, "seed": 0}
    texts = ["a b c", "d", "e e"]
    together = group_sample(small_model, small_tokenizer, texts, **options).completion_ids
    swapped = group_sample(
        small_model, small_tokenizer, ["e e", "a b c"], prompt_indices=[2, 0], **options
    )
    assert swapped.completion_ids == together[10:] + together[:5]
    other = group_sample(small_model, small_tokenizer, texts, step=1, **options)
    assert other.completion_ids != together


# --- options of generate ---------------------------------------------------------------------


def test_min_p_and_repetition_penalty_are_those_of_generation_kwargs(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    def draw(**options: Any) -> GroupSamples:
        return group_sample(
            small_model, small_tokenizer, ["a b", "c"], max_new_tokens=5, seed=0, **options
        )

    named = {"min_p": 0.4, "repetition_penalty": 1.5}
    samples = draw(**named)
    assert samples.completion_ids == draw(generation_kwargs=named).completion_ids
    for name in named:
        assert draw(**{**named, name: 1e-9 if name == "min_p" else 1.0}) != samples
    sampling, policy = (torch.cat(x) for x in (samples.sampling_logprobs, samples.policy_logprobs))
    assert (sampling - policy).abs().max() > 0.1


def test_generation_kwargs_override_the_arguments(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    samples = group_sample(
        small_model,
        small_tokenizer,
        ["a b", "c"],
        max_new_tokens=9,
        seed=0,
        generation_kwargs={"max_new_tokens": 4, "suppress_tokens": [EOS, 1], "num_beams": 1},
    )
    assert {len(ids) for ids in samples.completion_ids} == {4}
    assert not {EOS, 1} & {token for ids in samples.completion_ids for token in ids}


def test_generation_kwargs_that_are_not_honoured_are_refused_by_name(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    options = {"num_beams": 3, "top_k": 2, "stop_strings": "x"}
    with pytest.raises(ValueError, match="options `num_beams`, `stop_strings` are not honoured"):
        group_sample(small_model, small_tokenizer, ["a"], generation_kwargs=options)


# --- leaving at once -------------------------------------------------------------------------


def test_each_completion_is_handed_over_with_its_text_when_it_ends(
    small_model: LlamaForCausalLM,
    small_tokenizer: PreTrainedTokenizerFast,
    capfd: pytest.CaptureFixture[str],
) -> None:
    handed: list[tuple[int, str, list[int]]] = []
    samples = group_sample(
        small_model,
        small_tokenizer,
        ["a b c", "d"],
        num_generations=5,
        max_new_tokens=6,
        seed=0,
        max_live_tokens=10,
        on_finished=lambda *completion: handed.append(completion),
        progress=True,
    )
    rows = zip(range(10), samples.completions, samples.completion_ids, strict=True)
    assert sorted(handed) == list(rows)
    lengths = [len(ids) for index, _, ids in handed if index < 2]
    assert lengths == sorted(lengths)
    assert "10/10" in capfd.readouterr().err


# --- prompts ---------------------------------------------------------------------------------


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, but it puts a BOS token before every text, as Llama's does."""
    tokenizer = build_tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    return tokenizer


def test_a_conversation_gets_the_chat_template_once_and_no_second_bos(
    tiny_model: LlamaForCausalLM, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [[{"role": "user", "content": text}] for text in ("1+1=", "Why?")]
    samples = group_sample(
        tiny_model, bos_tokenizer, prompts, num_generations=2, max_new_tokens=2, seed=0
    )
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    expected = [template.format("1+1=")] * 2 + [template.format("Why?")] * 2
    assert [bos_tokenizer.decode(ids) for ids in samples.prompt_ids] == expected
    assert samples.prompts == [prompts[0]] * 2 + [prompts[1]] * 2


def test_the_chat_template_gets_its_own_arguments(
    tiny_model: LlamaForCausalLM, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    bos_tokenizer.chat_template = "{{ messages[0]['content'] }}{{ ' think' if thinking }}"
    samples = group_sample(
        tiny_model,
        bos_tokenizer,
        [[{"role": "user", "content": "Why?"}]],
        num_generations=1,
        max_new_tokens=1,
        chat_template_kwargs={"thinking": True},
    )
    assert bos_tokenizer.decode(samples.prompt_ids[0]) == "Why? think"


@pytest.mark.parametrize("text_first", [True, False])
def test_a_text_gets_the_special_tokens_of_its_tokenizer_also_beside_a_conversation(
    tiny_model: LlamaForCausalLM, bos_tokenizer: PreTrainedTokenizerFast, text_first: bool
) -> None:
    prompts: list[Any] = ["1+1=", [{"role": "user", "content": "Why?"}]]
    expected = [
        "<|im_start|>1+1=",
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    ]
    order = slice(None, None, 1 if text_first else -1)
    samples = group_sample(
        tiny_model, bos_tokenizer, prompts[order], num_generations=1, max_new_tokens=1, seed=0
    )
    assert [bos_tokenizer.decode(ids) for ids in samples.prompt_ids] == expected[order]


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "`prompts` must be a list of at least one prompt"),
        ("1+1=", {}, "`prompts` must be a list of at least one prompt"),
        (["1", ""], {}, "`prompts[1]` has no token"),
        (["1"], {"num_generations": 0}, "`num_generations` is 0; it must be at least 1"),
        (["1"], {"max_new_tokens": 0}, "`max_new_tokens` is 0; it must be at least 1"),
        (["1"], {"temperature": -0.5}, "`temperature` is -0.5; it must be at least 0"),
        (["1"], {"temperature": math.nan}, "`temperature` is nan; it must be at least 0"),
        (["1"], {"top_p": 0.0}, "`top_p`=0.0 must be in (0, 1]"),
        (["1"], {"top_p": 1.1}, "`top_p`=1.1 must be in (0, 1]"),
        (["1"], {"top_k": -1}, "`top_k`=-1 at least 0"),
        (["1", "2" * 513], {}, "`prompts[1]` has 513 tokens, but the model has 512 positions"),
        (["1", "2"], {"prompt_indices": [0]}, "`prompt_indices` must be 2 different numbers"),
        (["1", "2"], {"prompt_indices": [3, 3]}, "`prompt_indices` must be 2 different numbers"),
        (["1", "2"], {"prompt_indices": [0, -1]}, "`prompt_indices` must be 2 different numbers"),
    ],
)
def test_group_sample_refuses_what_cannot_work(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    prompts: Any,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match="`") as caught:
        group_sample(tiny_model, tiny_tokenizer, prompts, **options)
    assert message in str(caught.value)


def test_a_tokenizer_without_a_padding_token_is_enough_for_prompts_of_different_lengths(
    small_model: LlamaForCausalLM, small_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert small_tokenizer.pad_token_id is None
    samples = group_sample(small_model, small_tokenizer, ["a b c", "d"], max_new_tokens=2, seed=0)
    assert [len(ids) for ids in samples.prompt_ids] == [3] * 8 + [1] * 8
    assert all(samples.completion_ids)
