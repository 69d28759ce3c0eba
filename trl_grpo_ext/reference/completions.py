"""Completions of the policy on which a reference is calibrated and measured.

Shapes: ``B`` completions, ``W`` tokens of a padded row, ``T`` of a completion, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class CompletionBatch:
    """Prompts, padded on the left, then completions, padded on the right, as in TRL.

    Padding holds the token 0, which no token attends to.

    Attributes:
        input_ids_BW: Token ids.
        attention_mask_BW: 1 on tokens, 0 on padding.
        num_labels: ``T``, the columns of the completions, the last ones of ``W``.
    """

    input_ids_BW: Tensor
    attention_mask_BW: Tensor
    num_labels: int

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Arguments of a forward pass; positions do not depend on the padding."""
        positions_BW = (self.attention_mask_BW.cumsum(dim=1) - 1).clamp(min=0)
        return {
            "input_ids": self.input_ids_BW,
            "attention_mask": self.attention_mask_BW,
            "position_ids": positions_BW,
        }

    @property
    def labels_BT(self) -> Tensor:
        """Tokens of the completions."""
        return self.input_ids_BW[:, -self.num_labels :]

    @property
    def mask_BT(self) -> Tensor:
        """1 on the tokens of the completions."""
        return self.attention_mask_BW[:, -self.num_labels :]

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of the completions, without padding."""
        return int(self.mask_BT.sum())


def check_not_empty(batches: Sequence[CompletionBatch]) -> None:
    """Raise a ``ValueError`` if there is no completion token in the batches."""
    if not any(batch.num_completion_tokens for batch in batches):
        raise ValueError(
            "`batches` has no completion token, so there is nothing to calibrate or measure on. "
            "Give completions of the policy, from `completion_batches`."
        )


def completion_batches(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    device: torch.device | str = "cpu",
) -> list[CompletionBatch]:
    """Return batches of completions of like length.

    Args:
        prompts: Token ids, at least one each; one prompt a completion.
        completions: Token ids; empty ones are left out.
        max_tokens: Tokens of a batch at most, padding included; a longer row is a batch of its own.
        device: Of the batches.

    Example:
        >>> batch, = completion_batches([[5], [6, 7]], [[1, 2], [3]], max_tokens=100)
        >>> batch.input_ids_BW.tolist()
        [[6, 7, 3, 0], [0, 5, 1, 2]]
    """
    rows = [(p, c) for p, c in zip(prompts, completions, strict=True) if len(c)]
    rows.sort(key=lambda row: (len(row[1]), len(row[0])))
    return [_batch(chunk, device) for chunk in _chunks(rows, max_tokens)]


def completion_logits(model: nn.Module, batch: CompletionBatch) -> Tensor:
    """Return the logits of the completion tokens, shape ``(B, T, V)``, in the model's dtype."""
    logits: Tensor = model(
        **batch.inputs, logits_to_keep=batch.num_labels + 1, use_cache=False
    ).logits
    return logits[:, -batch.num_labels - 1 : -1]


Row = tuple[Sequence[int], Sequence[int]]


def _chunks(rows: Sequence[Row], max_tokens: int) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    for row in rows:
        if chunk and (len(chunk) + 1) * sum(_widths([*chunk, row])) > max_tokens:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def _widths(rows: Sequence[Row]) -> tuple[int, int]:
    """Columns that these prompts and completions take."""
    return max(len(prompt) for prompt, _ in rows), max(len(done) for _, done in rows)


def _batch(rows: Sequence[Row], device: torch.device | str) -> CompletionBatch:
    before, after = _widths(rows)
    ids_BW = torch.zeros(len(rows), before + after, dtype=torch.long)
    mask_BW = torch.zeros_like(ids_BW)
    for row, (prompt, completion) in enumerate(rows):
        span = slice(before - len(prompt), before + len(completion))
        ids_BW[row, span] = torch.tensor([*prompt, *completion])
        mask_BW[row, span] = 1
    return CompletionBatch(ids_BW.to(device), mask_BW.to(device), after)
