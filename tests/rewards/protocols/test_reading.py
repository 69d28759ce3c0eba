import json

import pytest

from trl_grpo_ext.rewards.api.protocols import reading
from trl_grpo_ext.rewards.api.wire import Reply, UnreadableReplyError, WireRequest, mean_scores


@pytest.mark.parametrize(
    ("written", "number"),
    [("7", 7.0), (" 7.5\n", 7.5), ("0", 0.0), ("-2.25", -2.25), ("1e1", 10.0), ("10", 10.0)],
)
def test_written_number_reads_a_text_that_is_one_number(written: str, number: float) -> None:
    assert reading.written_number(written) == number


@pytest.mark.parametrize(
    "written",
    [
        *("7/10", "7.5 or 8", "NaN", "Infinity", "-Infinity", "inf", "1e999", "-1e999", "７"),
        *("٧", "7٫5", "7,5", "1_0", "+7", "07", "7.", ".5", "7 8", "0x7", "", " ", "--7", "7%"),
        *("seven", "7\x00", "7\u200b", "\u00a07", "9" * 5000),
    ],
)
def test_written_number_refuses_what_is_not_one_finite_number(written: str) -> None:
    with pytest.raises(UnreadableReplyError):
        reading.written_number(written)


@pytest.mark.parametrize(
    "value", [True, None, "7", [7], {}, float("nan"), float("inf"), 10**400, -(10**400)]
)
def test_number_refuses_what_is_not_a_finite_json_number(value: object) -> None:
    with pytest.raises(UnreadableReplyError):
        reading.number(value)


@pytest.mark.parametrize("places", [[0, 0], [0, 2], [-1, 0], [True, 0], [0.0, 1], ["0", 1], [1]])
def test_in_order_refuses_places_that_are_not_a_permutation(places: list[object]) -> None:
    with pytest.raises((UnreadableReplyError, ValueError)):
        reading.in_order(["a", "b"], places)


@pytest.mark.parametrize(
    "text",
    [
        *("", "7 8", "{'score': 7}", '{"score": NaN}', '{"score": 7, "score": 8}', '{"score": 7'),
        *("[" * 100_000, '{"a":' * 100_000, '{"score": %s}' % ("9" * 5000)),
    ],
)
def test_decoded_refuses_what_is_no_json_or_says_something_twice(text: str) -> None:
    with pytest.raises(UnreadableReplyError):
        reading.decoded(text)


def test_decoded_reads_json() -> None:
    assert reading.decoded(' {"score": [7, 0.5]} ') == {"score": [7, 0.5]}


@pytest.mark.parametrize(
    "usage", [None, 7, {}, {"total_tokens": -1}, {"total_tokens": True}, {"total_tokens": 10**400}]
)
def test_total_tokens_is_zero_when_the_count_is_unusable(usage: object) -> None:
    assert reading.total_tokens({"usage": usage}) == 0


def test_total_tokens_is_what_the_service_counted() -> None:
    assert reading.total_tokens(json.loads('{"usage": {"total_tokens": 31}}')) == 31


def test_mean_scores_averages_the_votes_that_an_item_has() -> None:
    votes = [
        (WireRequest("/", {}, indices=(0, 1, 2)), Reply([1.0, 0.5, None])),
        (WireRequest("/", {}, indices=(2, 0)), Reply([None, 0.0])),
        (WireRequest("/", {}, indices=(1,)), Reply([1.0])),
        (WireRequest("/", {}, indices=(0,)), Reply([0.5])),
    ]
    assert mean_scores(votes, num_items=4) == [0.5, 0.75, None, None]
