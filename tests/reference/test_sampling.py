"""Calibration data: enough tokens of different prompts, some of them held out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from trl_grpo_ext.reference import CompletionBatch
from trl_grpo_ext.reference.sampling import CalibrationSampler, different_prompts

PROMPTS = [f"{number} + 1 =" for number in range(10, 50)]


def rows(batches: Any) -> list[tuple[int, ...]]:
    """Tokens of each row, without padding."""
    return sorted(
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch.input_ids_BW, batch.attention_mask_BW, strict=True)
    )


def sampler(tokenizer: Any, **changes: Any) -> CalibrationSampler:
    given = {"prompts": PROMPTS, "num_tokens": 100, "max_new_tokens": 4, "seed": 1}
    return CalibrationSampler(tokenizer=tokenizer, **given | changes)


def prompts_of(batches: list[CompletionBatch], tokenizer: Any) -> set[str]:
    return {
        next(p for p in PROMPTS if tokenizer.decode(row).startswith(p)) for row in rows(batches)
    }


def test_every_fourth_prompt_is_held_out_up_to_24(tiny_model: Any, tiny_tokenizer: Any) -> None:
    data = sampler(tiny_tokenizer, num_tokens=10_000)(tiny_model)
    held_out = set(PROMPTS[3::4])
    assert len(held_out) == 10
    assert prompts_of(list(data.held_out), tiny_tokenizer) == held_out
    assert prompts_of(list(data.calibration), tiny_tokenizer) == set(PROMPTS) - held_out
    assert len(rows(data.held_out)) == 10  # one completion each


def test_sampling_ends_with_the_chunk_that_has_enough_tokens(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    # 30 prompts to calibrate on, 8 tokens each, and 1 to 4 of a completion: one round is enough.
    data = sampler(tiny_tokenizer, num_tokens=100)(tiny_model)
    assert len(rows(data.calibration)) == 30
    total = sum(len(row) for row in rows(data.calibration))
    more = sampler(tiny_tokenizer, num_tokens=total + 1)(tiny_model)
    assert len(rows(more.calibration)) == 60
    assert len(set(rows(more.calibration))) > 30  # a second round draws other completions


def test_few_prompts_are_completed_at_most_eight_times(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    data = sampler(tiny_tokenizer, prompts=PROMPTS[:2], num_tokens=10**6)(tiny_model)
    assert len(rows(data.calibration)) == 16
    assert len(rows(data.held_out)) == 2  # too few to hold one out: they serve for both


def test_no_completion_is_drawn_to_calibrate_on_where_nothing_is_calibrated(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    data = sampler(tiny_tokenizer, num_tokens=0)(tiny_model)
    assert data.calibration == []
    assert len(rows(data.held_out)) == 10


def test_draws_depend_on_the_seed_alone(tiny_model: Any, tiny_tokenizer: Any) -> None:
    before = torch.get_rng_state()
    first = sampler(tiny_tokenizer)(tiny_model)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    again = sampler(tiny_tokenizer)(tiny_model)
    assert rows(first.calibration) == rows(again.calibration)
    assert rows(first.held_out) == rows(again.held_out)
    other = sampler(tiny_tokenizer, seed=2)(tiny_model)
    assert rows(first.calibration) != rows(other.calibration)


@pytest.mark.parametrize("streams", [False, True])
def test_prompts_are_the_first_different_ones_of_a_dataset(streams: bool) -> None:
    dataset = Dataset.from_dict({"prompt": ["a", "b", "a", "c"]})
    assert different_prompts(dataset.to_iterable_dataset() if streams else dataset) == list("abc")
    long = Dataset.from_dict({"prompt": [str(number) for number in range(2000)]})
    assert different_prompts(long) == [str(number) for number in range(1024)]


def test_conversations_are_prompts_too(tiny_model: Any, tiny_tokenizer: Any) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("1 + 1", "2 + 2", "1 + 1")]
    prompts = different_prompts(Dataset.from_dict({"prompt": chats}))
    assert [chat[0]["content"] for chat in prompts] == ["1 + 1", "2 + 2"]  # type: ignore[index]
    data = sampler(tiny_tokenizer, prompts=prompts)(tiny_model)
    start = tiny_tokenizer.apply_chat_template(chats[0], add_generation_prompt=True, tokenize=False)
    assert any(tiny_tokenizer.decode(row).startswith(start) for row in rows(data.held_out))
