from typing import Any

import pytest

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.api.protocols import make_protocol
from trl_grpo_ext.rewards.api.protocols.json_path import follow, path_steps
from trl_grpo_ext.rewards.api.wire import Item, UnreadableReplyError

CHAT = [{"role": "user", "content": "2 + 2?"}]
ITEMS = [Item(CHAT, "{answer}", {"answer": 4, "id": "a"}), Item("?", "5", {"answer": 4, "id": "b"})]


def test_placeholders_are_replaced_once_and_keep_their_type() -> None:
    template = {
        "text": "{prompt}|{completion}|{answer}",
        "chat": "{messages}",
        "nested": [{"gold": "{answer}"}, 7, None, "{not a name}"],
    }
    mine = make_protocol("generic_json", template=template, score_path="score", path="/judge")
    first, second = mine.requests(ITEMS)
    assert (first.path, first.indices, second.indices) == ("/judge", (0,), (1,))
    assert first.payload == {
        "text": "user: 2 + 2?\n|{answer}|4",
        "chat": CHAT,
        "nested": [{"gold": 4}, 7, None, "{not a name}"],
    }
    assert second.payload["text"] == "?|5|4"
    assert mine.required_columns == {"answer"}


def test_in_batches_a_placeholder_is_a_list_and_sorted_replies_are_put_in_order() -> None:
    mine = make_protocol(
        "generic_json",
        template={"replies": "{completion}", "ids": "{id}", "k": 1},
        score_path="out[*].score",
        index_path="out[*].place",
        batch_size=2,
    )
    [request] = mine.requests(ITEMS)
    assert request.payload == {"replies": ["{answer}", "5"], "ids": ["a", "b"], "k": 1}
    out = [{"place": 1, "score": 0.5}, {"place": 0, "score": None}]
    assert mine.parse(request, {"out": out}).scores == [None, 0.5]
    for wrong in (out[:1], [out[0], out[0]], [*out, out[0]]):
        with pytest.raises(UnreadableReplyError):
            mine.parse(request, {"out": wrong})


def score(value: Any, **options: Any) -> float | None:
    template = {"a": "{completion}"}
    mine = make_protocol("generic_json", template=template, score_path="[0].s", **options)
    [request] = mine.requests(ITEMS[:1])
    [found] = mine.parse(request, [{"s": value}]).scores
    return found


def test_scores_are_raw_or_checked_and_scaled() -> None:
    assert score(-3) == -3.0
    assert score(3, score_range=[1, 5]) == 3.0
    assert score(3, score_range=[1, 5], scale="unit") == 0.5
    assert score(None) is None
    with pytest.raises(UnreadableReplyError):
        score(6, score_range=[1, 5])


@pytest.mark.parametrize("value", ["1", True, [1], {}, float("nan"), float("inf"), 10**400])
def test_what_is_no_number_is_unreadable(value: object) -> None:
    with pytest.raises(UnreadableReplyError):
        score(value)


def test_a_missing_column_is_an_error() -> None:
    mine = make_protocol("generic_json", template={"a": "{gold}"}, score_path="score")
    with pytest.raises(RewardError, match=r"got no column 'gold'.*Set `template`"):
        mine.requests(ITEMS)


@pytest.mark.parametrize(
    ("path", "steps"),
    [
        ("score", ["score"]),
        ("a.b-c.d e", ["a", "b-c", "d e"]),
        ("[0]", [0]),
        ("a[10].b", ["a", 10, "b"]),
        ("[*].score", [None, "score"]),
        ("a[0][*]", ["a", 0, None]),
    ],
)
def test_path_steps_are_keys_places_and_each(path: str, steps: list[object]) -> None:
    assert path_steps(path) == steps


@pytest.mark.parametrize(
    "path", ["", ".", ".a", "a.", "a..b", "a[", "a[-1]", "a[01]", "a[x]", "[0]a", "a.[0]", "[*][*]"]
)
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="is "):
        path_steps(path)


@pytest.mark.parametrize("value", [None, [], {}, {"a": 1}, {"a": []}, {"a": [1]}, {"a": [{}]}])
def test_a_path_that_leads_nowhere_is_unreadable(value: object) -> None:
    with pytest.raises(UnreadableReplyError):
        follow(path_steps("a[0].b"), value)
