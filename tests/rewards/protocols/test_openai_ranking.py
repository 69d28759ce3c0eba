import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_grpo_ext.rewards.api.protocols import make_protocol
from trl_grpo_ext.rewards.api.protocols.openai_ranking import score_ranks
from trl_grpo_ext.rewards.api.wire import Item, UnreadableReplyError, WireRequest, mean_scores

TEXTS = ("one", "two", "three", "four")
ITEMS = [Item("Count.", text) for text in TEXTS]


def reply(content: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}


def verdict(request: WireRequest, written: str) -> dict[str, Any]:
    mark = request.expected["mark"]
    return reply(f"Hm. <verdict-{mark}>{written}</verdict-{mark}>")


def responses(request: WireRequest) -> list[str]:
    """The texts in the order in which the judge sees them."""
    content = request.payload["messages"][1]["content"]
    mark = request.expected["mark"]
    return re.findall(rf"<response_\d+-{mark}>\n(.*?)\n</response_\d+-{mark}>", content, re.S)


def scores_with(judge: Any, items: list[Item], rank: Any) -> list[float | None]:
    """The scores by a judge that is a function from texts to the numbers, best first."""
    answers = []
    for request in judge.requests(items):
        written = ", ".join(str(number) for number in rank(responses(request)))
        answers.append((request, judge.parse(request, verdict(request, written))))
    return mean_scores(answers, num_items=len(items))


def by_length(texts: list[str]) -> list[int]:
    return [texts.index(text) + 1 for text in sorted(texts, key=len)]


def first_is_best(texts: list[str]) -> list[int]:
    return list(range(1, len(texts) + 1))


def test_the_scores_follow_the_ranks_whatever_the_order() -> None:
    items = [Item("Count.", "x" * length) for length in (3, 1, 5, 2, 4)]
    for votes in (1, 2, 3):
        judge = make_protocol("openai_ranking", model="judge", votes=votes)
        assert scores_with(judge, items, by_length) == pytest.approx([0.5, 1.0, 0.0, 0.75, 0.25])


@pytest.mark.parametrize("votes", [2, 4])
def test_an_even_number_of_votes_cancels_a_taste_for_places(votes: int) -> None:
    judge = make_protocol("openai_ranking", model="judge", votes=votes)
    assert scores_with(judge, ITEMS, first_is_best) == pytest.approx([0.5] * 4)
    one_vote = make_protocol("openai_ranking", model="judge", votes=1)
    assert sorted(scores_with(one_vote, ITEMS, first_is_best)) == pytest.approx(
        [0, 1 / 3, 2 / 3, 1]
    )


def test_the_order_is_shuffled_by_the_texts_and_reversed_for_each_second_vote() -> None:
    judge = make_protocol("openai_ranking", model="judge", votes=4)
    orders = [request.indices for request in judge.requests(ITEMS)]
    assert orders[1] == orders[0][::-1]
    assert orders[3] == orders[2][::-1]
    assert len(set(orders)) == 4
    again = [request.payload for request in judge.requests(ITEMS)]
    assert again == [request.payload for request in judge.requests(ITEMS)]
    shown = {
        responses(judge.requests(list(order))[0])[0] for order in itertools.permutations(ITEMS)
    }
    assert len(shown) == 1  # the order in which completions arrive does not matter


def test_each_group_is_ranked_by_itself() -> None:
    items = [Item("Count.", "a", group=4), Item("Sing.", "la", group=9)] * 2
    items += [Item("Count.", "bb", group=4), Item("Sing.", "lala", group=9)]
    judge = make_protocol("openai_ranking", model="judge", votes=1)
    first, second = judge.requests(items)
    assert (sorted(first.indices), sorted(second.indices)) == ([0, 2, 4], [1, 3, 5])
    assert scores_with(judge, items, by_length) == [1, 1, 1, 1, 0, 0]


def test_the_same_text_is_shown_once_and_shares_its_score() -> None:
    items = [Item("Count.", text) for text in ("two", "one!!", "two", "three..")]
    judge = make_protocol("openai_ranking", model="judge")
    assert all(len(responses(request)) == 3 for request in judge.requests(items))
    assert scores_with(judge, items, by_length) == [1, 0.5, 1, 0]


def test_a_single_text_is_not_ranked() -> None:
    judge = make_protocol("openai_ranking", model="judge")
    assert judge.requests([Item("Count.", "one"), Item("Count.", "one")]) == []


@pytest.mark.parametrize(
    "written",
    [
        *("", "1, 2, 3", "1, 2, 3, 4, 5", "1, 1, 2, 3", "0, 1, 2, 3", "1 2 3 4", "1, 2, 3, four"),
        *("1, 2, 3, 4.0", "1, 2, 3, ４", "-1, 2, 3, 4", "1, 2 = 3, 4", "4 > 3 > 2 > 1", "1,2,3,4,"),
    ],
)
def test_what_is_no_permutation_is_unreadable(written: str) -> None:
    judge = make_protocol("openai_ranking", model="judge", votes=1)
    [request] = judge.requests(ITEMS)
    with pytest.raises(UnreadableReplyError):
        judge.parse(request, verdict(request, written))


def test_scores_become_ranks_and_ties_share_theirs_or_are_refused() -> None:
    judge = make_protocol("openai_ranking", model="judge", votes=1, judge_by="scores")
    [request] = judge.requests(ITEMS)
    assert judge.parse(request, verdict(request, "2, 9.5, 7, 7")).scores == [0, 1, 0.5, 0.5]
    assert judge.parse(request, verdict(request, "7, 7, 7, 7")).scores == [0.5] * 4
    strict = make_protocol(
        "openai_ranking", model="judge", votes=1, judge_by="scores", ties="refuse"
    )
    assert strict.parse(request, verdict(request, "2, 9.5, 7, 6")).scores == pytest.approx(
        [0, 1, 2 / 3, 1 / 3]
    )
    for written in ("2, 9, 7, 7", "2, 9, 7", "2, 9, 7, 11", "2, 9, 7, NaN", "2, 9, 7, 6, 5"):
        with pytest.raises(UnreadableReplyError):
            strict.parse(request, verdict(request, written))


def test_a_json_ranking_is_asked_for_by_its_schema() -> None:
    judge = make_protocol("openai_ranking", model="judge", votes=1, verdict="json_schema")
    [request] = judge.requests(ITEMS)
    schema = request.payload["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["ranking"] == {"type": "array", "items": {"type": "integer"}}
    body = reply(json.dumps({"reasoning": "Hm.", "ranking": [2, 1, 4, 3]}))
    assert judge.parse(request, body).scores == pytest.approx([2 / 3, 1, 0, 1 / 3])
    for ranking in ([2, 1, 4], [2, 1, 4, 4], [2, 1, 4, 3.0], [2, 1, 4, True], "2143", None):
        with pytest.raises(UnreadableReplyError):
            judge.parse(request, reply(json.dumps({"ranking": ranking})))


@given(st.lists(st.integers(0, 10), min_size=2, max_size=8))
@settings(deadline=None)
def test_mean_ranks_are_those_of_sorting(scores: list[int]) -> None:
    best_first = sorted(scores, reverse=True)
    wanted = []
    for score in scores:
        shared = [place for place, other in enumerate(best_first, start=1) if other == score]
        wanted.append(sum(shared) / len(shared))
    assert score_ranks(scores, len(scores), ties="mean") == wanted
