import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.format import FormatReward, structure_score


def test_format_reward_wants_the_whole_stripped_reply_to_match() -> None:
    reward = FormatReward(pattern=r"\d+|none")
    replies = ["7", "  7\n", "7 apples", "so 7", "none", ""]
    assert reward(prompts=["?"] * 6, completions=replies) == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]


def test_format_reward_reads_conversational_completions() -> None:
    reply = [{"role": "assistant", "content": "<answer>7</answer>"}]
    assert FormatReward(pattern="<answer>.*</answer>")(completions=[reply]) == [1.0]


def test_format_reward_lets_a_dot_match_line_breaks_only_when_the_pattern_says_so() -> None:
    assert FormatReward(pattern="a.b")(completions=["a\nb"]) == [0.0]
    assert FormatReward(pattern="(?s)a.b")(completions=["a\nb"]) == [1.0]


def test_format_reward_gives_zero_without_matching_when_the_reply_is_too_long() -> None:
    reward = FormatReward(pattern="a*", max_characters=5)
    assert reward(completions=["aaaaa", " aaaaa ", "aaaaaa"]) == [1.0, 1.0, 0.0]
    start = time.perf_counter()
    assert FormatReward(pattern="(a+)+", max_characters=20)(completions=["a" * 40 + "b"]) == [0.0]
    assert time.perf_counter() - start < 2.0


def test_format_reward_is_logged_under_the_name_that_it_is_given() -> None:
    assert FormatReward(pattern="a").__name__ == "format"
    assert FormatReward(pattern="a", log_as="short").__name__ == "short"


def test_format_reward_says_what_is_wrong_when_the_pattern_is_no_regular_expression() -> None:
    with pytest.raises(ConfigurationError) as error:
        FormatReward(pattern="(")
    assert str(error.value) == (
        "reward 'format' has `pattern`='(', which is not a regular expression (missing ), "
        "unterminated subpattern at position 0), so no reply can be checked. Correct `pattern` in "
        "the `arguments` of this reward; a literal bracket or dot needs a backslash."
    )


def test_format_reward_refuses_a_character_limit_below_one() -> None:
    with pytest.raises(ConfigurationError) as error:
        FormatReward(pattern="a", max_characters=0)
    assert str(error.value) == (
        "reward 'format' has `max_characters`=0, so every reply would be too long and score 0. "
        "Set `max_characters` in the `arguments` of this reward to at least 1."
    )


# Structures


THINK_ANSWER = "<think>3 + 4</think>\n<answer>7</answer>"


def test_structure_wants_each_tag_once_in_order_and_nothing_outside() -> None:
    reward = FormatReward(structure="think_answer")
    wrong = [
        "",
        "7",
        "<answer>7</answer>",
        "<answer>7</answer><think>3 + 4</think>",
        "<think>3 + 4 <answer>7</answer></think>",
        "<think>3 + <answer>4</think>7</answer>",
        "<think>3</think><think>4</think><answer>7</answer>",
        f"{THINK_ANSWER}<answer>8</answer>",
        f"{THINK_ANSWER} Hope this helps!",
        f"Sure: {THINK_ANSWER}",
        "<think>3 + 4</think> so <answer>7</answer>",
        "<think>\n</think><answer>7</answer>",
        "<think>3 + 4</think><answer> </answer>",
        "</think>3 + 4<think><answer>7</answer>",
        "<THINK>3 + 4</THINK><answer>7</answer>",
    ]
    assert reward(completions=[THINK_ANSWER, f" \n{THINK_ANSWER}\n"]) == [1.0, 1.0]
    assert reward(completions=wrong) == [0.0] * len(wrong)


@pytest.mark.parametrize(
    ("reply", "kept"),  # of four parts: each block, their order, nothing outside
    [
        ("7", 0),
        ("<think>hm</think>", 1),
        ("<answer>7</answer> <answer>8</answer><think>hm</think>", 1),
        ("<think>hm <answer>7</answer></think>", 2),
        ("<answer>7</answer><think>hm</think>", 2),
        ("<think>hm</think> so <answer>7</answer>", 3),
        (THINK_ANSWER, 4),
    ],
)
def test_structure_gives_a_share_for_each_part_when_asked_to(reply: str, kept: int) -> None:
    reward = FormatReward(structure="think_answer", partial_credit=True)
    assert reward(completions=[reply]) == [kept / 4]


def test_structure_takes_other_names_and_a_thought_that_the_prompt_opened() -> None:
    renamed = FormatReward(structure="think_answer", tags=["reasoning", "solution"])
    reply = "<reasoning>3 + 4</reasoning><solution>7</solution>"
    assert renamed(completions=[reply, THINK_ANSWER]) == [1.0, 0.0]
    opened = FormatReward(structure="think_answer", starts_in_thought=True)
    assert opened(completions=["3 + 4</think><answer>7</answer>", THINK_ANSWER]) == [1.0, 0.0]
    assert FormatReward(structure="answer")(completions=["<answer>7</answer>"]) == [1.0]


@given(st.lists(st.sampled_from(["<a>", "</a>", "<b>", "</b>", "x", " "]), max_size=9))
def test_structure_score_is_1_where_a_pattern_says_so(pieces: list[str]) -> None:
    text = "".join(pieces)
    inside = r"(?=\s*x)[x ]+"
    matches = re.fullmatch(rf"\s*<a>{inside}</a>\s*<b>{inside}</b>\s*", text) is not None
    assert (structure_score(text, tags=["a", "b"]) == 1.0) == matches


def test_structure_is_read_in_linear_time() -> None:
    start = time.perf_counter()
    assert structure_score("<think>" * 500_000, tags=["think", "answer"]) == 0.0
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({}, "reward 'format' has neither of `pattern` and `structure`"),
        ({"pattern": "7", "structure": "answer"}, "has both of `pattern` and `structure`"),
        ({"structure": "xml"}, "has `structure`='xml', which is not known"),
        ({"pattern": "7", "tags": ["a"]}, "has `tags` without a `structure`"),
        ({"structure": "answer", "tags": ["a", "b"]}, "which are not 1 different names"),
        ({"structure": "think_answer", "tags": ["a", "a"]}, "which are not 2 different names"),
        ({"structure": "think_answer", "tags": ["<a>", "b"]}, "which are not 2 different names"),
        ({"structure": "think_answer", "tags": "ab"}, "which are not 2 different names"),
    ],
)
def test_format_reward_refuses_what_names_no_format(
    arguments: dict[str, object], found: str
) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(found)):
        FormatReward(**arguments)
