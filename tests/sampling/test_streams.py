"""Streams of random numbers: each is its key's alone, and all are uniform and independent."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_grpo_ext.sampling.streams import CompletionKey, uniforms

indices = st.integers(0, 2**40)
keys = st.builds(CompletionKey, indices, indices)


@settings(deadline=None)
@given(
    seed=st.integers(-(2**70), 2**70),
    step=st.integers(0, 2**40),
    keys=st.lists(keys, min_size=1, max_size=5),
    length=st.integers(0, 20),
)
def test_a_stream_depends_on_its_own_key_only_and_begins_as_the_shorter_one_does(
    seed: int, step: int, keys: list[CompletionKey], length: int
) -> None:
    together = uniforms(seed, step, keys, length)
    assert together.shape == (len(keys), length)
    for key, row in zip(keys, together, strict=True):
        assert torch.equal(uniforms(seed, step, [key], length + 7)[0, :length], row)


def test_streams_are_those_of_numpys_philox_at_counts_of_their_own() -> None:
    philox = np.random.Philox(key=[5, 6], counter=[0, 0, 7, 8])
    expected = np.random.Generator(philox).random(9)
    assert uniforms(5, 6, [CompletionKey(7, 8)], 9)[0].tolist() == expected.tolist()


def test_streams_differ_in_every_number_when_anything_of_their_name_differs() -> None:
    names = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (-1, 0, 0, 0)]
    names += [(2**32, 0, 0, 0), (0, 2**32, 0, 0), (0, 0, 2**32, 0), (0, 0, 0, 2**32)]
    values = torch.cat(
        [uniforms(seed, step, [CompletionKey(p, g)], 50) for seed, step, p, g in names]
    )
    assert len(set(values.flatten().tolist())) == len(names) * 50


def test_numbers_are_uniform_over_positions_and_over_keys() -> None:
    values = uniforms(3, 4, [CompletionKey(p, g) for p in range(50) for g in range(8)], 200)
    assert values.dtype == torch.float64
    assert values.min() >= 0
    assert values.max() < 1
    counts = values.flatten().histc(bins=20, min=0, max=1)
    expected = values.numel() / 20
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 43.8  # 19 degrees of freedom: exceeded once in a thousand times
    for neighbours in (values[:, 1:], values[1:]):
        others = values[:, :-1] if neighbours.shape[1] < 200 else values[:-1]
        pairs = torch.stack([neighbours.flatten(), others.flatten()])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 4 / neighbours.numel() ** 0.5
