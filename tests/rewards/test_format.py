import time

import pytest

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.format import FormatReward


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
