from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trl_grpo_ext.rewards.models.passes import plan_passes


@settings(deadline=None)  # a busy machine is no failure
@given(
    lengths=st.lists(st.integers(1, 300), max_size=60),
    max_tokens=st.integers(1, 1000),
    max_padding=st.floats(0, 0.99),
)
def test_plan_keeps_every_text_once_and_both_bounds(
    lengths: list[int], max_tokens: int, max_padding: float
) -> None:
    passes = plan_passes(lengths, max_tokens=max_tokens, max_padding=max_padding)
    order = [index for chosen in passes for index in chosen]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    for chosen in passes:
        padded = len(chosen) * max(lengths[index] for index in chosen)
        assert len(chosen) == 1 or padded <= max_tokens
        assert padded - sum(lengths[index] for index in chosen) <= max_padding * padded


def test_plan_fills_a_pass_up_to_each_bound() -> None:
    # 4 x 5 tokens are 20; 2 of 2 x 10 tokens of padding are a tenth
    assert plan_passes([5] * 5, max_tokens=20, max_padding=0.5) == [[0, 1, 2, 3], [4]]
    assert plan_passes([10, 8], max_tokens=99, max_padding=0.1) == [[0, 1]]
    assert plan_passes([10, 7], max_tokens=99, max_padding=0.1) == [[0], [1]]
