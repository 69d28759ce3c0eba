"""Batches of completions: their layout, and logits that do not depend on the padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel
from trl.trainer.utils import pad

from trl_grpo_ext.reference import build_reference, calibrate, measure_fidelity
from trl_grpo_ext.reference.completions import (
    CompletionBatch,
    completion_batches,
    completion_logits,
)

PROMPTS = [[5], [6, 7, 8], [9, 10]]
COMPLETIONS = [[11, 12, 13, 14], [15], [16, 17]]

Lists = st.lists(
    st.tuples(
        st.lists(st.integers(1, 50), min_size=1, max_size=6),
        st.lists(st.integers(1, 50), max_size=6),
    ),
    max_size=12,
)


def rows(batches: list[CompletionBatch]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompts and completions as they stand in the batches, without padding."""
    found = []
    for batch in batches:
        before = batch.input_ids_BW.shape[1] - batch.num_labels
        for ids_W, mask_W in zip(batch.input_ids_BW, batch.attention_mask_BW, strict=True):
            sides = zip(
                ids_W.split([before, batch.num_labels]),
                mask_W.split([before, batch.num_labels]),
                strict=True,
            )
            prompt, completion = (tuple(ids[mask.bool()].tolist()) for ids, mask in sides)
            found.append((prompt, completion))
    return found


def tiny_gpt2() -> PreTrainedModel:
    """A model with learned positions, so that a wrong position shows."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config).eval()


# Layout -------------------------------------------------------------------------------------------


def test_rows_are_padded_as_trl_pads_them() -> None:
    (batch,) = completion_batches(PROMPTS, COMPLETIONS, max_tokens=1000)
    order = [1, 2, 0]  # the shortest completion first
    sides = [(PROMPTS, "left"), (COMPLETIONS, "right")]
    ids = [pad([torch.tensor(x[i]) for i in order], padding_side=side) for x, side in sides]
    masks = [
        pad([torch.ones(len(x[i]), dtype=torch.long) for i in order], padding_side=side)
        for x, side in sides
    ]
    assert torch.equal(batch.input_ids_BW, torch.cat(ids, dim=1))
    assert torch.equal(batch.attention_mask_BW, torch.cat(masks, dim=1))


def test_a_batch_by_hand() -> None:
    (batch,) = completion_batches(PROMPTS, COMPLETIONS, max_tokens=1000)
    assert batch.input_ids_BW.tolist() == [
        [6, 7, 8, 15, 0, 0, 0],
        [0, 9, 10, 16, 17, 0, 0],
        [0, 0, 5, 11, 12, 13, 14],
    ]
    assert batch.inputs["position_ids"].tolist() == [
        [0, 1, 2, 3, 3, 3, 3],
        [0, 0, 1, 2, 3, 3, 3],
        [0, 0, 0, 1, 2, 3, 4],
    ]
    assert torch.equal(batch.inputs["attention_mask"], batch.attention_mask_BW)
    assert batch.num_labels == 4
    assert batch.labels_BT.tolist() == [[15, 0, 0, 0], [16, 17, 0, 0], [11, 12, 13, 14]]
    assert batch.mask_BT.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.num_completion_tokens == 7


def test_completions_of_like_length_are_together() -> None:
    completions = [[1] * length for length in (5, 1, 4, 2)]
    batches = completion_batches([[9]] * 4, completions, max_tokens=12)
    # Rows of 1 + 5 and 1 + 4, two of each fit into 12; 1 + 2 twice takes 6, with a third 15.
    assert [len(done) for _, done in rows(batches)] == [1, 2, 4, 5]
    assert [len(batch.input_ids_BW) for batch in batches] == [2, 2]


def test_a_row_longer_than_a_batch_is_a_batch_of_its_own() -> None:
    batches = completion_batches([[1] * 8, [2]], [[3] * 8, [4]], max_tokens=4)
    assert [batch.input_ids_BW.shape for batch in batches] == [(1, 2), (1, 16)]


def test_empty_completions_are_left_out() -> None:
    (batch,) = completion_batches([[1], [2]], [[], [3]], max_tokens=100)
    assert batch.input_ids_BW.tolist() == [[2, 3]]
    assert completion_batches([[1]], [[]], max_tokens=100) == []
    assert completion_batches([], [], max_tokens=100) == []


def test_a_completion_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        completion_batches([[1], [2]], [[3]], max_tokens=100)


@given(pairs=Lists, max_tokens=st.integers(1, 60))
def test_batches_hold_every_completion_once_and_no_more_tokens_than_allowed(
    pairs: list[tuple[list[int], list[int]]], max_tokens: int
) -> None:
    batches = completion_batches(
        [prompt for prompt, _ in pairs], [done for _, done in pairs], max_tokens=max_tokens
    )
    expected = [(tuple(prompt), tuple(done)) for prompt, done in pairs if done]
    assert sorted(rows(batches)) == sorted(expected)
    for batch in batches:
        assert batch.input_ids_BW.numel() <= max_tokens or len(batch.input_ids_BW) == 1
        assert batch.mask_BT.sum(dim=1).min() >= 1
        assert not batch.input_ids_BW[batch.attention_mask_BW == 0].any()


def test_batches_are_where_they_were_asked_for() -> None:
    (batch,) = completion_batches(PROMPTS, COMPLETIONS, max_tokens=100, device="meta")
    assert batch.input_ids_BW.device == batch.attention_mask_BW.device == torch.device("meta")


# Logits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["llama", "gpt2"])
def test_logits_are_those_of_each_completion_alone(make: str, tiny_model: LlamaForCausalLM) -> None:
    model = tiny_model if make == "llama" else tiny_gpt2()
    (batch,) = completion_batches(PROMPTS, COMPLETIONS, max_tokens=1000)
    with torch.no_grad():
        found = completion_logits(model, batch)
        assert found.shape[:2] == batch.labels_BT.shape
        for row, (prompt, completion) in enumerate(rows([batch])):
            whole: Tensor = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
            expected = whole[len(prompt) - 1 : -1]  # a token's logits are those before it
            torch.testing.assert_close(
                found[row, : len(completion)], expected, rtol=1e-4, atol=1e-4
            )


def test_logits_are_in_the_dtype_of_the_model(tiny_model: LlamaForCausalLM) -> None:
    (batch,) = completion_batches(PROMPTS, COMPLETIONS, max_tokens=1000)
    assert completion_logits(tiny_model.bfloat16(), batch).dtype == torch.bfloat16


def test_nothing_to_calibrate_or_measure_on_is_an_error(tiny_model: LlamaForCausalLM) -> None:
    reference = build_reference(tiny_model)
    empty = CompletionBatch(torch.zeros(1, 3, dtype=int), torch.zeros(1, 3, dtype=int), 2)
    for batches in ([], [empty]):
        with pytest.raises(ValueError, match="`batches` has no completion token"):
            calibrate(reference, tiny_model, batches)
        with pytest.raises(ValueError, match="`batches` has no completion token"):
            measure_fidelity(tiny_model, reference, batches)
