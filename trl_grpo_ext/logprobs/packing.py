"""Groups of completions in one row without padding: the prompt once, then its completions.

For a prompt ``p[0..S-1]`` with completions ``c_1 .. c_G`` the row is ``p``, then for each
completion the segment ``c_i[0..n_i-2]``. Positions in ``p`` count from 0, in each segment from
``S``. A token of a segment sees the prompt and what comes before it in its own segment. The last
token of the prompt predicts the first token of every completion, each token of a segment the next
one of its completion. So nothing is padding, and the prompt is computed once.

Shapes: ``B`` completions, ``W`` columns of the padded batch, ``T`` of them for completions, ``N``
tokens of the packed row, ``L`` completion tokens in all, ``H`` heads, ``D`` width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trl_grpo_ext.attention import causal_attention, shared_prefix_inputs


@dataclass(frozen=True)
class PackedGroup:
    """Where one prompt and its completions lie in the row.

    Attributes:
        start: Of the prompt.
        prompt_length: Tokens of the prompt, at least 1.
        segment_lengths: Tokens of each segment; segments follow the prompt, one after the other.
    """

    start: int
    prompt_length: int
    segment_lengths: list[int]

    @property
    def end(self) -> int:
        """Where the group ends in the row."""
        return self.start + self.prompt_length + sum(self.segment_lengths)


class Attended:
    """A count that stays one when a wrapper (FSDP) copies the dataclass that holds it."""

    def __init__(self) -> None:
        self.count = 0


@dataclass(frozen=True)
class PackedGroups:
    """One row of groups, with the attention that it needs.

    Attributes:
        input_ids_1N: The tokens.
        position_ids_1N: Their positions.
        groups: Where each group lies.
        scored_L: For each completion token, the place in the row that predicts it.
        labels_1L: Those completion tokens.
        rows_L: Their row in the padded batch ``(B, T)``.
        columns_L: Their column.
        shape: ``(B, T)``.
        attended: How often the attention of a layer was computed here.
    """

    input_ids_1N: Tensor
    position_ids_1N: Tensor
    groups: Sequence[PackedGroup]
    scored_L: Tensor
    labels_1L: Tensor
    rows_L: Tensor
    columns_L: Tensor
    shape: tuple[int, int]
    attended: Attended = field(default_factory=Attended, compare=False)

    @property
    def num_tokens(self) -> int:
        """``N``."""
        return self.input_ids_1N.shape[1]

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments of a forward pass; its output holds the places of ``scored_L`` only."""
        return shared_prefix_inputs(self.input_ids_1N, self.position_ids_1N, self)

    def unpack(self, values_1L: Tensor) -> Tensor:
        """Return values of the completion tokens as ``(B, T)``, 0 elsewhere; keeps gradients."""
        empty_BT = values_1L.new_zeros(self.shape)
        return empty_BT.index_put((self.rows_L, self.columns_L), values_1L[0])

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None
    ) -> Tensor:
        """Return the attention of the row, ``(1, N, H, D)``; see :class:`SharedAttention`."""
        self.attended.count += 1
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        attended = [
            part
            for group in self.groups
            for part in _attend_group(
                group, *(x[group.start : group.end] for x in (query, key, value)), scaling=scaling
            )
        ]
        return torch.cat(attended).unsqueeze(0)


def _attend_group(
    group: PackedGroup, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None
) -> list[Tensor]:
    """Attention of the prompt's tokens and of the segments', each ``(tokens, H, D)``."""
    sizes = [group.prompt_length, sum(group.segment_lengths)]
    (q_prompt, q), (k_prompt, k), (v_prompt, v) = (
        torch.split(x, sizes) for x in (query, key, value)
    )
    prompt = causal_attention(q_prompt[None], k_prompt[None], v_prompt[None], scaling=scaling)[0]
    if not sizes[1]:
        return [prompt]
    lengths = [length for length in group.segment_lengths if length]
    q, k, v = (_rows(x, lengths) for x in (q, k, v))
    k, v = (
        torch.cat([shared.expand(len(lengths), *shared.shape), own], dim=1)
        for shared, own in ((k_prompt, k), (v_prompt, v))
    )
    segments = causal_attention(q, k, v, scaling=scaling)
    return [prompt, _joined(segments, lengths)]


def _rows(values: Tensor, lengths: list[int]) -> Tensor:
    """``(sum(lengths), ...)`` as one row a length; the padding on the right is seen by no one."""
    if len(set(lengths)) == 1:
        return values.view(len(lengths), lengths[0], *values.shape[1:])
    return torch.nn.utils.rnn.pad_sequence(list(torch.split(values, lengths)), batch_first=True)


def _joined(rows: Tensor, lengths: list[int]) -> Tensor:
    """Undo :func:`_rows`."""
    if len(set(lengths)) == 1:
        return rows.flatten(0, 1)
    return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])


def pack_groups(
    input_ids_BW: Tensor, attention_mask_BW: Tensor, *, num_labels: int
) -> PackedGroups:
    """Return the groups of a padded batch in one row; rows with the same prompt are one group.

    Args:
        input_ids_BW: Shape ``(B, W)``: prompts, padded on the left, then completions, padded on
            the right.
        attention_mask_BW: 1 on their tokens.
        num_labels: ``T``, columns of the completions. A completion may be empty.

    Returns:
        The groups, in the order in which their prompts first come.

    Raises:
        ValueError: a prompt is empty, so that nothing predicts its completions' first tokens.
    """
    width = input_ids_BW.shape[1] - num_labels
    ids, mask = input_ids_BW.tolist(), attention_mask_BW.tolist()
    members: dict[tuple[int, ...], list[int]] = {}
    for row, (tokens, seen) in enumerate(zip(ids, mask, strict=True)):
        prompt = tuple(t for t, s in zip(tokens[:width], seen[:width], strict=True) if s)
        members.setdefault(prompt, []).append(row)
    if () in members:
        raise ValueError(
            f"row {members[()][0]} has an empty prompt, so that nothing predicts its first token. "
            "Start the prompt with the tokenizer's `bos_token`, or leave the row out."
        )
    completions = [
        [t for t, s in zip(tokens[width:], seen[width:], strict=True) if s]
        for tokens, seen in zip(ids, mask, strict=True)
    ]
    return _packed(
        list(members.items()), completions, num_labels=num_labels, device=input_ids_BW.device
    )


def _packed(
    members: list[tuple[tuple[int, ...], list[int]]],
    completions: list[list[int]],
    *,
    num_labels: int,
    device: torch.device,
) -> PackedGroups:
    tokens: list[int] = []
    positions: list[int] = []
    groups = []
    scored: list[int] = []
    labels: list[int] = []
    rows: list[int] = []
    columns: list[int] = []
    for prompt, members_rows in members:
        start, prompt_length = len(tokens), len(prompt)
        tokens += prompt
        positions += range(prompt_length)
        lengths = []
        for row in members_rows:
            completion = completions[row]
            if completion:
                here = len(tokens)
                scored += [start + prompt_length - 1, *range(here, here + len(completion) - 1)]
                labels += completion
                rows += [row] * len(completion)
                columns += range(len(completion))
                tokens += completion[:-1]
                positions += range(prompt_length, prompt_length + len(completion) - 1)
            lengths.append(max(len(completion) - 1, 0))
        groups.append(PackedGroup(start, prompt_length, lengths))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return PackedGroups(
        input_ids_1N=tensor(tokens)[None],
        position_ids_1N=tensor(positions)[None],
        groups=groups,
        scored_L=tensor(scored),
        labels_1L=tensor(labels)[None],
        rows_L=tensor(rows),
        columns_L=tensor(columns),
        shape=(len(completions), num_labels),
    )
