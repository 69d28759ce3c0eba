"""What holds for any reply: it is scored 0 or 1, and only the final answer counts."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.near_misses import near_misses
from trl_grpo_ext.rewards.math.final_answer import read_reply
from trl_grpo_ext.rewards.math.parse import read_answer
from trl_grpo_ext.rewards.math.reward import MathReward

REWARD = MathReward()

MARKERS = [r"\boxed{", "<answer>", "</answer>", "<think>", "</think>", "####", "the answer is "]
SYNTAX = [r"\frac{", "}", "{", "$", "=", " or ", r"\pm", "(", "]", r"\text{", "%", "\n\n", "!"]
SYNTAX += [r"\begin{pmatrix}", r"\end{pmatrix}", "&", r"\\", "x", "^", "-", ":", " and ", "km"]
PIECES = st.sampled_from([*MARKERS, *SYNTAX, "72", "1,000", "9"])
MESSES = st.lists(PIECES | st.text(max_size=4), max_size=30).map("".join)
NUMBERS = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**4)
FRAMES = [
    r"\boxed{%s}",
    r"So $x = \boxed{%s}$.",
    "<answer>%s</answer>",
    "<think>Is it 71?</think><answer>%s</answer>",
    "#### %s",
    "The answer is %s.",
    "**Answer:** $%s$",
    "%s",
]


@settings(max_examples=300, deadline=None)
@given(reply=MESSES, gold=MESSES)
def test_reward_is_zero_one_or_none_and_nothing_is_raised(reply: str, gold: str) -> None:
    assert REWARD(completions=[reply], answer=["72"])[0] in (0.0, 1.0)
    assert REWARD(completions=["72"], answer=[gold])[0] in (0.0, 1.0, None)
    assert isinstance(hash(REWARD.answer(reply)), int)


@settings(max_examples=150, deadline=None)
@given(reply=MESSES)
def test_reward_of_any_reply_to_an_expression_is_zero_or_one(reply: str) -> None:
    assert REWARD(completions=[reply], answer=[r"2\sqrt{3}"])[0] in (0.0, 1.0)


@settings(max_examples=100, deadline=None)
@given(number=NUMBERS)
def test_number_equals_itself_in_every_frame_and_writing(number: Fraction) -> None:
    top, bottom = number.numerator, number.denominator
    writings = [f"{top}/{bottom}", rf"\frac{{{top}}}{{{bottom}}}"]
    if bottom == 1:
        writings += [f"{top}", f"{top:,}", f"{top}.0", rf"\text{{{top}}}", f"{top} apples"]
    for writing in writings:
        replies = [frame % writing for frame in FRAMES]
        golds = [f"{top}/{bottom}"] * len(replies)
        assert REWARD(completions=replies, answer=golds) == [1.0] * len(replies), writing


@settings(max_examples=100, deadline=None)
@given(number=NUMBERS, other=NUMBERS)
def test_another_number_is_wrong_in_every_frame(number: Fraction, other: Fraction) -> None:
    expected = 1.0 if number == other else 0.0
    replies = [frame % f"{other.numerator}/{other.denominator}" for frame in FRAMES]
    gold = f"{number.numerator}/{number.denominator}"
    assert REWARD(completions=replies, answer=[gold] * len(replies)) == [expected] * len(replies)


@settings(max_examples=200, deadline=None)
@given(rest=st.text(alphabet="abc ,.:7\n", max_size=60))
def test_text_after_a_tag_or_a_box_changes_nothing(rest: str) -> None:
    for reply in ("<answer>72</answer>", r"\boxed{72}"):
        assert read_reply(f"{reply} {rest}") == read_answer("72")


@settings(max_examples=200, deadline=None)
@given(thought=st.text(alphabet="<>/abc7{} \\boxed", max_size=60))
def test_what_stands_in_the_thinking_changes_nothing(thought: str) -> None:
    assert read_reply(rf"<think>{thought}</think>\boxed{{72}}") == read_answer("72")


@settings(max_examples=200, deadline=None)
@given(first=NUMBERS, second=NUMBERS)
def test_hedge_between_two_numbers_is_neither_of_them(first: Fraction, second: Fraction) -> None:
    if first == second:
        return
    hedges = [f"{first} or {second}", f"{first}, {second}", rf"{first} \text{{ or }} {second}"]
    hedges += [rf"\boxed{{{first}}} or \boxed{{{second}}}", f"{first} = {second}"]
    for hedge in hedges:
        replies = [frame % hedge for frame in FRAMES]
        for gold in (first, second):
            scores = REWARD(completions=replies, answer=[f"{gold}"] * len(replies))
            assert scores == [0.0] * len(replies), hedge


@pytest.mark.parametrize(
    "gold", ["72", "10", "1,234", "-5", "0", "0.5", "12.25", "100", "7", "360"]
)
@pytest.mark.parametrize("frame", FRAMES)
def test_near_miss_is_wrong(gold: str, frame: str) -> None:
    misses = near_misses(gold, seed=FRAMES.index(frame))
    assert len(misses) > 9
    replies = [frame % text for _, text in misses]
    scores = REWARD(completions=replies, answer=[gold] * len(replies))
    assert [miss for miss, score in zip(misses, scores, strict=True) if score != 0.0] == []
