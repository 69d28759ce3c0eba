"""Where the steps of an answer end, and what their scores come to."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.rewards.models.steps import (
    Aggregate,
    aggregate,
    split_steps,
    step_ends,
    step_text,
)


@pytest.mark.parametrize(
    ("text", "separator", "steps"),
    [
        ("", "\n\n", [""]),
        ("a", "\n\n", ["a"]),
        ("a\n\nb", "\n\n", ["a\n\n", "b"]),
        ("a\n\nb\n\n", "\n\n", ["a\n\n", "b\n\n"]),
        ("a\n\n\n\nb", "\n\n", ["a\n\n\n\n", "b"]),
        ("a\n\n \t\n\nb", "\n\n", ["a\n\n \t\n\n", "b"]),
        ("a\n\n\nb", "\n\n", ["a\n\n", "\nb"]),
        ("\n\na\n\nb", "\n\n", ["\n\na\n\n", "b"]),
        (" \n\n \n\n", "\n\n", [" \n\n \n\n"]),
        ("a\nb\n\nc", "\n\n", ["a\nb\n\n", "c"]),
        ("a. b. . c", ". ", ["a. ", "b. . ", "c"]),
        ("one##two###three", "##", ["one##", "two##", "#three"]),
    ],
)
def test_steps_are_the_pieces_that_say_something(
    text: str, separator: str, steps: list[str]
) -> None:
    assert split_steps(text, separator) == steps


@pytest.mark.parametrize(
    ("step", "separator", "said"),
    [
        ("a\n\n\n\n", "\n\n", "a"),
        ("\n\n \n\na b\n\n", "\n\n", "a b"),
        ("    indented\n\n", "\n\n", "    indented"),
        ("\nb", "\n\n", "\nb"),
        ("b. . ", ". ", "b"),
        ("", "\n\n", ""),
        (" \n\n ", "\n\n", ""),
    ],
)
def test_step_text_has_no_separators_around_it(step: str, separator: str, said: str) -> None:
    assert step_text(step, separator) == said


texts = st.text(alphabet="ab #\n", max_size=40)
separators = st.sampled_from(["\n\n", "\n", "#", "a", "##"])


@given(text=texts, separator=separators)
def test_steps_join_to_the_text_and_ends_are_their_places(text: str, separator: str) -> None:
    steps = split_steps(text, separator)
    ends = step_ends(steps)
    assert "".join(steps) == text
    assert ends[-1] == len(text)
    assert [text[start:end] for start, end in itertools.pairwise((0, *ends))] == steps
    assert all(start < end for start, end in itertools.pairwise(ends))


@given(text=texts, separator=separators)
def test_each_step_says_one_piece_of_the_text(text: str, separator: str) -> None:
    said = [step_text(step, separator) for step in split_steps(text, separator)]
    assert said == ([piece for piece in text.split(separator) if piece.strip()] or [""])
    assert not any(separator in one for one in said)


@pytest.mark.parametrize(
    ("how", "expected"), [("min", 0.25), ("mean", 0.5), ("product", 0.0625), ("last", 0.5)]
)
def test_aggregates_by_hand(how: Aggregate, expected: float) -> None:
    # mean: (0.5 + 0.25 + 0.75 + 0.5) / 4; product: 1/2 x 1/4 x 1 x 1/2, with a 1 for the 0.75
    scores = [0.5, 0.25, 1.0 if how == "product" else 0.75, 0.5]
    assert aggregate(scores, how) == expected


@given(score=st.floats(0, 1), how=st.sampled_from(["min", "mean", "product", "last"]))
def test_one_step_is_its_own_aggregate(score: float, how: Aggregate) -> None:
    assert aggregate([score], how) == score


@given(scores=st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_product_is_at_most_the_minimum_and_that_at_most_the_mean(scores: list[float]) -> None:
    product, least, mean = (aggregate(scores, how) for how in ("product", "min", "mean"))
    assert product <= least <= mean + 1e-12
    assert least <= aggregate(scores, "last")
