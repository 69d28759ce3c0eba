"""What counts as the same text, and that of similar ones the first is kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.rejection.near_duplicates import distinct, shingles, similarity, words

TEXTS = st.lists(st.text("ab c.", max_size=12), max_size=8)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("It is 7.", "it  is\n7"),
        ("2+3=5", "2 + 3 = 5"),
        ("**So**, `x` is 7!", "so x is 7"),
        ("ｘ ＝ ７", "x = 7"),  # full-width forms
        ("Straße", "STRASSE"),
    ],
)
def test_words_are_the_same_whatever_the_typography(left: str, right: str) -> None:
    assert words(left) == words(right)


@pytest.mark.parametrize(("left", "right"), [("2 + 3", "2 - 3"), ("3.5", "35"), ("(a) b", "a b")])
def test_words_differ_by_what_changes_the_meaning(left: str, right: str) -> None:
    assert words(left) != words(right)


def test_words_of_scripts_without_spaces_are_their_characters() -> None:
    assert words("答案是 x1。") == ["答", "案", "是", "x1", "。"]


def test_similarity_is_common_shingles_over_all() -> None:
    # Pairs of "a b c d": ab bc cd; of "a b c e": ab bc ce. Two in common, four in all.
    left, right = (shingles(text, ngram_size=2) for text in ("a b c d", "a b c e"))
    assert similarity(left, right) == 0.5


def test_distinct_keeps_the_first_of_those_that_are_as_similar_as_the_limit() -> None:
    texts = ["a b c d", "a b c e", "x y z"]
    assert distinct(texts, ngram_size=2, max_similarity=0.5) == [0, 2]
    assert distinct(texts, ngram_size=2, max_similarity=0.51) == [0, 1, 2]


def test_distinct_compares_with_kept_texts_only() -> None:
    # The second is like both others, which are not like each other.
    texts = ["a b c d e f", "c d e f g h", "e f g h i j"]
    assert distinct(texts, ngram_size=1, max_similarity=0.5) == [0, 2]


def test_distinct_above_1_keeps_equal_texts() -> None:
    assert distinct(["7", "7"], max_similarity=1.01) == [0, 1]
    assert distinct(["7", "7.", "..."], max_similarity=1.0) == [0, 2]


@given(TEXTS, st.integers(1, 4), st.floats(0.1, 1.0))
def test_distinct_leaves_no_similar_pair_and_drops_nothing_else(
    texts: list[str], ngram_size: int, limit: float
) -> None:
    kept = distinct(texts, ngram_size=ngram_size, max_similarity=limit)
    sets = [shingles(text, ngram_size=ngram_size) for text in texts]
    assert kept[:1] == ([0] if texts else [])
    for at in range(len(texts)):
        close = any(similarity(sets[at], sets[k]) >= limit for k in kept if k < at)
        assert (at in kept) is not close


@given(TEXTS, st.integers(1, 4))
def test_similarity_is_symmetric_and_1_for_equal_sets_only(texts: list[str], size: int) -> None:
    sets = [shingles(text, ngram_size=size) for text in texts]
    for left in sets:
        for right in sets:
            found = similarity(left, right)
            assert found == similarity(right, left)
            assert (found == 1.0) is (left == right)
