"""How many replies a prompt may keep, by hand and by its properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.rejection.balance import BUCKETS, bucket, pass_rate, quota

RIGHT = st.lists(st.sampled_from([True, False, None]), max_size=20)


def judged(num_right: int, num_wrong: int) -> list[bool]:
    return [True] * num_right + [False] * num_wrong


@pytest.mark.parametrize(
    ("num_right", "num_wrong", "expected"),
    [(1, 15, 4), (4, 12, 3), (5, 11, 3), (8, 8, 2), (9, 7, 2), (12, 4, 1), (16, 0, 1), (0, 16, 4)],
)
def test_prop2diff_is_proportional_to_the_wrong_ones_and_at_least_1(
    num_right: int, num_wrong: int, expected: int
) -> None:
    assert quota(judged(num_right, num_wrong), best_n=4, balance="prop2diff") == expected


def test_prop2diff_rounds_no_float() -> None:
    # 10 * (1 - 0.7) is 3.0000000000000004 in floats, and would be rounded up to 4.
    assert quota(judged(7, 3), best_n=10, balance="prop2diff") == 3


def test_uniform_is_the_same_for_all() -> None:
    assert {quota(judged(n, 8 - n), best_n=4, balance="uniform") for n in range(9)} == {4}


def test_what_was_not_judged_counts_neither_way() -> None:
    assert pass_rate([True, None, False, None]) == 0.5
    assert pass_rate([None]) is None
    assert pass_rate([]) is None
    assert quota([True, None, False, None], best_n=4, balance="prop2diff") == 2


@given(RIGHT, st.integers(1, 10))
def test_quota_is_1_to_best_n_and_falls_with_the_pass_rate(
    right: list[bool | None], best_n: int
) -> None:
    found = quota(right, best_n=best_n, balance="prop2diff")
    assert 1 <= found <= best_n
    assert quota([*right, True], best_n=best_n, balance="prop2diff") <= found
    assert quota([*right, False], best_n=best_n, balance="prop2diff") >= (found if right else 1)


@given(st.integers(0, 32), st.integers(1, 32))
def test_bucket_holds_its_rate(num_right: int, num: int) -> None:
    rate = min(num_right, num) / num
    low = [0.0, 0.0, 0.25, 0.5, 0.75, 1.0][BUCKETS.index(bucket(rate))]
    high = [0.0, 0.25, 0.5, 0.75, 1.0, 1.0][BUCKETS.index(bucket(rate))]
    assert low == rate == high or low < rate <= high
    assert (bucket(rate) in ("0", "1")) is (rate in (0.0, 1.0))
