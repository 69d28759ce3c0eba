"""Continuous batching on the CPU, for real: log-probabilities, forks, errors, nothing changed."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sampling.small import EOS, build_small_model, next_token_logits, small_config
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_grpo_ext.attention import route_attention
from trl_grpo_ext.sampling.continuous_batching import (
    continuous_batching_drawback,
    continuous_batching_problem,
    sample_continuously,
    unsupported_by_continuous_batching,
)
from trl_grpo_ext.sampling.decoding import Completion
from trl_grpo_ext.sampling.settings import SamplingSettings

PROMPTS = [[1, 2, 3], [4, 5], [1, 2, 3], [3], [4, 5, 1, 2], [1, 2, 3], [3]]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return build_small_model()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def leaves_no_thread() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    assert not {thread for thread in left if thread.name != "tqdm_monitor"}  # tqdm's, for good


def settings_of(**options: Any) -> SamplingSettings:
    return SamplingSettings(
        **{"max_new_tokens": 12, "stop_ids": frozenset({EOS}), "temperature": 0.7, **options}
    )


def expected_logprobs(
    model: PreTrainedModel, prompt: list[int], row: Completion, settings: SamplingSettings
) -> tuple[Tensor, Tensor]:
    """What a forward pass of the whole row, and the warpers of the settings, say of each token."""
    scaled_TV = next_token_logits(model, prompt, row.ids) / (settings.temperature or 1.0)
    warped_TV: Any = settings.warpers(torch.device("cpu"))(torch.zeros(1, 1), scaled_TV)
    ids_T1 = torch.tensor(row.ids)[:, None]
    policy_T, sampling_T = (
        x.log_softmax(-1).gather(1, ids_T1)[:, 0] for x in (scaled_TV, warped_TV)
    )
    return policy_T, sampling_T


def check_rows(
    model: PreTrainedModel,
    prompts: list[list[int]],
    rows: list[Completion],
    settings: SamplingSettings,
) -> None:
    """Every row follows its own prompt, ends where it should, and has the right numbers."""
    assert len(rows) == len(prompts)
    for prompt, row in zip(prompts, rows, strict=True):
        policy_T, sampling_T = expected_logprobs(model, prompt, row, settings)
        torch.testing.assert_close(torch.tensor(row.sampling_logprobs), sampling_T)
        if settings.warpers(torch.device("cpu")):
            assert len(row.policy_logprobs) == len(row.ids)
            assert all(map(math.isnan, row.policy_logprobs))
        else:
            torch.testing.assert_close(torch.tensor(row.policy_logprobs), policy_T)
        assert not set(row.ids[:-1]) & settings.stop_ids
        assert row.stopped == (row.ids[-1] in settings.stop_ids)
        assert row.stopped or len(row.ids) == settings.max_new_tokens


# --- completions -----------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logprobs_are_those_of_a_forward_pass(model: LlamaForCausalLM, attention: str) -> None:
    model.set_attn_implementation(attention)
    rows = sample_continuously(model, PROMPTS, settings=settings_of())
    check_rows(model, PROMPTS, rows, settings_of())
    assert {row.stopped for row in rows} == {True, False}


@pytest.mark.parametrize(
    "option",
    [
        *({"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.7}, {"typical_p": 0.5}),
        *({"epsilon_cutoff": 0.15}, {"top_k": 4, "top_p": 0.8, "min_p": 0.1}),
    ],
)
def test_logprobs_follow_what_shaped_the_draw_and_the_policys_are_nan(
    model: LlamaForCausalLM, option: dict[str, float]
) -> None:
    settings = settings_of(**option)
    rows = sample_continuously(model, PROMPTS, settings=settings)
    check_rows(model, PROMPTS, rows, settings)
    plain = expected_logprobs(model, PROMPTS[0], rows[0], settings)[0]
    assert (torch.tensor(rows[0].sampling_logprobs) - plain).abs().max() > 1e-3  # it has an effect


def test_greedy_takes_the_likeliest_token_whatever_the_warpers(model: LlamaForCausalLM) -> None:
    settings = settings_of(temperature=0.0, top_k=2, stop_ids=frozenset(), eta_cutoff=0.3)
    rows = sample_continuously(model, PROMPTS, settings=settings)
    check_rows(model, PROMPTS, rows, settings)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row.ids == next_token_logits(model, prompt, row.ids).argmax(-1).tolist()
        assert not row.stopped


def test_completions_of_a_group_are_drawn_one_by_one_with_the_models_probabilities(
    model: LlamaForCausalLM,
) -> None:
    settings = settings_of(max_new_tokens=1, temperature=1.0)
    rows = sample_continuously(model, [[1, 2, 3]] * 1000, settings=settings)
    counts = torch.bincount(torch.tensor([row.ids[0] for row in rows]), minlength=6)
    expected = 1000 * next_token_logits(model, [1, 2, 3], [])[0].softmax(-1)
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # 5 degrees: once in a thousand


def test_equal_prompts_are_computed_once_wherever_they_stand(model: LlamaForCausalLM) -> None:
    shapes = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    prompts = [[1, 2, 3, 4, 5], [2, 2, 2], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]
    sample_continuously(model, prompts, settings=settings_of(max_new_tokens=1))
    # Behind the probe of one token, each prompt without its last token, which every fork computes.
    assert shapes[0] == 1
    assert sum(shapes[1:]) == (4 + 3) + 3


def test_a_prompt_of_one_token_has_as_many_completions_as_it_stands_there(
    model: LlamaForCausalLM,
) -> None:
    rows = sample_continuously(model, [[3]] * 4, settings=settings_of())
    check_rows(model, [[3]] * 4, rows, settings_of())


def test_long_prompts_share_their_pages_and_none_is_lost_over_many_batches() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForCausalLM(small_config(max_position_embeddings=4096)).eval()
    long = [1 + i % 5 for i in range(1000)]
    prompts = [long, long, long[:257], [*long[:256], 5], long, [*long, *long, *long], long[:257]]
    rows = sample_continuously(model, prompts, settings=settings_of(max_new_tokens=4))
    check_rows(model, prompts, rows, settings_of(max_new_tokens=4))


def test_a_sliding_window_is_obeyed() -> None:
    options = small_config(num_key_value_heads=2).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "initializer_range")
    config = MistralConfig(**{name: options[name] for name in names}, sliding_window=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = MistralForCausalLM(config).eval()
    prompts = [[1, 2, 3, 4, 5, 1, 2], [2, 3], [1, 2, 3, 4, 5, 1, 2]]
    rows = sample_continuously(model, prompts, settings=settings_of())
    check_rows(model, prompts, rows, settings_of())


def test_routed_attention_gives_the_same_completions(model: LlamaForCausalLM) -> None:
    route_attention(model)
    wrapper: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    rows = {}
    for name, function in {"plain": wrapper.__wrapped__, "routed": wrapper}.items():
        AttentionInterface.register("sdpa", function)
        torch.manual_seed(5)
        rows[name] = sample_continuously(model, PROMPTS, settings=settings_of())
    assert rows["plain"] == rows["routed"]
    check_rows(model, PROMPTS, rows["routed"], settings_of())


def test_an_adapter_takes_part(model: LlamaForCausalLM) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    adapted: Any = get_peft_model(build_small_model(), config).eval()
    rows = sample_continuously(adapted, PROMPTS, settings=settings_of())
    check_rows(adapted, PROMPTS, rows, settings_of())
    logits_TV = next_token_logits(adapted, [1, 2, 3], [])
    assert not torch.allclose(logits_TV, next_token_logits(model, [1, 2, 3], []))


def test_nothing_is_sampled_for_no_prompts(model: LlamaForCausalLM) -> None:
    assert sample_continuously(model, [], settings=settings_of()) == []


def test_on_finished_comes_once_for_each_completion_before_the_last_one_ends(
    model: LlamaForCausalLM,
) -> None:
    seen: dict[int, Completion] = {}
    forwards = [0]
    model.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    at_first: list[int] = []

    def note(index: int, row: Completion) -> None:
        assert index not in seen
        seen[index] = row
        at_first.append(forwards[0])

    rows = sample_continuously(
        model, PROMPTS, settings=settings_of(max_new_tokens=50), on_finished=note
    )
    assert seen == dict(enumerate(rows))
    assert at_first[0] < forwards[0]


def test_progress_counts_completions(
    model: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    sample_continuously(model, PROMPTS, settings=settings_of(), progress=True)
    assert "7/7" in capsys.readouterr().err


# --- nothing is changed ----------------------------------------------------------------------


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "modes": [module.training for module in model.modules()],
        "dtypes": [parameter.dtype for parameter in model.parameters()],
        "versions": [parameter._version for parameter in model.parameters()],
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "generation_config": model.generation_config.to_dict(),
        "attributes": sorted(vars(model)),
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before_also_after_an_error(
    model: LlamaForCausalLM, attention: str, fails: bool
) -> None:
    model.set_attn_implementation(attention)
    model.train()
    model.model.layers[1].eval()  # a module of its own mode
    before = state_of(model)
    if fails:
        with pytest.raises(RuntimeError, match="stopped by the caller"):
            sample_continuously(model, PROMPTS, settings=settings_of(), on_finished=stop)
    else:
        rows = sample_continuously(model, PROMPTS, settings=settings_of())
        check_rows(build_small_model(), PROMPTS, rows, settings_of())  # without dropout
    assert state_of(model) == before


def test_the_model_is_as_before_when_the_engine_cannot_be_built(model: LlamaForCausalLM) -> None:
    def broken(*args: Any) -> None:
        raise KeyError("no processors")

    model.set_attn_implementation("eager")
    model.train()
    model._get_logits_processor = broken
    before = state_of(model)
    with pytest.raises(KeyError, match="no processors"):
        sample_continuously(model, PROMPTS, settings=settings_of())
    assert state_of(model) == before


def test_an_error_of_the_caller_ends_the_sampling_at_once(model: LlamaForCausalLM) -> None:
    forwards = []

    def note(*args: Any) -> None:
        forwards.append(time.sleep(0.02))

    model.register_forward_pre_hook(note)
    prompts = [[i % 5 + 1, j % 5 + 1] for i in range(5) for j in range(10)]
    settings = settings_of(max_new_tokens=200)
    rows = sample_continuously(model, prompts, settings=settings)
    longest = max(len(row.ids) for row in rows)
    assert len(forwards) > longest > 15
    forwards.clear()
    with pytest.raises(RuntimeError, match="stopped by the caller"):
        sample_continuously(model, prompts, settings=settings, on_finished=stop)
    assert len(forwards) < 10


def num_paged_caches() -> int:
    gc.collect()
    return sum(type(thing) is PagedAttentionCache for thing in gc.get_objects())


def test_the_cache_is_freed_also_while_the_error_is_held(model: LlamaForCausalLM) -> None:
    seen = []
    sample_continuously(
        model,
        PROMPTS[:2],
        settings=settings_of(),
        on_finished=lambda *_: seen.append(num_paged_caches()),
    )
    assert seen == [1, 1]
    assert num_paged_caches() == 0
    model.lm_head = Fails(model.lm_head, calls=4)
    with pytest.raises(RuntimeError) as found:
        sample_continuously(model, PROMPTS, settings=settings_of(max_new_tokens=50))
    assert found.value.__cause__ is not None
    assert num_paged_caches() == 0


def stop(index: int, row: Completion) -> None:
    raise RuntimeError("stopped by the caller")


def test_random_numbers_of_the_caller_advance_by_one_and_decide_the_completions(
    model: LlamaForCausalLM,
) -> None:
    def sampled(seed: int) -> tuple[list[Completion], Tensor]:
        torch.manual_seed(seed)
        return sample_continuously(model, PROMPTS, settings=settings_of()), torch.rand(3)

    first, second, other = sampled(1), sampled(1), sampled(2)
    assert first[0] == second[0] != other[0]
    torch.manual_seed(1)
    torch.randint(2**62, ())
    assert torch.equal(first[1], torch.rand(3))


# --- errors ----------------------------------------------------------------------------------


class Fails(nn.Module):
    """A head that works for some calls."""

    def __init__(self, head: nn.Module, *, calls: int, nan: bool = False):
        super().__init__()
        self.head, self.calls, self.nan = head, calls, nan

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls >= 0:
            logits: Tensor = self.head(hidden)
            return logits
        if self.nan:
            return torch.full((*hidden.shape[:-1], 6), math.nan)
        raise KeyError("the head fell off")


def test_an_exception_of_the_generation_thread_reaches_the_caller(
    model: LlamaForCausalLM,
) -> None:
    head = model.lm_head
    model.lm_head = Fails(head, calls=4)
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"completion \d failed.*the head fell off") as found:
        sample_continuously(model, PROMPTS, settings=settings_of(max_new_tokens=50))
    assert isinstance(found.value.__cause__, KeyError)
    assert state_of(model) == before
    model.lm_head = head
    check_rows(
        model,
        PROMPTS,
        sample_continuously(model, PROMPTS, settings=settings_of()),
        settings_of(),
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(
    model: LlamaForCausalLM, temperature: float
) -> None:
    model.lm_head = Fails(model.lm_head, calls=2, nan=True)
    with pytest.raises(RuntimeError, match=r"completion \d failed: .*(not finite|inf|nan)"):
        sample_continuously(model, PROMPTS, settings=settings_of(temperature=temperature))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the engine measures that memory then")
@pytest.mark.parametrize("free_mib", [0, 16, 64, 128, 192, 256, 512])
def test_a_cache_that_does_not_fit_is_smaller_or_an_error(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, free_mib: int
) -> None:
    def memory() -> SimpleNamespace:
        total = psutil.Process().memory_info().rss + free_mib * 2**20
        return SimpleNamespace(total=total, available=free_mib * 2**20)

    monkeypatch.setattr(psutil, "virtual_memory", memory)
    # At 256 bytes a token, the keys and values of 7 x 20000 tokens take 34 MiB, and more comes on
    # top; half of the memory is for them.
    settings = settings_of(max_new_tokens=20000)
    if free_mib:
        rows = sample_continuously(model, PROMPTS, settings=settings)
        check_rows(model, PROMPTS, rows, settings)
    else:
        with pytest.raises(RuntimeError, match="sample fewer or shorter completions") as found:
            sample_continuously(model, PROMPTS, settings=settings)
        assert "num_sectors" in str(found.value.__cause__)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 0.1}, []),
        ({"top_h": 0.5, "eta_cutoff": 0.1}, ["top_h", "eta_cutoff"]),
        ({"top_h": 0.5, "eta_cutoff": 0.1, "temperature": 0.0}, []),
        (
            {"repetition_penalty": 1.1, "min_new_tokens": 2},
            ["repetition_penalty", "min_new_tokens"],
        ),
        (
            {"bad_words_ids": [[1]], "suppress_tokens": [2], "begin_suppress_tokens": [3]},
            ["bad_words_ids", "suppress_tokens", "begin_suppress_tokens"],
        ),
        (
            {"no_repeat_ngram_size": 2, "sequence_bias": {(1,): 2.0}},
            ["no_repeat_ngram_size", "sequence_bias"],
        ),
        ({"exponential_decay_length_penalty": (2, 1.1)}, ["exponential_decay_length_penalty"]),
    ],
)
def test_settings_that_are_not_honoured_are_named(
    model: LlamaForCausalLM, options: dict[str, Any], names: list[str]
) -> None:
    settings = settings_of(**options)
    assert unsupported_by_continuous_batching(settings) == names
    for name in names:
        with pytest.raises(ValueError, match=f"does not honour .*`{name}`"):
            sample_continuously(model, PROMPTS, settings=settings)


def test_an_empty_prompt_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"`prompts\[1\]` has no token"):
        sample_continuously(model, [[1], []], settings=settings_of())


# --- who can ---------------------------------------------------------------------------------


def test_a_small_model_can_be_sampled_in_training_mode_on_the_cpu_slowly(
    model: LlamaForCausalLM,
) -> None:
    model.train()
    model.gradient_checkpointing_enable()
    before = state_of(model)
    assert continuous_batching_problem(model) is None
    assert state_of(model) == before
    assert continuous_batching_drawback(model) == "the model is on cpu, not on CUDA"


def test_autocast_inside_the_forward_is_a_problem_and_around_the_call_is_not(
    model: LlamaForCausalLM,
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        rows = sample_continuously(model, PROMPTS, settings=settings_of())
    check_rows(model, PROMPTS, rows, settings_of())
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    problem = "its weights are float32 but it computes in bfloat16, as under autocast"
    assert continuous_batching_problem(model) == problem
    with pytest.raises(ValueError, match=problem):
        sample_continuously(model, PROMPTS, settings=settings_of())


def test_models_that_cannot_be_sampled_say_why(model: LlamaForCausalLM) -> None:
    model.set_attn_implementation("flex_attention")
    assert "attention implementation is 'flex_attention'" in str(continuous_batching_problem(model))
    gpt = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=6, n_embd=8, n_layer=1, n_head=2))
    assert continuous_batching_problem(gpt) == "it has no cache of keys and values"
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=6, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    assert "is not a decoder-only model" in str(continuous_batching_problem(t5))


def test_weights_that_are_elsewhere_are_a_problem(model: LlamaForCausalLM) -> None:
    model.model.norm.to("meta")
    assert continuous_batching_problem(model) == "its weights are on several devices"
    model.model.norm.weight = nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it
    assert continuous_batching_problem(model) == "its weights are sharded"


def test_layers_of_another_kind_are_a_problem(model: LlamaForCausalLM) -> None:
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert "(linear_attention)" in str(continuous_batching_problem(model))
