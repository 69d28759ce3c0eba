"""Every option against ``generate`` itself, which is made to draw the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sampling.small import EOS, build_small_model
from transformers import GenerationConfig

from trl_grpo_ext.sampling.decoding import Completion, sample_completions
from trl_grpo_ext.sampling.settings import SamplingSettings, unsupported_generation_keys
from trl_grpo_ext.sampling.streams import CompletionKey

PROMPTS = [[1, 2, 3, 1, 2], [4], [2, 5, 2]]
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.3},
    "top_h": {"top_h": 0.6},
    "typical_p": {"typical_p": 0.7},
    "epsilon_cutoff": {"epsilon_cutoff": 0.1},
    "eta_cutoff": {"eta_cutoff": 0.2},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size_3": {"no_repeat_ngram_size": 3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[3], [1, 2], [4, 4, 5], [4, 4, 4, 1]]},
    "sequence_bias": {"sequence_bias": [[[1], 2.0], [[2, 3], -4.0], [[4, 4, 4, 4], 5.0]]},
    "min_new_tokens": {"min_new_tokens": 4},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5)},
    "suppress_tokens": {"suppress_tokens": [2, 4]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [1, 5]},
    "renormalize_logits": {"renormalize_logits": True, "top_k": 4},
    "eos_token_id": {"eos_token_id": [EOS, 3]},
    "eos_token_id as a tensor": {"eos_token_id": torch.tensor([EOS, 3])},
    "warpers": {"temperature": 1.4, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.95},
    "all": {
        "temperature": 1.4,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[3, 1]],
        "min_new_tokens": 3,
        "suppress_tokens": [5],
    },
    "greedy": {"do_sample": False, "repetition_penalty": 1.3, "top_k": 2},
}


def sample(settings: SamplingSettings) -> list[Completion]:
    return sample_completions(
        build_small_model(),
        [prompt for prompt in PROMPTS for _ in range(4)],
        [CompletionKey(p, g) for p in range(len(PROMPTS)) for g in range(4)],
        settings=settings,
        seed=3,
        step=0,
    )


@pytest.mark.filterwarnings("ignore:.*generation flags are not valid.*")
@pytest.mark.parametrize("name", OPTIONS)
def test_logprobs_equal_those_that_generate_would_draw_from(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"do_sample": True, "max_new_tokens": 8, "eos_token_id": EOS, "top_k": 0}
    config = GenerationConfig(**{**options, **OPTIONS[name]}, pad_token_id=EOS)
    completions = sample(SamplingSettings.from_generation_config(config))
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    for prompt, completion in zip(prompts, completions, strict=True):
        drawn = iter(completion.ids)
        monkeypatch.setattr(
            torch, "multinomial", lambda *_, drawn=drawn, **__: torch.tensor([[next(drawn)]])
        )
        output: Any = build_small_model().generate(
            torch.tensor([prompt]),
            generation_config=config,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert output.sequences[0, len(prompt) :].tolist() == completion.ids
        ids_T1 = torch.tensor(completion.ids)[:, None]
        temperature = (config.temperature or 1.0) if config.do_sample else 1.0
        for logits, actual in (
            (torch.cat(output.scores), completion.sampling_logprobs),
            (torch.cat(output.logits) / temperature, completion.policy_logprobs),
        ):
            expected = logits.log_softmax(dim=-1).gather(1, ids_T1)[:, 0]
            torch.testing.assert_close(torch.tensor(actual), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"nothing", "renormalize_logits"}))
def test_each_option_changes_what_is_drawn(name: str) -> None:
    plain = {"max_new_tokens": 8, "eos_token_id": EOS}
    without = sample(SamplingSettings.from_values(plain))
    assert sample(SamplingSettings.from_values({**plain, **OPTIONS[name]})) != without


def test_history_is_read_only_by_what_looks_at_the_tokens_so_far() -> None:
    def reads(**options: Any) -> bool:
        return SamplingSettings(max_new_tokens=1, **options).reads_history

    assert not reads(top_k=3, min_p=0.1, suppress_tokens=[1], bad_words_ids=[[1], [2]])
    assert not reads(sequence_bias=[[[1], 2.0]], min_new_tokens=3, stop_ids=frozenset([0]))
    assert reads(repetition_penalty=1.1)
    assert reads(no_repeat_ngram_size=1)
    assert reads(bad_words_ids=[[1], [2, 3]])
    assert reads(sequence_bias=[[[1, 2], 2.0]])
    assert reads(sequence_bias={(1, 2): 2.0})


def test_settings_take_the_models_defaults_for_what_the_config_leaves_open() -> None:
    defaults = GenerationConfig(top_k=7, min_p=0.2, repetition_penalty=1.1, max_length=99)
    config = GenerationConfig(max_new_tokens=5, top_k=0, do_sample=True, eos_token_id=[4, 5])
    settings = SamplingSettings.from_generation_config(config, defaults=defaults)
    assert settings == SamplingSettings(
        max_new_tokens=5,
        top_k=0,
        min_p=0.2,
        repetition_penalty=1.1,
        stop_ids=frozenset([4, 5]),
    )


def test_settings_refuse_what_the_models_defaults_ask_for_and_is_not_honoured() -> None:
    config = GenerationConfig(max_new_tokens=5)
    with pytest.raises(ValueError, match="`guidance_scale`") as caught:
        SamplingSettings.from_generation_config(
            config, defaults=GenerationConfig(guidance_scale=1.5)
        )
    assert "Remove them from `generation_kwargs`" in str(caught.value)


def test_unsupported_keys_are_named_in_their_order_and_what_is_off_is_not() -> None:
    assert unsupported_generation_keys(
        {
            "stop_strings": ["x"],
            "num_beams": 2,
            "top_k": 5,
            "topk": None,
            "constraints": [1],
            "guidance_scale": 2.0,
            "watermarking_config": {"bias": 1.0},
            "prompt_lookup_num_tokens": 3,
            "use_cache": False,
            "cache_implementation": "static",
            "max_time": 3.0,
            "forced_eos_token_id": 3,
            "min_length": 3,
            "stop_ids": [1],
        }
    ) == [
        "stop_strings",
        "num_beams",
        "topk",
        "constraints",
        "guidance_scale",
        "watermarking_config",
        "prompt_lookup_num_tokens",
        "use_cache",
        "cache_implementation",
        "max_time",
        "forced_eos_token_id",
        "min_length",
        "stop_ids",
    ]
    off = {"stop_strings": None, "num_beams": 1, "guidance_scale": 1.0, "use_cache": True}
    off |= {"cache_implementation": "dynamic", "output_scores": False, "pad_token_id": 3}
    assert unsupported_generation_keys(off) == []


def test_no_option_of_generate_is_refused_at_the_value_that_generate_takes_by_default() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    assert unsupported_generation_keys({**vars(GenerationConfig()), **defaults, "_x": 1}) == [
        name for name in vars(GenerationConfig()) if name.startswith("_")
    ] + ["_x"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0; it must be at least 1"),
        ({"temperature": -1.0}, "`temperature` is -1.0; it must be at least 0"),
        ({"top_p": 0.0}, "`top_p`=0.0 must be in (0, 1]"),
        ({"min_p": 1.5}, "`min_p`"),
        ({"typical_p": -0.1}, "`typical_p`"),
        ({"repetition_penalty": -1.0}, "`penalty`"),
        ({"bad_words_ids": [3]}, "`bad_words_ids`"),
    ],
)
def test_settings_refuse_values_out_of_their_range_before_anything_is_computed(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="`") as caught:
        SamplingSettings(**{"max_new_tokens": 1, **options})
    assert message in str(caught.value)


def test_settings_from_values_need_a_limit() -> None:
    with pytest.raises(ValueError, match="`max_new_tokens` is not given"):
        SamplingSettings.from_values({"max_new_tokens": None})
