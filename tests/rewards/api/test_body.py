"""Replies are untrusted: they give one finite number a completion, or are unreadable."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rewards.api.services import Lengths

from trl_grpo_ext.rewards.api.body import decode_body, has_non_finite, read_reply
from trl_grpo_ext.rewards.api.wire import Reply, UnreadableReplyError, WireRequest

REQUEST = WireRequest("/lengths", {}, indices=(0, 1))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b'{"scores": [1, 2]',
        b'{"scores": [1, NaN]}',
        b'{"scores": [1, Infinity]}',
        b'{"scores": [1, 1e999]}',
        b'{"scores": [1, -1e999]}',
        b'{"scores": [1, ' + b"9" * 5000 + b"]}",
        b'{"scores": [1, 2], "scores": [3, 4]}',
        b'{"scores": [1, {"a": 1, "a": 2}]}',
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"scores": "\xff\xfe"}',
        '{"scores": [1]}'.encode("utf-16"),
    ],
)
def test_body_that_is_not_strict_json_is_unreadable(body: bytes) -> None:
    with pytest.raises(UnreadableReplyError):
        decode_body(body)


@given(st.binary())
def test_any_bytes_are_json_or_unreadable(body: bytes) -> None:
    try:
        value = decode_body(body)
    except UnreadableReplyError:
        return
    assert value == json.loads(body)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_json_is_scores_or_unreadable(value: Any) -> None:
    for body in (value, {"scores": value}, {"scores": [0, value]}, {"scores": [0, 1], "a": value}):
        try:
            reply = read_reply(Lengths(), REQUEST, json.dumps(body).encode())
        except UnreadableReplyError:
            continue
        assert [type(score) in (float, type(None)) for score in reply.scores] == [True, True]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1], "scores 1 completions, not 2"),
        ([1, 2, 3], "scores 3 completions, not 2"),
        ([1, "2"], "has a str for a score"),
        ([1, True], "has a bool for a score"),
        ([1, [2]], "has a list for a score"),
        (7, "unexpected shape (TypeError)"),
    ],
)
def test_scores_of_a_wrong_shape_are_unreadable(scores: object, message: str) -> None:
    with pytest.raises(UnreadableReplyError) as caught:
        read_reply(Lengths(), REQUEST, json.dumps({"scores": scores}).encode())
    assert message in str(caught.value)


def test_integer_beyond_every_float_is_not_finite() -> None:
    reply = read_reply(Lengths(), REQUEST, b'{"scores": [1, ' + b"9" * 4000 + b"]}")
    assert reply.scores == [1.0, math.inf]
    assert has_non_finite(reply.scores)


def test_scores_are_floats_and_what_the_service_left_out_is_none() -> None:
    reply = read_reply(Lengths(), REQUEST, b'{"scores": [2, null], "tokens": 12}')
    assert reply == Reply([2.0, None], tokens=12)
    assert not has_non_finite(reply.scores)


@pytest.mark.parametrize("tokens", [-1, True, 10**12, "12", None, 1.5])
def test_tokens_that_cannot_be_are_not_believed(tokens: object) -> None:
    body = json.dumps({"scores": [1, 2], "tokens": tokens}).encode()
    assert read_reply(Lengths(), REQUEST, body).tokens == 0
