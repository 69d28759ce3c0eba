"""vLLM is asked for what our sampler is asked for: a stand-in, and on a GPU the real one.

The stand-in takes the names that the real one takes, and samples with transformers.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rejection.options import RejectionArguments
from trl_grpo_ext.rejection.sampling import Draw, make_sampler
from trl_grpo_ext.rejection.vllm_sampling import (
    load_engine,
    prompt_seed,
    refused_values,
    request_arguments,
    unknown_names,
    vllm_draw,
)
from trl_grpo_ext.sampling import GroupSamples, group_sample

PROMPTS: list[Any] = [[{"role": "user", "content": f"{n} + 1 ="}] for n in range(4)]
SIZE = 3


def options(**changes: Any) -> RejectionArguments:
    plain = {"output_dir": "out", "num_generations": SIZE, "max_completion_length": 6, "seed": 7}
    return RejectionArguments(**plain | changes)


def engine_of(folder: Path, **changes: Any) -> Any:
    state: Any = SimpleNamespace(process_index=2, local_process_index=1, num_processes=4)
    model = ModelConfig(dtype="float32", model_revision="main")
    return load_engine(str(folder), model=model, options=options(**changes), state=state)


@pytest.fixture
def draw(vllm: ModuleType, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return a draw by the stand-in, of a run with other options."""

    def made(**changes: Any) -> Draw:
        engine = engine_of(tiny_model_dir, **changes)
        return vllm_draw(engine, tiny_tokenizer, options=options(**changes))

    return made


def test_prompts_have_the_tokens_that_our_sampler_gives_them(
    draw: Any, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    template = "{{ messages[0]['content'] }}{% if polite %} Please!{% endif %}"
    arguments: dict[str, object] = {"chat_template": template, "polite": True}
    for kwargs in ({}, arguments):
        samples = draw(chat_template_kwargs=kwargs)([*PROMPTS[:2], "7"], [0, 1, 2])
        expected = group_sample(
            tiny_model,
            tiny_tokenizer,
            [*PROMPTS[:2], "7"],
            num_generations=SIZE,
            max_new_tokens=1,
            chat_template_kwargs=kwargs,
        )
        assert samples.prompt_ids == expected.prompt_ids
        assert samples.prompts == expected.prompts


def test_likeliest_replies_are_those_of_our_sampler(
    draw: Any, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    samples = draw(top_k=1)(PROMPTS, [0, 1, 2, 3])
    expected = group_sample(
        tiny_model, tiny_tokenizer, PROMPTS, num_generations=SIZE, max_new_tokens=6, top_k=1
    )
    for name in ("completion_ids", "completions", "finish_reasons", "group_size"):
        assert getattr(samples, name) == getattr(expected, name)


def test_replies_to_a_prompt_depend_on_its_number_and_the_seed_alone(draw: Any) -> None:
    def tokens(samples: GroupSamples, place: int) -> list[list[int]]:
        return samples.completion_ids[place * SIZE : (place + 1) * SIZE]

    both = draw()([PROMPTS[3], PROMPTS[1]], [3, 1])
    assert tokens(both, 1) == tokens(draw()([PROMPTS[1]], [1]), 0)
    assert tokens(both, 1) != tokens(draw()([PROMPTS[1]], [2]), 0)
    assert tokens(both, 1) != tokens(draw(seed=8)([PROMPTS[1]], [1]), 0)
    assert len(set(map(tuple, tokens(both, 1)))) == SIZE


def test_reply_that_ends_by_itself_is_finished_and_holds_its_end(
    draw: Any, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    samples = draw(max_completion_length=200)(PROMPTS, [0, 1, 2, 3])
    assert set(samples.finish_reasons) == {"stop", "length"}
    for ids, text, reason in zip(
        samples.completion_ids, samples.completions, samples.finish_reasons, strict=True
    ):
        assert (ids[-1] == tiny_tokenizer.eos_token_id) == (reason == "stop")
        assert text == tiny_tokenizer.decode(ids, skip_special_tokens=True)
        assert len(ids) == 200 or reason == "stop"


def test_candidates_are_scored_as_with_our_sampler(
    draw: Any, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    def length(*, completion_ids: Any, answer: Any, **_: Any) -> list[float]:
        return [len(ids) + float(text) for ids, text in zip(completion_ids, answer, strict=True)]

    rows = Dataset.from_dict({"prompt": PROMPTS, "answer": ["100", "200", "300", "400"]})
    sample = make_sampler(draw(), tiny_tokenizer, rows, rewards=[length], options=options())
    expected = draw()([PROMPTS[2]], [2])
    (_, found) = sample([1, 2])
    assert [one.text for one in found.candidates] == expected.completions
    for one, ids, reason in zip(
        found.candidates, expected.completion_ids, expected.finish_reasons, strict=True
    ):
        assert (one.num_tokens, one.finished) == (len(ids), reason == "stop")
        assert one.scores == {"length": 300.0 + len(ids)}


def test_requests_hold_the_options_of_the_run(vllm: ModuleType) -> None:
    asked = request_arguments(
        options(temperature=0.7, top_p=0.9, top_k=5, generation_kwargs={"min_p": 0.2})
    )
    params = vllm.SamplingParams(**asked)
    found = {name: getattr(params, name) for name in ("n", "temperature", "top_p", "top_k")}
    assert found == {"n": SIZE, "temperature": 0.7, "top_p": 0.9, "top_k": 5}
    assert (params.max_tokens, params.min_p) == (6, 0.2)


def test_engine_holds_the_options_of_the_run(vllm: ModuleType, tiny_model_dir: Path) -> None:
    changes = {"vllm_gpu_memory_utilization": 0.4, "vllm_max_model_length": 99}
    found = engine_of(tiny_model_dir, **changes, vllm_tensor_parallel_size=2).arguments
    assert found["model"] == str(tiny_model_dir)
    assert (found["dtype"], found["revision"]) == ("float32", "main")
    assert (found["gpu_memory_utilization"], found["max_model_len"]) == (0.4, 99)
    assert found["tensor_parallel_size"] == 2
    assert found["distributed_executor_backend"] is None


def test_engine_joins_processes_that_were_launched_together(
    vllm: ModuleType, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    for name in names:
        monkeypatch.setenv(name, "?")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        found = engine_of(tiny_model_dir).arguments
    finally:
        torch.distributed.destroy_process_group()
    assert found["distributed_executor_backend"] == "external_launcher"
    assert [os.environ[name] for name in names] == ["2", "1", "4"]


def test_reply_ends_where_the_engine_holds_no_more(draw: Any) -> None:
    num_tokens = len(draw()(PROMPTS[:1], [0]).prompt_ids[0])
    samples = draw(vllm_max_model_length=num_tokens + 2)(PROMPTS[:1], [0])
    assert max(map(len, samples.completion_ids)) == 2
    with pytest.raises(ConfigurationError, match=r"prompt 5 has .* Raise `vllm_max_model_length`"):
        draw(vllm_max_model_length=num_tokens)(PROMPTS[:1], [5])


def test_reply_that_vllm_gave_up_is_no_reply(
    vllm: ModuleType, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    reply = SimpleNamespace(token_ids=[4], finish_reason="abort")
    engine = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=99),
        generate=lambda *_, **__: [SimpleNamespace(outputs=[reply])],
    )
    draw = vllm_draw(engine, tiny_tokenizer, options=options(num_generations=1))
    with pytest.raises(RuntimeError, match="reason 'abort'"):
        draw(PROMPTS[:1], [0])


@pytest.mark.parametrize(
    "name", ["num_beams", "n", "seed", "stop", "detokenize", "_eos_token_id", "structured_outputs"]
)
def test_options_that_requests_do_not_have_or_that_are_ours_are_named(
    vllm: ModuleType, name: str
) -> None:
    assert unknown_names(["min_p", name, "bad_words"]) == [name]


def test_what_requests_refuse_is_told(vllm: ModuleType) -> None:
    assert refused_values(options()) is None
    assert "must be in [0, 2]" in str(refused_values(options(temperature=2.5)))


@given(st.integers(), st.integers(0, 10**6), st.integers(0, 10**6))
def test_seeds_of_two_prompts_lie_far_apart(seed: int, one: int, other: int) -> None:
    a, b = prompt_seed(seed, one), prompt_seed(seed, other)
    assert 0 <= a < 2**62
    assert one == other or abs(a - b) > 10**6


@pytest.mark.gpu
def test_the_real_vllm_samples(
    tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    pytest.importorskip("vllm")
    given_options = options(vllm_gpu_memory_utilization=0.2, vllm_max_model_length=64)
    engine = load_engine(
        str(tiny_model_dir),
        model=ModelConfig(dtype="bfloat16"),
        options=given_options,
        state=PartialState(),
    )
    draw = vllm_draw(engine, tiny_tokenizer, options=given_options)
    samples = draw(PROMPTS, [0, 1, 2, 3])
    assert samples.completion_ids == draw(PROMPTS, [0, 1, 2, 3]).completion_ids
    assert len(set(map(tuple, samples.completion_ids))) > len(PROMPTS)
    for ids, reason in zip(samples.completion_ids, samples.finish_reasons, strict=True):
        assert (ids[-1] == tiny_tokenizer.eos_token_id) == (reason == "stop")
        assert len(ids) == 6 or reason == "stop"
