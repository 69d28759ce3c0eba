"""The cache of groups, token by token, against a full forward pass of each completion alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from trl_grpo_ext.attention import route_attention, shared_prefix_inputs
from trl_grpo_ext.sampling.group_cache import FixedGroupCache, GroupCache

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    route_attention(model)
    return model


def fixed_cache(lengths: list[int], **options: Any) -> FixedGroupCache:
    return FixedGroupCache(lengths, max_new_tokens=150, **options)


both_caches = pytest.mark.parametrize("cache", [GroupCache, fixed_cache], ids=["growing", "fixed"])
Cache = Callable[..., GroupCache]


class Groups:
    """Completions that grow by given tokens, as a sampler drives the cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        group_sizes: list[int],
        *,
        cache: Cache = GroupCache,
    ):
        self.model, self.prompts = model, prompts
        lengths = [len(prompt) for prompt in prompts]
        self.cache = cache(lengths, group_sizes=group_sizes, device=CPU)
        self.rows = [
            list(prompt)
            for prompt, size in zip(prompts, group_sizes, strict=True)
            for _ in range(size)
        ]

    def prefill(self) -> Tensor:
        """Return the logits after each prompt, ``(P, V)``."""
        ids = [token for prompt in self.prompts for token in prompt]
        positions = [position for prompt in self.prompts for position in range(len(prompt))]
        logits_NV = self._forward(torch.tensor([ids]), torch.tensor([positions]))[0]
        ends = torch.tensor([len(prompt) for prompt in self.prompts]).cumsum(0) - 1
        return logits_NV[ends]

    def step(self, tokens: list[int]) -> Tensor:
        """Return the logits after one more token of each completion, ``(B, V)``."""
        positions = torch.tensor([[len(row)] for row in self.rows])
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(token)
        return self._forward(torch.tensor(tokens)[:, None], positions)[:, 0]

    def keep(self, rows: list[int]) -> None:
        self.cache.keep(torch.tensor(rows))
        self.rows = [self.rows[row] for row in rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.cache.advance()
        with torch.no_grad():
            logits: Tensor = self.model(**shared_prefix_inputs(ids, positions, self.cache)).logits
        return logits

    def expected(self) -> Tensor:
        """The logits after each completion, without a cache, one at a time."""
        with torch.no_grad():
            alone = [self.model(torch.tensor([row]), use_cache=False).logits for row in self.rows]
        return torch.stack([logits[0, -1] for logits in alone])


def next_tokens(groups: Groups) -> list[int]:
    """Other tokens in each row and at each step."""
    return [(7 * index + 5 * len(row) + row[-1]) % 23 + 1 for index, row in enumerate(groups.rows)]


def assert_same(found_BV: Tensor, expected_BV: Tensor) -> None:
    torch.testing.assert_close(found_BV, expected_BV, rtol=1e-5, atol=2e-5)


def check_steps(groups: Groups, num_steps: int) -> None:
    for _ in range(num_steps):
        found_BV = groups.step(next_tokens(groups))
        assert_same(found_BV, groups.expected())


MODELS: dict[str, PreTrainedConfig] = {
    "grouped heads": LlamaConfig(**SIZES),
    "as many heads": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
    "one key-value head": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "normalized queries": Qwen3Config(**SIZES),
    "scale of its own": Gemma3TextConfig(
        **SIZES, query_pre_attn_scalar=50, layer_types=["full_attention"] * 2
    ),
}
PROMPTS = {
    "ragged": ([[1, 2, 3, 4, 5], [6], [7, 8, 9]], [2, 2, 2]),
    "equal lengths": ([[1, 2, 3], [4, 5, 6]], [3, 3]),
    "partial groups": ([[1, 2, 3, 4, 5], [6], [7, 8, 9]], [3, 1, 2]),
    "one group": ([[1, 2, 3, 4, 5]], [4]),
    "one completion": ([[1, 2, 3]], [1]),
    "groups of one": ([[1, 2, 3], [4], [5, 6]], [1, 1, 1]),
}


@both_caches
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("name", MODELS)
def test_group_cache_equals_a_full_forward_pass_at_every_step(
    name: str, prompts: str, cache: Cache
) -> None:
    groups = Groups(build(MODELS[name]), *PROMPTS[prompts], cache=cache)
    sizes = torch.tensor(PROMPTS[prompts][1])
    assert_same(groups.prefill().repeat_interleave(sizes, dim=0), groups.expected())
    check_steps(groups, 3)


KEPT: dict[str, list[list[int]]] = {  # of groups of 3, 1 and 2: rows 0 1 2, 3, 4 5
    "a row of one group": [[0, 2, 3, 4, 5]],
    "the first of a group": [[1, 2, 3, 4, 5]],
    "a whole group": [[0, 1, 2, 4, 5]],
    "the first group": [[3, 4, 5]],
    "the last group": [[0, 1, 2, 3]],
    "the longest prompt and more": [[3, 5], [1]],
    "all rows": [[0, 1, 2, 3, 4, 5]],
    "one row": [[5]],
    "row after row": [[0, 1, 3, 4, 5], [1, 2, 3, 4], [0, 2, 3], [0, 2], [1]],
}


@both_caches
@pytest.mark.parametrize("name", KEPT)
def test_group_cache_goes_on_after_completions_ended(name: str, cache: Cache) -> None:
    groups = Groups(build(MODELS["grouped heads"]), *PROMPTS["partial groups"], cache=cache)
    groups.prefill()
    check_steps(groups, 2)
    for rows in KEPT[name]:
        groups.keep(rows)
        check_steps(groups, 2)


@both_caches
def test_group_cache_forgets_rows_before_the_first_step(cache: Cache) -> None:
    groups = Groups(build(MODELS["grouped heads"]), *PROMPTS["partial groups"], cache=cache)
    groups.prefill()
    groups.keep([1, 4, 5])
    check_steps(groups, 2)


@both_caches
def test_group_cache_grows_beyond_its_blocks(cache: Cache) -> None:
    groups = Groups(build(MODELS["grouped heads"]), *PROMPTS["partial groups"], cache=cache)
    groups.prefill()
    checked = {1, 63, 64, 65, 66, 100}
    for step in range(1, 101):
        found_BV = groups.step(next_tokens(groups))
        if step in checked:
            assert_same(found_BV, groups.expected())
        if step == 80:  # grown, and then smaller
            groups.keep([0, 2, 3, 5])
            checked |= {81, 99}


@both_caches
def test_group_cache_grows_twice(cache: Cache) -> None:
    groups = Groups(build(MODELS["grouped heads"]), [[1, 2]], [2], cache=cache)
    groups.prefill()
    for _ in range(126):
        groups.step(next_tokens(groups))
    check_steps(groups, 4)  # 128 is where the second block ends


def test_group_cache_lets_no_completion_see_another() -> None:
    model = build(MODELS["grouped heads"])

    def logits_of_the_others(token: int) -> Tensor:
        groups = Groups(model, *PROMPTS["partial groups"])
        groups.prefill()
        groups.step([token, 2, 3, 4, 5, 6])
        return groups.step([7, 8, 9, 10, 11, 12])

    first, second = logits_of_the_others(1), logits_of_the_others(20)
    assert torch.equal(first[1:], second[1:])
    assert not torch.equal(first[0], second[0])


def num_bytes(prompts: list[list[int]], group_sizes: list[int], num_steps: int) -> int:
    groups = Groups(build(MODELS["grouped heads"]), prompts, group_sizes)
    groups.prefill()
    for _ in range(num_steps):
        groups.step(next_tokens(groups))
    return groups.cache.num_bytes


# Keys and values of one token: 2 layers x (key, value) x 2 heads x 8 x 4 bytes.
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4


def test_group_cache_keeps_a_prompt_once_whatever_the_size_of_its_group() -> None:
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    assert num_bytes(prompts, [1, 1], 0) == 2 * 5 * TOKEN_BYTES  # padded to the longest
    assert num_bytes(prompts, [8, 8], 0) == 2 * 5 * TOKEN_BYTES
    assert num_bytes(prompts, [8, 8], 1) == (2 * 5 + 16 * 64) * TOKEN_BYTES  # 64 at a time
    assert num_bytes(prompts, [8, 8], 64) == num_bytes(prompts, [8, 8], 1)
    assert num_bytes(prompts, [8, 8], 65) == (2 * 5 + 16 * 128) * TOKEN_BYTES


def test_group_cache_holds_nothing_before_the_prompts() -> None:
    assert GroupCache([5, 2], group_sizes=[2, 2], device=CPU).num_bytes == 0


def test_group_cache_frees_what_ended() -> None:
    groups = Groups(build(MODELS["grouped heads"]), [[1, 2, 3], [4, 5, 6]], [4, 4])
    groups.prefill()
    groups.step(next_tokens(groups))
    assert groups.cache.num_bytes == (2 * 3 + 8 * 64) * TOKEN_BYTES
    groups.keep([0, 1, 4])
    assert groups.cache.num_bytes == (2 * 3 + 3 * 64) * TOKEN_BYTES
    groups.keep([2])
    assert groups.cache.num_bytes == (1 * 3 + 1 * 64) * TOKEN_BYTES


@both_caches
def test_group_cache_is_near_float32_in_bfloat16(cache: Cache) -> None:
    model = build(MODELS["grouped heads"])
    exact = Groups(model, *PROMPTS["partial groups"])
    exact.prefill()
    tokens = next_tokens(exact)
    exact.step(tokens)
    expected_BV = exact.expected().log_softmax(-1)
    half = Groups(model.bfloat16(), *PROMPTS["partial groups"], cache=cache)
    half.prefill()
    found_BV = half.step(tokens)
    assert found_BV.dtype == torch.bfloat16
    assert (found_BV.float().log_softmax(-1) - expected_BV).abs().mean() < 0.05


def test_fixed_cache_has_no_room_beyond_the_limit() -> None:
    def cache(lengths: list[int], **options: Any) -> FixedGroupCache:
        return FixedGroupCache(lengths, max_new_tokens=70, **options)

    groups = Groups(build(MODELS["grouped heads"]), [[1, 2]], [4], cache=cache)
    groups.prefill()
    for _ in range(70):
        groups.step(next_tokens(groups))
    assert groups.cache.num_bytes == (2 + 4 * 70) * TOKEN_BYTES


def test_fixed_cache_stays_in_its_memory_until_its_version_changes() -> None:
    groups = Groups(build(MODELS["grouped heads"]), [[1, 2]], [4], cache=fixed_cache)
    groups.prefill()
    found: dict[int, set[int]] = {}
    for length in range(1, 67):
        groups.step(next_tokens(groups))
        cache: Any = groups.cache
        places = {x.data_ptr() for pair in cache._completions.values() for x in pair}
        found.setdefault(cache.version, places)
        assert found[cache.version] == places
        assert cache.version == (length > 64)
    groups.keep([0])
    assert groups.cache.version == 2


def test_group_cache_picks_the_tokens_of_greedy_generation() -> None:
    model = build(MODELS["grouped heads"])
    groups = Groups(model, [[1, 2, 3], [4, 5]], [1, 1])
    tokens = groups.prefill().argmax(-1).tolist()
    for _ in range(9):
        tokens = groups.step(tokens).argmax(-1).tolist()
    for row, last in zip(groups.rows, tokens, strict=True):
        prompt = torch.tensor([row[: len(row) - 9]])
        options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "do_sample": False}
        greedy = model.generate(prompt, max_new_tokens=10, pad_token_id=0, **options)
        assert greedy[0].tolist() == [*row, last]
