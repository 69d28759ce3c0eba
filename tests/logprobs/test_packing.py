"""Groups in one row: the layout by hand, the attention against one completion at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trl_grpo_ext.logprobs import PackedGroups, pack_groups

PAD = 0


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, int]:
    """Token ids and mask of (prompt, completion) rows as TRL pads them, and the columns ``T``."""
    num_left = max(len(prompt) for prompt, _ in rows)
    num_right = max(len(completion) for _, completion in rows)
    ids = torch.full((len(rows), num_left + num_right), PAD)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        start, end = num_left - len(prompt), num_left + len(completion)
        ids[row, start:end] = torch.tensor(prompt + completion)
        mask[row, start:end] = 1
    return ids, mask, num_right


def packed(rows: list[tuple[list[int], list[int]]]) -> PackedGroups:
    ids, mask, num_labels = padded(rows)
    return pack_groups(ids, mask, num_labels=num_labels)


# Layout -------------------------------------------------------------------------------------------


def test_pack_groups_lays_out_the_prompt_once_and_then_its_completions() -> None:
    groups = packed([([5, 6, 7], [11, 12, 13]), ([5, 6, 7], [14, 15])])
    assert groups.input_ids_1N.tolist() == [[5, 6, 7, 11, 12, 14]]
    assert groups.position_ids_1N.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert groups.scored_L.tolist() == [2, 3, 4, 2, 5]
    assert groups.labels_1L.tolist() == [[11, 12, 13, 14, 15]]
    assert groups.rows_L.tolist() == [0, 0, 0, 1, 1]
    assert groups.columns_L.tolist() == [0, 1, 2, 0, 1]
    assert groups.shape == (2, 3)
    (group,) = groups.groups
    assert (group.start, group.prompt_length, group.segment_lengths) == (0, 3, [2, 1])
    assert group.end == 6


def test_pack_groups_finds_rows_of_a_group_that_are_not_neighbours() -> None:
    groups = packed([([5, 6], [11, 12]), ([8], [13, 14]), ([5, 6], [15, 16])])
    assert groups.input_ids_1N.tolist() == [[5, 6, 11, 15, 8, 13]]
    assert groups.position_ids_1N.tolist() == [[0, 1, 2, 2, 0, 1]]
    assert groups.scored_L.tolist() == [1, 2, 1, 3, 4, 5]
    assert groups.labels_1L.tolist() == [[11, 12, 15, 16, 13, 14]]
    assert groups.rows_L.tolist() == [0, 0, 2, 2, 1, 1]
    assert [group.start for group in groups.groups] == [0, 4]


def test_pack_groups_scores_one_token_from_the_prompt_alone_and_an_empty_one_not_at_all() -> None:
    groups = packed([([5, 6], [11]), ([5, 6], []), ([5, 6], [12, 13])])
    assert groups.input_ids_1N.tolist() == [[5, 6, 12]]
    assert groups.scored_L.tolist() == [1, 1, 2]
    assert groups.labels_1L.tolist() == [[11, 12, 13]]
    assert groups.rows_L.tolist() == [0, 2, 2]
    assert groups.groups[0].segment_lengths == [0, 0, 1]


def test_pack_groups_keeps_the_prompt_when_nothing_is_scored() -> None:
    ids, mask, num_labels = padded([([5, 6], [11]), ([5, 6], [12])])
    mask[:, -num_labels:] = 0
    groups = pack_groups(ids, mask, num_labels=num_labels)
    assert groups.input_ids_1N.tolist() == [[5, 6]]
    assert groups.labels_1L.shape == (1, 0)
    assert groups.labels_1L.dtype == torch.long
    assert groups.unpack(torch.zeros(1, 0)).tolist() == [[0.0], [0.0]]


def test_pack_groups_reads_the_mask_and_not_the_padding_token() -> None:
    # The padding token is also a token of prompts and completions (0 here), as with pad = eos.
    groups = packed([([PAD, 5], [11, PAD]), ([5], [PAD]), ([6, PAD, 5], [12])])
    assert groups.input_ids_1N.tolist() == [[PAD, 5, 11, 5, 6, PAD, 5]]
    assert groups.labels_1L.tolist() == [[11, PAD, PAD, 12]]
    assert len(groups.groups) == 3


tokens = st.integers(1, 3)
row = st.tuples(st.lists(tokens, min_size=1, max_size=3), st.lists(tokens, max_size=4))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=6))
def test_pack_groups_holds_each_prompt_once_and_every_completion(
    rows: list[tuple[list[int], list[int]]],
) -> None:
    groups = packed(rows)
    prompts = {tuple(prompt) for prompt, _ in rows}
    num_tokens = sum(map(len, prompts)) + sum(max(len(done) - 1, 0) for _, done in rows)
    assert groups.input_ids_1N.shape == groups.position_ids_1N.shape == (1, num_tokens)
    assert len(groups.groups) == len(prompts)
    assert groups.groups[-1].end == num_tokens
    labels_BT = groups.unpack(groups.labels_1L)
    for index, (_, completion) in enumerate(rows):
        assert labels_BT[index].tolist() == completion + [0] * (len(labels_BT[0]) - len(completion))
    # What predicts a token stands one position before it: S - 1 + its column.
    lengths = torch.tensor([len(prompt) for prompt, _ in rows])
    expected = lengths[groups.rows_L] - 1 + groups.columns_L
    assert torch.equal(groups.position_ids_1N[0, groups.scored_L], expected)


def test_unpack_puts_values_in_their_places_and_hands_gradients_back() -> None:
    groups = packed([([5], [11, 12]), ([6], [13]), ([5], [14])])
    values_1L = torch.tensor([[1.0, 2.0, 4.0, 3.0]], requires_grad=True)  # rows 0, 0, 2, 1
    unpacked_BT = groups.unpack(values_1L)
    assert unpacked_BT.tolist() == [[1.0, 2.0], [3.0, 0.0], [4.0, 0.0]]
    (unpacked_BT * torch.tensor([[1.0, 10.0], [20.0, 5.0], [30.0, 5.0]])).sum().backward()
    assert values_1L.grad is not None
    assert values_1L.grad.tolist() == [[1.0, 10.0, 30.0, 20.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpack_keeps_the_precision(dtype: torch.dtype) -> None:
    groups = packed([([5], [11, 12])])
    assert groups.unpack(torch.ones(1, 2, dtype=dtype)).dtype == dtype


# Attention ----------------------------------------------------------------------------------------


def attention_alone(
    groups: PackedGroups, query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> Tensor:
    """For each token, attention over the tokens that it may see, listed one by one; (N, H, D)."""
    output = torch.zeros(query.shape[1], query.shape[0], query.shape[2])
    heads = query.shape[0] // key.shape[0]
    for group in groups.groups:
        prompt = list(range(group.start, group.start + group.prompt_length))
        seen_by = {token: prompt[: i + 1] for i, token in enumerate(prompt)}
        here = group.start + group.prompt_length
        for length in group.segment_lengths:
            for token in range(here, here + length):
                seen_by[token] = prompt + list(range(here, token + 1))
            here += length
        for token, seen in seen_by.items():
            for h in range(query.shape[0]):
                scores = key[h // heads, seen] @ query[h, token] * scaling
                output[token, h] = scores.softmax(0) @ value[h // heads, seen]
    return output


ROWS: dict[str, list[tuple[list[int], list[int]]]] = {
    "equal lengths": [([5, 6, 7], [1, 2, 3]), ([5, 6, 7], [4, 1, 2]), ([5, 6, 7], [3, 2, 1])],
    "mixed lengths": [([5, 6, 7], [1, 2, 3, 4, 5]), ([5, 6, 7], [4, 1]), ([5, 6, 7], [3, 2, 1])],
    "empty and one token": [([5, 6], []), ([5, 6], [1]), ([5, 6], [1, 2, 3]), ([7], [1])],
    "interleaved groups": [([5, 6, 7, 8], [1, 2]), ([9], [3, 4, 5]), ([5, 6, 7, 8], [6, 7, 8])],
    "all distinct": [([5], [1, 2, 3]), ([6, 5], [1, 2]), ([7, 7, 7], [1, 2, 3, 4])],
    "prompts alone": [([5, 6, 7], [1]), ([8, 9], [])],
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_attend_lets_a_token_see_its_prompt_and_its_own_completion(
    name: str, num_kv_heads: int, scaling: float | None
) -> None:
    groups = packed(ROWS[name])
    num_tokens = groups.input_ids_1N.shape[1]
    generator = torch.Generator().manual_seed(2)

    def random(heads: int) -> Tensor:
        return torch.randn(1, heads, num_tokens, 4, generator=generator).requires_grad_()

    inputs = random(4), random(num_kv_heads), random(num_kv_heads)
    found = groups.attend(0, *inputs, scaling=scaling)
    expected = attention_alone(groups, *(x[0] for x in inputs), scaling=scaling or 0.5)[None]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    weights = torch.randn(found.shape, generator=generator)
    gradients: Any = torch.autograd.grad((found * weights).sum(), inputs)
    slow: Any = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, reference in zip(gradients, slow, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


def test_attend_lets_no_completion_see_another_and_no_prompt_see_a_completion() -> None:
    groups = packed(ROWS["mixed lengths"] + ROWS["all distinct"])
    num_tokens = groups.input_ids_1N.shape[1]
    x = torch.randn(3, 1, 2, num_tokens, 4, generator=torch.Generator().manual_seed(2))
    before = groups.attend(0, *x, scaling=None)[0]
    group = groups.groups[0]
    start = group.start + group.prompt_length + group.segment_lengths[0]
    end = start + group.segment_lengths[1]
    x[:, :, :, start:end] += 1.0  # the second completion of the first prompt
    changed = (groups.attend(0, *x, scaling=None)[0] != before).flatten(1).any(dim=1)
    assert changed.nonzero().flatten().tolist() == list(range(start, end))


def test_an_empty_prompt_is_an_error_that_names_its_row() -> None:
    ids = torch.tensor([[5, 6, 7], [1, 1, 8]])
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    with pytest.raises(ValueError, match="row 1 has an empty prompt"):
        pack_groups(ids, mask, num_labels=1)
