"""Malformed replies: read right, or unreadable; never a wrong score, never another exception."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_grpo_ext.rewards.api.protocols import PROTOCOLS, make_protocol
from trl_grpo_ext.rewards.api.wire import Item, Reply, UnreadableReplyError, WireRequest

FEW = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


@dataclass(frozen=True)
class Case:
    """A protocol, a valid reply, and the scores in it."""

    name: str
    options: dict[str, Any]
    num_items: int
    body: Callable[[WireRequest], Any]
    scores: list[float]
    # Lists of these keys may have any length, so that a change of it cannot be noticed.
    free: tuple[str, ...] = ()

    def asked(self) -> tuple[Any, WireRequest]:
        completions = ["```\nprint(1)\n```", "b", "c"][: self.num_items]
        items = [Item("?", text, columns={"out": "1"}) for text in completions]
        protocol = make_protocol(self.name, **self.options)
        return protocol, protocol.requests(items)[0]


def chat(content: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return {"id": "1", "choices": choices, "usage": {"total_tokens": 9}}


def marked(verdict: str) -> Callable[[WireRequest], Any]:
    return lambda request: chat(
        f"Hm.\n<verdict-{request.expected['mark']}>{verdict}</verdict-{request.expected['mark']}>"
    )


def data(*entries: dict[str, Any]) -> Callable[[WireRequest], Any]:
    return lambda request: {"data": list(entries), "usage": {"total_tokens": 9}}


RUN = {"status": "Finished", "return_code": 0, "stdout": "1\n", "stderr": ""}
RANKS = {"reasoning": "Hm.", "ranking": [2, 3, 1]}
MODEL = {"model": "m"}
CASES = {
    "openai_chat": Case("openai_chat", MODEL, 1, marked("7"), [0.7]),
    "openai_chat json": Case(
        "openai_chat",
        MODEL | {"verdict": "json_schema"},
        1,
        lambda request: chat(json.dumps({"reasoning": "Hm.", "score": 7})),
        [0.7],
    ),
    "openai_ranking": Case("openai_ranking", MODEL, 3, marked("2, 3, 1"), [0.0, 1.0, 0.5]),
    "openai_ranking json": Case(
        "openai_ranking",
        MODEL | {"verdict": "json_schema"},
        3,
        lambda request: chat(json.dumps(RANKS)),
        [0.0, 1.0, 0.5],
    ),
    "nim": Case("nim", MODEL | {"weights": {"a": 1.0}}, 1, lambda _: chat("a:1.5,b:2.0"), [1.5]),
    "vllm_classify": Case(
        "vllm_classify",
        MODEL | {"send": "texts", "class_index": 0},
        2,
        data(
            {"index": 1, "probs": [0.25, 0.75], "num_classes": 2},
            {"index": 0, "probs": [0.5, 0.5], "num_classes": 2},
        ),
        [0.5, 0.25],
    ),
    "vllm_pooling": Case(
        "vllm_pooling",
        MODEL | {"send": "texts", "class_index": 1},
        2,
        data({"index": 1, "data": [[0.5, 0.5], [0.0, 1.0]]}, {"index": 0, "data": [[0.75, 0.25]]}),
        [0.25, 0.5],
        free=("data.data",),
    ),
    "vllm_score": Case(
        "vllm_score",
        MODEL,
        3,
        data(*({"index": index, "score": index / 4} for index in (2, 0, 1))),
        [0.0, 0.25, 0.5],
    ),
    "sglang": Case(
        "sglang", MODEL, 2, lambda _: [{"embedding": [0.5]}, {"embedding": [-2.0]}], [0.5, -2.0]
    ),
    "sglang embeddings": Case(
        "sglang",
        MODEL | {"endpoint": "embeddings"},
        2,
        data({"index": 1, "embedding": [0.5]}, {"index": 0, "embedding": [-2.0]}),
        [-2.0, 0.5],
    ),
    "tei_predict": Case(
        "tei_predict",
        {"label": "good"},
        2,
        lambda _: [
            [{"label": "good", "score": 0.75}, {"label": "bad", "score": 0.25}],
            [{"label": "bad", "score": 0.875}, {"label": "good", "score": 0.125}],
        ],
        [0.75, 0.125],
    ),
    "tei_rerank": Case(
        "tei_rerank",
        {},
        3,
        lambda _: [{"index": index, "score": float(index)} for index in (2, 1, 0)],
        [0.0, 1.0, 2.0],
    ),
    "openrlhf": Case("openrlhf", {}, 3, lambda _: {"rewards": [0.5, 1.0, -1.0]}, [0.5, 1.0, -1.0]),
    "sandbox_fusion": Case(
        "sandbox_fusion",
        {"column": "out"},
        1,
        lambda _: {"status": "Success", "message": "", "run_result": RUN},
        [1.0],
    ),
    "generic_json": Case(
        "generic_json",
        {
            "template": {"a": "{completion}"},
            "score_path": "out[*].s",
            "index_path": "out[*].index",
            "batch_size": 3,
        },
        3,
        lambda _: {"out": [{"index": index, "s": index + 0.5} for index in (1, 2, 0)]},
        [0.5, 1.5, 2.5],
    ),
}

# In place of a value: of another type, or no finite number; none of them is a valid score.
JUNK: list[Any] = [
    *(None, True, False, [], {}, "", "NaN", "Infinity", "1e999", "7/10", "７", "7.5 or 8"),
    *(float("nan"), float("inf"), float("-inf"), 10**400, -(10**400), [[[[[]]]]], {"a": {"a": {}}}),
]


def nested(depth: int) -> Any:
    value: Any = 1.0
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any, keys: tuple[str, ...] = ()) -> list[tuple[Any, Any, str]]:
    """Every (container, key, path of names) of a JSON value."""
    found = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in pairs:
        names = (*keys, key) if isinstance(value, dict) else keys
        found.append((value, key, ".".join(names)))
        if isinstance(child, dict | list):
            found += places(child, names)
    return found


def can_be_shuffled(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and {"index", "label"} & set(one) for one in value
    )


@st.composite
def mutated(draw: st.DrawFn, body: Any, free: tuple[str, ...]) -> Any:
    """A copy of a reply with one thing wrong with it, or shuffled."""
    body = {"root": copy.deepcopy(body)}
    container, key, path = draw(st.sampled_from(places(body)))
    in_free_list = isinstance(container, list) and path.removeprefix("root.") in free
    kind = draw(st.sampled_from(["junk", "wrap", "text", "deep", "drop", "double", "shuffle"]))
    value = container[key]
    if kind == "junk" and not (isinstance(value, str) and "content" not in path):
        container[key] = draw(st.sampled_from(JUNK))
    elif kind == "wrap":
        container[key] = draw(st.sampled_from([[value], {"value": value}, [value, value]]))
    elif kind == "text" and isinstance(value, int | float):
        container[key] = str(value)
    elif kind == "deep":
        container[key] = nested(draw(st.sampled_from([2, 50, 3000])))
    elif kind == "drop" and key != "root" and not in_free_list:
        del container[key]
    elif kind == "double" and isinstance(container, list) and not in_free_list:
        container.insert(draw(st.integers(0, len(container))), value)
    elif kind == "shuffle" and can_be_shuffled(value):
        container[key] = draw(st.permutations(value))
    return body["root"]


def outcome(protocol: Any, request: WireRequest, body: Any) -> Reply | None:
    """The reply, or ``None`` for an unreadable one."""
    try:
        reply: Reply = protocol.parse(request, body)
    except UnreadableReplyError:
        return None
    assert len(reply.scores) == len(request.indices)
    assert all(
        score is None or (type(score) is float and math.isfinite(score)) for score in reply.scores
    )
    assert 0 <= reply.tokens < 10**9
    return reply


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_valid_reply_is_read(case: Case) -> None:
    protocol, request = case.asked()
    assert protocol.parse(request, case.body(request)).scores == case.scores


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@FEW
@given(draw=st.data())
def test_a_mutated_reply_is_read_right_or_unreadable(case: Case, draw: st.DataObject) -> None:
    protocol, request = case.asked()
    reply = outcome(protocol, request, draw.draw(mutated(case.body(request), case.free)))
    if reply is not None:
        pairs = zip(reply.scores, case.scores, strict=True)
        said_null = case.name == "generic_json"
        assert all(found == wanted or (found is None and said_null) for found, wanted in pairs)


@pytest.mark.parametrize("name", ["openai_chat", "openai_chat json", "openai_ranking"])
@FEW
@given(draw=st.data())
def test_a_verdict_that_is_cut_or_repeated_is_read_right_or_unreadable(
    name: str, draw: st.DataObject
) -> None:
    protocol, request = CASES[name].asked()
    body = CASES[name].body(request)
    content = body["choices"][0]["message"]["content"]
    start, stop = sorted(draw.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    changed = draw.draw(
        st.sampled_from(
            [
                content[:stop],
                content[start:],
                content[:start] + content[stop:],
                content * 2,
                content + content[start:stop],
                content[:stop] + " " + content[stop:],
            ]
        )
    )
    body["choices"][0]["message"]["content"] = changed
    reply = outcome(protocol, request, body)
    assert reply is None or reply.scores == CASES[name].scores


def any_json(keys: list[str]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(keys) | st.text(max_size=3)
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    return st.recursive(
        leaves | st.sampled_from(["stop", "Success", "Failed", "Finished", *JUNK[5:12]]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
        max_leaves=12,
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@FEW
@given(draw=st.data())
def test_any_json_is_scores_or_unreadable(case: Case, draw: st.DataObject) -> None:
    protocol, request = case.asked()
    keys = [path.rpartition(".")[2] for _, _, path in places({"root": case.body(request)})]
    outcome(protocol, request, draw.draw(any_json(sorted(set(keys) - {"root"}))))


def test_every_protocol_has_a_case() -> None:
    assert {case.name for case in CASES.values()} == set(PROTOCOLS)
