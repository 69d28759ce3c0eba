import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.errors import ConfigurationError, RewardError
from trl_grpo_ext.rewards.number import LastNumberReward, NumberDistanceReward, last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", "7"),
        ("The answer is 7.", "7"),
        ("4 + 3 = 7", "7"),
        ("It costs $7", "7"),
        ("€2.50 each", "2.50"),
        ("first 3, then 4", "4"),
        ("3,4", "4"),
        ("0.5", "0.5"),
        ("about .5", "0.5"),
        ("see fig.5", "5"),
        ("version 1.2.3", "3"),
        ("1,234", "1234"),
        ("1,234,567.89", "1234567.89"),
        ("1234,567", "567"),
        ("1,2345", "2345"),
        ("1,234,5", "5"),
        ("50%", "50"),
        ("007", "7"),
        ("H2O", "2"),
        ("\\boxed{42}", "42"),
        ("**42**", "42"),
        ("٤٢", "42"),  # Arabic-Indic digits
        ("42", "42"),  # full-width digits
        ("x²", None),  # a superscript is no decimal digit
        ("x² = 9", "9"),
        ("no number", None),
        ("- . , $", None),
        ("", None),
    ],
)
def test_last_number_reads_the_magnitude_when_written_so(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-5", -5),
        ("= -5", -5),
        ("=-5", -5),
        ("\N{MINUS SIGN}5", -5),
        ("(-5)", -5),
        ("-$5", -5),
        ("$-5", -5),
        ("-1,000.5", Decimal("-1000.5")),
        ("-.5", Decimal("-0.5")),
        ("5-3", 3),
        ("5\N{MINUS SIGN}3", 3),
        ("(a)-3", 3),
        ("[a]-3", 3),
        ("{a}-3", 3),
        ("x-3", 3),
        ("5 - 3", 3),
        ("- 3 apples", 3),
        ("the answer--3", 3),
        ("2024-01-05", 5),
    ],
)
def test_last_number_takes_a_minus_as_sign_when_no_operand_is_before_it(
    text: str, number: int | Decimal
) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    "junk",
    ["1", "-", ".", "1,", "111,", "1.", "-1", "1-", ",111", "$", "a", "٤", "(((", "-.", "1,111."],
)
def test_last_number_is_linear_when_the_reply_is_long_junk(junk: str) -> None:
    start = time.perf_counter()
    last_number(junk * (300_000 // len(junk)) + "1111 x")
    assert time.perf_counter() - start < 2.0


def test_last_number_compares_exactly_when_longer_than_python_converts_to_int() -> None:
    digits = "9" * 100_000  # int() refuses more than 4300 digits
    assert last_number(f"= {digits}") == last_number(f"{digits}.0")
    assert last_number(f"= {digits}") != last_number(f"{digits[:-1]}8")


@given(st.text())
def test_last_number_never_raises_when_the_text_is_arbitrary(text: str) -> None:
    last_number(text)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.text(alphabet="ab =.!\n"))
def test_last_number_finds_the_number_when_text_without_digits_follows(
    number: Decimal, rest: str
) -> None:
    assert last_number(f"1 and 2 = {number:f} {rest}") == number


def test_last_number_reward_scores_plain_and_conversational_completions() -> None:
    reward = LastNumberReward()
    plain = ["so 7", "so 8", "none"]
    conversational = [[{"role": "assistant", "content": text}] for text in plain]
    answers = ["7", "7", "7"]
    assert reward(prompts=["?"] * 3, completions=plain, answer=answers) == [1.0, 0.0, 0.0]
    assert reward(prompts=["?"] * 3, completions=conversational, answer=answers) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "gold", ["7", " 7 ", "7.0", "$7", 7, 7.0, "7.000", "٧"], ids=lambda gold: repr(gold)
)
def test_last_number_reward_reads_the_gold_answer_when_it_is_a_number(gold: object) -> None:
    assert LastNumberReward()(completions=["7", "-7"], answer=[gold, gold]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "gold", ["seven", "", "7 apples", "x = 7", None, True, float("nan"), float("inf"), [7], "7/1"]
)
def test_last_number_reward_gives_none_when_the_gold_answer_is_no_number(gold: object) -> None:
    assert LastNumberReward()(completions=["7"], answer=[gold]) == [None]


def test_last_number_reward_reads_the_column_and_name_that_it_is_given() -> None:
    reward = LastNumberReward(answer_column="solution", log_as="exact")
    assert reward(completions=["7"], answer=["1"], solution=["7"]) == [1.0]
    assert (reward.__name__, reward.required_columns) == ("exact", {"solution"})
    assert LastNumberReward().__name__ == "last_number"


def test_last_number_reward_names_the_columns_when_the_answers_are_missing() -> None:
    with pytest.raises(RewardError) as error:
        LastNumberReward()(completions=["7"], prompts=["?"], solution=["7"])
    assert str(error.value) == (
        "reward 'last_number' got no column 'answer' (columns: prompts, solution), so no reply "
        "can be checked. Set `answer_column` in the `arguments` of this reward to the column that "
        "holds the gold answer."
    )


def test_number_distance_falls_with_the_distance_by_hand() -> None:
    reward = NumberDistanceReward(span=4)
    replies = ["7", "it is 6.", "8", "2", "100", "-7", "no number", "9" * 5000]
    # Distances 0, 1, 1, 5, 93, 14, none, huge.
    assert reward(completions=replies, answer=["7"] * 8) == [1.0, 0.75, 0.75, 0, 0, 0, 0, 0]


def test_number_distance_is_unscored_when_the_gold_answer_is_no_number() -> None:
    assert NumberDistanceReward(span=4)(completions=["7"], answer=["seven"]) == [None]


@pytest.mark.parametrize("span", [0, -1, float("nan")])
def test_number_distance_refuses_a_span_that_is_not_positive(span: float) -> None:
    with pytest.raises(ConfigurationError, match="`span`="):
        NumberDistanceReward(span=span)
