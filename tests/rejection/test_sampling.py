"""Candidates are those of the group sampler, scored as in training, with what shows in no text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_grpo_ext.errors import RewardOutageError
from trl_grpo_ext.rejection.options import RejectionArguments
from trl_grpo_ext.rejection.provenance import prompt_ids
from trl_grpo_ext.rejection.sampling import (
    Sampler,
    group_draw,
    leaked_tokens,
    make_sampler,
)
from trl_grpo_ext.sampling import GroupSamples, group_sample

ROWS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"{n} + 1 ="}], "answer": str(n)} for n in range(4)]
)
SIZE = 3


def options(**changes: Any) -> RejectionArguments:
    given = {"output_dir": "out", "num_generations": SIZE, "max_completion_length": 5, "seed": 7}
    return RejectionArguments(**given | changes)


def sampler_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rewards: list[Any],
    **changes: Any,
) -> Sampler:
    given = options(**changes)
    draw = group_draw(model, tokenizer, options=given)
    return make_sampler(draw, tokenizer, ROWS, rewards=rewards, options=given)


def rank(*, completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """The gold answer as a score, so that it shows which row a reward was called with."""
    return [float(text) for text in answer]


async def length(
    *, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Any], **_: Any
) -> list[float]:
    assert all(one[0]["role"] == "assistant" for one in completions)
    assert all(one[-1]["content"].endswith("+ 1 =") for one in prompts)
    return [float(len(ids)) for ids in completion_ids]


class Service:
    """A reward that leaves some out, as one of a service does."""

    on_missing = "exclude"
    __name__ = "service"
    failure = "503"

    def __init__(self, num_missing: int) -> None:
        self.num_missing = num_missing

    def __call__(self, *, completions: Sequence[Any], **_: Any) -> list[float | None]:
        return [None if at < self.num_missing else 1.0 for at in range(len(completions))]


def test_candidates_are_those_of_the_group_sampler_by_the_number_of_the_prompt(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    sample = sampler_of(tiny_model, tiny_tokenizer, [rank, length])
    expected = group_sample(
        tiny_model,
        tiny_tokenizer,
        ROWS["prompt"],
        num_generations=SIZE,
        max_new_tokens=5,
        seed=7,
    )
    groups = sample([3, 1])
    assert [one.prompt_index for one in groups] == [3, 1]
    for one in groups:
        index = one.prompt_index
        places = range(index * SIZE, (index + 1) * SIZE)
        assert one.prompt == ROWS[index]["prompt"]
        assert one.prompt_id == prompt_ids(ROWS)[index]
        assert one.answer == str(index)
        assert [found.index for found in one.candidates] == [0, 1, 2]
        assert [found.text for found in one.candidates] == [expected.completions[p] for p in places]
        for place, found in zip(places, one.candidates, strict=True):
            tokens = expected.completion_ids[place]
            assert found.num_tokens == len(tokens)
            assert found.finished == (expected.finish_reasons[place] == "stop")
            assert found.scores == {"rank": float(index), "length": float(len(tokens))}
            assert found.scored


def test_special_tokens_within_a_reply_are_leaks_and_the_last_one_is_none(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    bos, eos, pad, seven = tiny_tokenizer.convert_tokens_to_ids(
        ["<|im_start|>", "<|im_end|>", "<pad>", "7"]
    )
    rows = [[seven, eos], [bos, seven, eos], [seven, pad, bos], [bos] * 20 + [eos]]
    stops: list[Any] = ["stop", "stop", "length", "stop"]
    samples = GroupSamples([], [], rows, [], [], [], stops, 1)
    assert leaked_tokens(samples, tiny_tokenizer) == [
        (),
        ("<|im_start|>",),
        ("<pad>", "<|im_start|>"),
        ("<|im_start|>",) * 8,
    ]


def test_outage_ends_the_run_and_a_few_missing_scores_do_not(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    def sampler(num_missing: int) -> Any:
        rewards: list[Any] = [rank, Service(num_missing)]
        return sampler_of(tiny_model, tiny_tokenizer, rewards, max_unscored_fraction=0.34)

    (found,) = sampler(1)([0])
    assert [one.scored for one in found.candidates] == [False, True, True]
    with pytest.raises(RewardOutageError, match=r"'service' has no score for 2 of 3 .*\(503\)"):
        sampler(2)([0])


def test_rows_that_a_reward_does_not_apply_to_are_left_to_the_others(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    service = Service(3)
    service.applies = lambda row: False  # type: ignore[attr-defined]
    rewards: list[Any] = [rank, service]
    (found,) = sampler_of(tiny_model, tiny_tokenizer, rewards)([0])
    assert [one.scored for one in found.candidates] == [True, True, True]
