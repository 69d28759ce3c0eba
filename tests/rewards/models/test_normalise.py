from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.rewards.models.normalise import RunningMoments

finite = st.floats(-1e6, 1e6)


def moments_of(*batches: list[float]) -> RunningMoments:
    moments = RunningMoments()
    for batch in batches:
        moments.update(batch)
    return moments


def test_moments_are_those_worked_out_by_hand() -> None:
    moments = moments_of([1.0, 2.0], [], [6.0])  # mean 3; squares 4 + 1 + 9 = 14, over 2 is 7
    assert (moments.count, moments.mean) == (3, 3.0)
    assert moments.std == pytest.approx(7**0.5)
    assert moments.normalised(10.0) == pytest.approx(7**0.5)


@given(st.lists(st.lists(finite, max_size=8), min_size=1, max_size=8))
def test_moments_are_those_of_all_numbers_so_far(batches: list[list[float]]) -> None:
    moments, seen = RunningMoments(), []
    for batch in batches:
        moments.update(batch)
        seen += batch
        assert moments.count == len(seen)
        if seen:
            assert moments.mean == pytest.approx(np.mean(seen), rel=1e-9, abs=1e-6)
        if len(seen) > 1:
            assert moments.std == pytest.approx(np.std(seen, ddof=1), rel=1e-9, abs=1e-6)


@given(st.lists(finite, max_size=20))
def test_order_within_a_batch_changes_nothing(values: list[float]) -> None:
    there, back = moments_of(values), moments_of(values[::-1])
    assert there.state_dict() == back.state_dict()


def test_small_deviations_of_large_numbers_are_not_lost() -> None:
    moments = moments_of([1e9 + 1, 1e9 + 2], [1e9 + 3])
    assert moments.std == 1.0  # a sum of squares in double precision would say 0 or NaN


def test_numbers_without_a_deviation_are_given_as_their_distance() -> None:
    assert RunningMoments().normalised(2.5) == 2.5
    assert moments_of([2.0]).normalised(2.5) == 0.5
    assert moments_of([2.0, 2.0]).normalised(2.0) == 0.0


def test_state_goes_on_where_it_was_after_json() -> None:
    moments = moments_of([1.0, 2.5, -3.0])
    restored = RunningMoments()
    restored.load_state_dict(json.loads(json.dumps(moments.state_dict())))
    for both in (moments, restored):
        both.update([0.1, 0.2])
    assert restored.state_dict() == moments.state_dict()
