import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.repetition import RepetitionReward, repeated_share


@pytest.mark.parametrize(
    ("words", "ngram_size", "share"),
    [
        ("", 1, 0.0),
        ("a b", 3, 0.0),
        ("a b c", 3, 0.0),
        ("a a a a", 1, 3 / 4),
        ("a b a b a", 2, 2 / 4),  # ab ba ab ba
        ("a b c a b c", 3, 1 / 4),  # abc bca cab abc
    ],
)
def test_repeated_share_is_that_of_n_grams_seen_before(
    words: str, ngram_size: int, share: float
) -> None:
    assert repeated_share(words.split(), ngram_size=ngram_size) == share


@given(st.text("abc", max_size=30), st.integers(1, 4))
def test_repeated_share_equals_a_count_one_by_one(text: str, ngram_size: int) -> None:
    seen: list[str] = [text[at : at + ngram_size] for at in range(len(text) - ngram_size + 1)]
    again = sum(ngram in seen[:at] for at, ngram in enumerate(seen))
    assert repeated_share(text, ngram_size=ngram_size) == (again / len(seen) if seen else 0.0)


def test_repetition_reward_scales_the_share_to_the_penalty() -> None:
    reward = RepetitionReward(ngram_size=2, max_penalty=-3.0)
    reply = [{"role": "assistant", "content": "A b\na B a"}]  # ab ba ab ba
    assert reward(completions=[reply, "a b c", ""]) == [-1.5, 0.0, 0.0]


def test_repetition_reward_counts_characters_for_scripts_without_spaces() -> None:
    sentence = "我不知道我不知道"  # the same four characters twice: 7 pairs, 4 distinct
    assert RepetitionReward(ngram_size=2)(completions=[sentence]) == [0.0]
    reward = RepetitionReward(ngram_size=2, unit="characters", log_as="again")
    assert reward(completions=[sentence, "我不\n知道 我不 知道"]) == [-3 / 7, -3 / 7]
    assert reward.__name__ == "again"


def test_repetition_reward_is_linear_in_the_text() -> None:
    start = time.perf_counter()
    [score] = RepetitionReward(ngram_size=4)(completions=["so " * 300_000])
    assert score == pytest.approx(-1.0, abs=1e-4)
    assert time.perf_counter() - start < 5.0


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"ngram_size": 0}, "`ngram_size`=0, so there is nothing that could be repeated"),
        ({"max_penalty": 1.0}, "`max_penalty`=1.0, so repetitions would be rewarded"),
        ({"max_penalty": float("nan")}, "`max_penalty`=nan"),
        ({"unit": "tokens"}, "`unit`='tokens', so it is open what is repeated"),
    ],
)
def test_repetition_reward_refuses_what_cannot_work(
    arguments: dict[str, object], found: str
) -> None:
    with pytest.raises(ConfigurationError, match=found):
        RepetitionReward(**arguments)
