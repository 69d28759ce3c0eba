import json
from typing import Any

import pytest

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.api.protocols import make_protocol
from trl_grpo_ext.rewards.api.wire import Item, UnreadableReplyError, WireRequest

ITEM = Item("What is 2 + 2?", "It is 4.", columns={"answer": "4"})


def ask(item: Item = ITEM, **options: Any) -> tuple[Any, WireRequest]:
    judge = make_protocol("openai_chat", model="judge", **options)
    [request] = judge.requests([item])
    return judge, request


def reply(content: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content}, "finish_reason": "stop"}], **more}


def score(content: str, **options: Any) -> float | None:
    judge, request = ask(**options)
    [found] = judge.parse(request, reply(content.format(**request.expected))).scores
    return found


def test_the_body_is_a_chat_completion() -> None:
    _, request = ask(rubric="Is it right?", seed=3, extra={"top_p": 0.5})
    system, user = request.payload["messages"]
    assert request.path == "/chat/completions"
    assert set(request.payload) == {
        "model",
        "messages",
        "temperature",
        "max_tokens",
        "seed",
        "top_p",
    }
    assert system["role"] == "system"
    assert system["content"].endswith("Is it right?")
    assert user["role"] == "user"


def test_what_is_none_is_left_to_the_service() -> None:
    _, request = ask(temperature=None, max_tokens=None)
    assert set(request.payload) == {"model", "messages"}


def test_question_reference_and_response_are_fenced() -> None:
    _, request = ask(reference_column="answer")
    mark = request.expected["mark"]
    assert (
        f"<question-{mark}>\nWhat is 2 + 2?\n</question-{mark}>\n\n"
        f"<reference-{mark}>\n4\n</reference-{mark}>\n\n"
        f"<response-{mark}>\nIt is 4.\n</response-{mark}>"
    ) in request.payload["messages"][1]["content"]


def test_a_conversation_is_one_text_in_the_fence() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    _, request = ask(Item(chat, "4"))
    mark = request.expected["mark"]
    assert (
        f"<question-{mark}>\nsystem: Be brief.\nuser: 2 + 2?\n\n</question-{mark}>"
        in request.payload["messages"][1]["content"]
    )


def test_the_same_item_is_asked_in_the_same_bytes() -> None:
    assert json.dumps(ask()[1].payload) == json.dumps(ask()[1].payload)


def test_a_row_without_its_reference_is_not_asked_about() -> None:
    judge = make_protocol("openai_chat", model="judge", reference_column="answer")
    items = [Item("?", "4", columns={"answer": None}), ITEM]
    assert [request.indices for request in judge.requests(items)] == [(1,)]
    with pytest.raises(RewardError, match="got no column 'answer'"):
        judge.requests([Item("?", "4")])
    assert judge.required_columns == {"answer"}


def test_a_marked_verdict_is_scaled_or_raw() -> None:
    verdict = "It is right, 9/10.\n<verdict-{mark}>7.5</verdict-{mark}>"
    assert score(verdict) == 0.75
    assert score(verdict, scale="raw") == 7.5
    assert score(verdict, score_range=[5, 10]) == 0.5


def test_the_example_in_the_question_is_no_verdict() -> None:
    judge, request = ask()
    with pytest.raises(UnreadableReplyError):
        judge.parse(request, reply(request.payload["messages"][1]["content"]))


@pytest.mark.parametrize("verdict", ["7/10", "11", "-1", "NaN", "1e999", "７", "7.5 or 8", ""])
def test_a_verdict_that_is_no_score_is_unreadable(verdict: str) -> None:
    with pytest.raises(UnreadableReplyError):
        score("<verdict-{mark}>" + verdict + "</verdict-{mark}>")


def test_a_json_verdict_is_asked_for_by_its_schema() -> None:
    judge, request = ask(verdict="json_schema")
    schema = request.payload["response_format"]["json_schema"]
    assert request.payload["response_format"]["type"] == "json_schema"
    assert schema["strict"] is True
    assert schema["schema"] == {
        "type": "object",
        "properties": {"reasoning": {"type": "string"}, "score": {"type": "number"}},
        "required": ["reasoning", "score"],
        "additionalProperties": False,
    }
    assert "<verdict" not in request.payload["messages"][1]["content"]
    body = reply('{"reasoning": "I say 3, no, 8.", "score": 8}', usage={"total_tokens": 50})
    assert judge.parse(request, body).scores == [0.8]
    assert judge.parse(request, body).tokens == 50


@pytest.mark.parametrize(
    "content", ['{"score": "8"}', '{"score": true}', '```json\n{"score": 8}\n```', "8"]
)
def test_a_json_verdict_is_read_strictly(content: str) -> None:
    judge, request = ask(verdict="json_schema")
    with pytest.raises(UnreadableReplyError):
        judge.parse(request, reply(content))


def test_a_verdict_in_words_is_one_of_the_labels() -> None:
    options = {"labels": {"yes": 1, "no": 0}, "score_range": [0, 1]}
    assert score("<verdict-{mark}>Yes</verdict-{mark}>", **options) == 1.0
    judge, request = ask(verdict="json_schema", **options)
    enum = request.payload["response_format"]["json_schema"]["schema"]["properties"]["score"]
    assert enum == {"type": "string", "enum": ["yes", "no"]}
    assert judge.parse(request, reply('{"score": "no"}')).scores == [0.0]


def test_a_pattern_reads_the_format_of_a_judge() -> None:
    options = {"verdict": "pattern", "verdict_pattern": r"\[RESULT\] (\S+)", "score_range": [1, 5]}
    assert score("Fair. [RESULT] 2", **options) == 0.25
    with pytest.raises(UnreadableReplyError):
        score("[RESULT] 2 [RESULT] 5", **options)


def test_a_cut_off_verdict_is_unreadable() -> None:
    judge, request = ask()
    body = reply("<verdict-{mark}>7</verdict-{mark}>".format(**request.expected))
    body["choices"][0]["finish_reason"] = "length"
    with pytest.raises(UnreadableReplyError, match="did not finish"):
        judge.parse(request, body)
