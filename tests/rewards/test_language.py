import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.language import SCRIPTS, LanguageReward, script_counts


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("", {}),
        ("42 = 6 * 7", {}),
        ("The answer is 42.", {"Latin": 3}),
        ("naïve Café", {"Latin": 2}),
        ("nai\N{COMBINING DIAERESIS}ve", {"Latin": 1}),
        ("Ответ: сорок два", {"Cyrillic": 3}),
        ("答案是 42", {"Han": 3}),
        ("コーヒーを飲む", {"Katakana": 2, "Hiragana": 2, "Han": 1}),  # the long marks do not count
        ("한국어 문장", {"Hangul": 2}),
        ("हिन्दी में", {"Devanagari": 2}),
        ("the答案is", {"Latin": 2, "Han": 2}),
        ("ＡＢＣ", {"Latin": 1}),  # full width
        ("ᎠᎡᎢ", {"other": 1}),  # Cherokee
        ("let x be α", {"Latin": 2}),  # words of one letter may be variables
        (r"\frac{x}{y} \text{if}", {"Latin": 1}),
        ("<think>so</think><answer>7</answer>", {"Latin": 1}),
        ("$ab + \\sin(cd)$ $$ef$$ \\(gh\\) \\[ij\\] ```print(kl)```", {}),
        ("$\\text{答案} = ab$", {"Han": 2}),  # nothing hides in a formula
        ("it costs $5 more", {"Latin": 3}),  # never closed
        ("\\[ to be open", {"Latin": 3}),
    ],
)
def test_script_counts_are_those_counted_by_hand(text: str, counts: dict[str, int]) -> None:
    assert script_counts(text) == counts


def test_language_reward_is_the_share_of_words_in_the_wanted_scripts() -> None:
    mixed = [{"role": "assistant", "content": "So the 答案 is seven"}]  # 4 words and 2 characters
    latin = LanguageReward(scripts=["Latin"])
    assert latin(completions=[mixed, "7", "Так"]) == [4 / 6, 1.0, 0.0]
    assert LanguageReward(scripts="Han")(completions=[mixed]) == [2 / 6]
    both = LanguageReward(scripts=["Han", "Latin"], log_as="either")
    assert both(completions=[mixed]) == [1.0]
    assert both.__name__ == "either"


def test_a_script_is_not_a_language() -> None:
    assert LanguageReward(scripts=["Latin"])(completions=["La réponse est sept."]) == [1.0]


@given(st.text())
def test_shares_of_disjoint_scripts_add_up_to_at_most_one(text: str) -> None:
    counts = script_counts(text)
    assert all(count > 0 for count in counts.values())
    assert set(counts) <= {*SCRIPTS.values(), "other"}
    [share] = LanguageReward(scripts=list(SCRIPTS.values()))(completions=[text])
    known = counts.total() - counts["other"]
    assert share == (known / counts.total() if counts else 1.0)


@pytest.mark.parametrize("opening", ["\\[", "$", "$$ ", "```", "<a", "\\a", "\\( $"])
def test_script_counts_are_linear_in_the_text(opening: str) -> None:
    start = time.perf_counter()
    script_counts(opening * 200_000)
    assert time.perf_counter() - start < 5.0


@pytest.mark.parametrize(
    ("scripts", "found"),
    [
        ([], "reward 'language' has no `scripts`, so every reply would score 0"),
        (["English"], "reward 'language' has 'English' among its `scripts`, which is not known"),
    ],
)
def test_language_reward_refuses_what_is_no_script(scripts: list[str], found: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(found)):
        LanguageReward(scripts=scripts)
