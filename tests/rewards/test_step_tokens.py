"""Steps found again among tokens, by hand and on a tokenizer of bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.rewards.step_tokens import step_tokens

PIECES = ["One", ".\n", "\n", "Two", ".\n\nThree", " four", "<eos>"]


def decode_pieces(ids: list[int]) -> str:
    return "".join(PIECES[i] for i in ids if PIECES[i] != "<eos>")


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def test_steps_end_at_the_token_with_their_last_character() -> None:
    text = "One.\n\nTwo.\n\nThree four"
    found = step_tokens(decode_pieces, [0, 1, 2, 3, 4, 5, 6], text=text, ends=[6, 12, len(text)])
    assert found == [2, 4, 6]  # ".\n\nThree" ends the second step, the EOS token the third


def test_a_token_with_a_whole_step_is_of_the_later_one() -> None:
    # "A\n" "B\nC": the second step is within the token that ends the third one.
    found = step_tokens(
        lambda ids: "".join(["A\n", "", "B\nC"][i] for i in ids),
        [0, 1, 2],
        text="A\nB\nC",
        ends=[2, 4, 5],
    )
    assert found == [0, 1, 2]


def test_more_steps_than_tokens_have_no_place() -> None:
    assert step_tokens(lambda ids: "A\nB" if ids else "", [0], text="A\nB", ends=[2, 3]) is None


def test_a_text_that_the_tokens_do_not_say_has_no_place() -> None:
    assert step_tokens(decode_pieces, [0, 1], text="Two", ends=[3]) is None


def test_a_text_within_what_was_decoded_is_found() -> None:
    # A template may take a thought off: the text is "Two" only.
    assert step_tokens(decode_pieces, [0, 1, 3], text="Two", ends=[2, 3]) == [1, 2]


def test_the_text_is_what_comes_last() -> None:
    # A thought that drafts the answer before it is given: "Two" stands twice.
    pieces = ["Two\n", "A", ". Hm. ", "Two\n", "A", ""]
    found = step_tokens(
        lambda ids: "".join(pieces[i] for i in ids), range(6), text="Two\nA", ends=[4, 5]
    )
    assert found == [3, 5]


@given(st.lists(st.text("aé漢🙂", min_size=1, max_size=4), min_size=1, max_size=5))
def test_each_byte_belongs_to_its_step(steps: list[str]) -> None:
    text = "".join(steps)
    ends = [len("".join(steps[: i + 1])) for i in range(len(steps))]
    expected = [len("".join(steps[: i + 1]).encode()) - 1 for i in range(len(steps))]
    assert step_tokens(decode_bytes, list(text.encode()), text=text, ends=ends) == expected


@pytest.mark.parametrize("text", ["", "x"])
def test_one_step_is_the_whole_completion(text: str) -> None:
    assert step_tokens(lambda ids: text, [5, 6, 7], text=text, ends=[len(text)]) == [2]
