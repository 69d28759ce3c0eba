"""A key-value cache for groups: the prompt's part once a group, each completion's own beside it.

Shapes: ``P`` prompts, ``B`` completions that are still growing, ``S`` tokens of the longest prompt,
``T`` completion tokens so far, ``H`` heads, ``K`` key-value heads, ``D`` width of a head. Values
may have another width than queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from trl_grpo_ext.attention import causal_attention
from trl_grpo_ext.errors import SharedPrefixError

_BLOCK = 64  # [tokens] by which the completions' part grows


class GroupCache:
    """Computes attention for :func:`trl_grpo_ext.attention.route_attention`, and remembers.

    The first forward pass is one row with all prompts, one after the other; each later one is one
    new token of every completion. The prompts' keys and values are kept once, whatever the size of
    the group.

    Args:
        prompt_lengths: Tokens of each prompt.
        group_sizes: Completions of each, at least 1.
        device: Where the model runs.
    """

    def __init__(
        self, prompt_lengths: Sequence[int], *, group_sizes: Sequence[int], device: torch.device
    ):
        self._prompt_lengths = list(prompt_lengths)
        self._prompts: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (P, K, S, D) each
        self._completions: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (B, K, capacity, D)
        self._length = -1  # of the completions; -1 before the prompts have been seen
        lengths = torch.tensor(self._prompt_lengths, device=device)
        self._hidden_PS = torch.arange(max(prompt_lengths), device=device) >= lengths[:, None]
        self._group_of_B = torch.arange(len(lengths), device=device).repeat_interleave(
            torch.tensor(group_sizes, device=device)
        )
        self._regroup()

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        kept = [*self._prompts.values(), *self._completions.values()]
        return sum(x.numel() * x.element_size() for pair in kept for x in pair)

    def advance(self) -> None:
        """Count the token that the next forward pass brings, or the prompts'."""
        self._length += 1

    def keep(self, rows: Tensor) -> None:
        """Forget every completion but ``rows``, indices in growing order."""
        for layer, (keys, values) in self._completions.items():
            self._completions[layer] = (keys[rows], values[rows])
        self._group_of_B = self._group_of_B[rows]
        groups, self._group_of_B = torch.unique(self._group_of_B, return_inverse=True)
        if len(groups) < len(self._hidden_PS):
            self._hidden_PS = self._hidden_PS[groups]
            for layer, (keys, values) in self._prompts.items():
                self._prompts[layer] = (keys[groups], values[groups])
        self._regroup()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None
    ) -> Tensor:
        """Return the attention's output; see :class:`trl_grpo_ext.attention.SharedAttention`.

        Raises:
            SharedPrefixError: the layer has attended to the prompts before.
        """
        if self._length == 0:
            if layer in self._prompts:
                raise SharedPrefixError("a layer of it attends more than once in a pass.")
            return self._attend_prompts(layer, query, key, value, scaling=scaling)
        keys, values = self._appended(layer, key, value)
        return self._attend_completions(layer, query, keys, values, scaling=scaling)

    def _attend_prompts(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None
    ) -> Tensor:
        parts = [
            torch.split(x[0].transpose(0, 1), self._prompt_lengths) for x in (query, key, value)
        ]
        attended = [
            causal_attention(q[None], k[None], v[None], scaling=scaling)[0]
            for q, k, v in zip(*parts, strict=True)
        ]
        self._prompts[layer] = (_stacked(parts[1]), _stacked(parts[2]))
        return torch.cat(attended)[None]

    def _appended(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the completions so far, ``(B, K, T, D)``, with the new ones."""
        at = self._length - 1
        if layer not in self._completions:
            self._completions[layer] = (_room(key, _BLOCK), _room(value, _BLOCK))
        if at == self._completions[layer][0].shape[2]:
            keys, values = self._completions[layer]
            self._completions[layer] = (_grown(keys), _grown(values))
        keys, values = self._completions[layer]
        keys[:, :, at], values[:, :, at] = key[:, :, 0], value[:, :, 0]
        return keys[:, :, : at + 1], values[:, :, : at + 1]

    def _attend_completions(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, *, scaling: float | None
    ) -> Tensor:
        """Softmax over the prompt's keys, read once a group, and the completion's own."""
        prompt_keys, prompt_values = self._prompts[layer]
        num_rows, num_heads, _, width = query.shape
        num_kv, longest = prompt_keys.shape[1:3]
        query = query.reshape(num_rows, num_kv, -1, width) * (scaling or width**-0.5)
        scores = self._by_group(query) @ prompt_keys.transpose(2, 3)
        if self._ragged:
            scores = scores.masked_fill(self._hidden_PS[:, None, None], -torch.inf)
        scores = torch.cat([self._by_row(scores), self._own_scores(query, keys)], dim=-1)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
        shared = self._by_row(self._by_group(weights[..., :longest]) @ prompt_values)
        own = weights[..., longest:] @ values
        return (shared + own).reshape(num_rows, 1, num_heads, -1)

    def _own_scores(self, query: Tensor, keys: Tensor) -> Tensor:
        return query @ keys.transpose(2, 3)

    def _by_group(self, values: Tensor) -> Tensor:
        """``(B, K, heads, *)`` as ``(P, K, members * heads, *)``: a group's rows side by side."""
        if not self._whole:
            values = values[self._members_PM.flatten()]
        values = values.reshape(*self._members_PM.shape, *values.shape[1:])
        return values.transpose(1, 2).flatten(2, 3)

    def _by_row(self, values: Tensor) -> Tensor:
        """Undo :meth:`_by_group`."""
        members = self._members_PM.shape[1]
        values = values.reshape(*values.shape[:2], members, -1, values.shape[-1])
        values = values.transpose(1, 2).flatten(0, 1)
        return values if self._whole else values[self._slot_B]

    def _regroup(self) -> None:
        """Lay the rows out as groups of equal size; a smaller group repeats its first row."""
        counts = self._group_of_B.bincount(minlength=len(self._hidden_PS))
        starts = counts.cumsum(0) - counts
        member = torch.arange(int(counts.max()), device=counts.device)
        self._members_PM = starts[:, None] + member * (member < counts[:, None])
        rows = torch.arange(len(self._group_of_B), device=counts.device)
        self._slot_B = self._group_of_B * len(member) + rows - starts[self._group_of_B]
        self._whole = len(rows) == self._members_PM.numel()
        self._ragged = bool(self._hidden_PS.any())


class FixedGroupCache(GroupCache):
    """The same, for forward passes that a CUDA graph repeats: nothing they read or write moves.

    The completions' part has room for more tokens than there are. The room is hidden from the
    attention, and the place of a new token stands in a tensor. Until :attr:`version` changes, every
    forward pass reads and writes the same memory, in the same shapes.

    Args:
        prompt_lengths: Tokens of each prompt.
        group_sizes: Completions of each, at least 1.
        max_new_tokens: Of a completion.
        device: Where the model runs.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        *,
        group_sizes: Sequence[int],
        max_new_tokens: int,
        device: torch.device,
    ):
        super().__init__(prompt_lengths, group_sizes=group_sizes, device=device)
        self.version = 0
        self._max_new_tokens = max_new_tokens
        self._place = torch.zeros(1, dtype=torch.long, device=device)  # of the new token
        self._room_T = torch.ones(min(_BLOCK, max_new_tokens), dtype=torch.bool, device=device)

    def advance(self) -> None:
        """Count the next token, and make room for it."""
        super().advance()
        if self._length > len(self._room_T):
            self._make_room()
        if self._length > 0:
            self._place.fill_(self._length - 1)
            self._room_T[self._length - 1] = False

    def keep(self, rows: Tensor) -> None:
        """Forget every completion but ``rows``, in other memory."""
        super().keep(rows)
        self.version += 1

    def _make_room(self) -> None:
        added = min(len(self._room_T), self._max_new_tokens - len(self._room_T))
        self._room_T = pad(self._room_T, (0, added), value=True)
        for layer, kept in self._completions.items():
            keys, values = (pad(x, (0, 0, 0, added)) for x in kept)
            self._completions[layer] = (keys, values)
        self.version += 1

    def _appended(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self._completions:
            num_tokens = len(self._room_T)
            self._completions[layer] = (_room(key, num_tokens), _room(value, num_tokens))
        keys, values = self._completions[layer]
        keys.index_copy_(2, self._place, key)
        values.index_copy_(2, self._place, value)
        return keys, values

    def _own_scores(self, query: Tensor, keys: Tensor) -> Tensor:
        return super()._own_scores(query, keys).masked_fill(self._room_T, -torch.inf)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """``(S_p, K, D)`` each, as ``(P, K, S, D)``; 0 after the end of a prompt."""
    padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    return padded.transpose(1, 2).contiguous()


def _room(like: Tensor, num_tokens: int) -> Tensor:
    """Zeros: what a fixed cache hides is multiplied by 0, and might be no number otherwise."""
    return like.new_zeros((*like.shape[:2], num_tokens, like.shape[3]))


def _grown(values: Tensor) -> Tensor:
    return pad(values, (0, 0, 0, max(_BLOCK, values.shape[2] // 2)))
