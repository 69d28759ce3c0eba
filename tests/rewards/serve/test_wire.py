from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_grpo_ext.rewards.serve.settings import Limits
from trl_grpo_ext.rewards.serve.wire import (
    Classified,
    ClassifyRequest,
    RefusedError,
    RewardRequest,
    Rewards,
    classify_reply,
    read_classify_request,
    read_reward_request,
    reward_reply,
)

SMALL = Limits(texts=2, characters=5)


def reward_request(**asked: Any) -> RewardRequest:
    return read_reward_request(json.dumps(asked).encode(), limits=SMALL)


def classify_request(**asked: Any) -> ClassifyRequest:
    return read_classify_request(json.dumps(asked).encode(), limits=SMALL)


def test_requests_are_read() -> None:
    asked = reward_request(query=["ab", "cd"], prompts=["a", "c"], labels=[1, None], more=0)
    assert asked == RewardRequest(["ab", "cd"], ["a", "c"], [1, None])
    assert reward_request(query=["ab"]) == RewardRequest(["ab"], None, None)
    assert classify_request(input="a") == ClassifyRequest(["a"], None, True)
    assert classify_request(input=["a", "b"], model="m") == ClassifyRequest(["a", "b"], "m", True)
    assert not classify_request(input="a", use_activation=False).use_activation
    assert not classify_request(input="a", activation=False).use_activation
    assert classify_request(input="a", use_activation=None).use_activation


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ({}, 400, "`query` is no list with texts"),
        ({"query": []}, 400, "`query` is no list with texts"),
        ({"query": "ab"}, 400, "`query` is no list"),
        ({"query": ["a", 1]}, 400, r"`query`\[1\] is no Unicode text"),
        ({"query": ["\ud800"]}, 400, r"`query`\[0\] is no Unicode text"),
        ({"query": ["a"] * 3}, 413, "3 texts, above the limit of 2 a request"),
        ({"query": ["123456"]}, 413, r"`query`\[0\] has 6 characters, .* of 5"),
        ({"query": ["a"], "prompts": ["123456"]}, 413, r"`prompts`\[0\] has 6"),
        ({"query": ["a"], "prompts": ["a", "b"]}, 400, "`prompts` has 2 entries and `query` has 1"),
        ({"query": ["a"], "labels": []}, 400, "`labels` has 0 entries"),
        ({"query": ["a"], "labels": "a"}, 400, "`labels` is no list"),
    ],
)
def test_reward_requests_of_another_shape_are_refused(
    asked: dict[str, Any], status: int, said: str
) -> None:
    with pytest.raises(RefusedError, match=said) as caught:
        reward_request(**asked)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"input": [[1, 2]]}, "Send texts, not token ids"),
        ({"input": "a", "model": 7}, "`model` is no text"),
        ({"input": "a", "use_activation": 1}, "neither true nor false"),
    ],
)
def test_classify_requests_of_another_shape_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        classify_request(**asked)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b'{"query": NaN}',
        b'{"labels": [-Infinity]}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"9" * 10_000,
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RefusedError, match=r"^The body "):
        read_reward_request(body, limits=Limits())


@settings(deadline=None)  # a busy machine is no failure
@given(body=st.binary(max_size=60))
def test_bytes_are_read_or_refused(body: bytes) -> None:
    for read in (read_reward_request, read_classify_request):
        with pytest.raises(RefusedError):
            read(body, limits=SMALL)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=7),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
)


@settings(deadline=None, max_examples=50)  # a busy machine is no failure
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("query", "prompts", "labels"), anything)))
def test_reward_requests_that_are_read_have_lists_of_one_length(asked: dict[str, Any]) -> None:
    try:
        read = reward_request(**asked)
    except RefusedError:
        return
    assert 0 < len(read.query) <= SMALL.texts
    assert all(len(text) <= SMALL.characters for text in read.query)
    for values in (read.prompts, read.labels):
        assert values is None or len(values) == len(read.query)


def test_replies_hold_null_for_what_is_no_number() -> None:
    inf, nan = float("inf"), float("nan")
    assert reward_reply(Rewards([1.5, None, nan], {"mean": inf, "n": 3.0})) == {
        "rewards": [1.5, None, None],
        "scores": [1.5, None, None],
        "extra_logs": {"mean": None, "n": 3.0},
    }
    assert classify_reply(
        [Classified([0.25, nan], 3, "good"), Classified([-inf], 4)], model="m"
    ) == {
        "object": "list",
        "model": "m",
        "data": [
            {"index": 0, "label": "good", "probs": [0.25, None], "num_classes": 2},
            {"index": 1, "label": None, "probs": [None], "num_classes": 1},
        ],
        "usage": {"prompt_tokens": 7, "total_tokens": 7, "completion_tokens": 0},
    }
