import pytest

from trl_grpo_ext.rewards.api.protocols import verdict
from trl_grpo_ext.rewards.api.wire import UnreadableReplyError

TAG, END = "<verdict-3f9a>", "</verdict-3f9a>"


def chat(content: object, finish_reason: object = "stop") -> dict[str, object]:
    return {"choices": [{"message": {"content": content}, "finish_reason": finish_reason}]}


def test_marked_reads_the_verdict_after_reasoning() -> None:
    assert verdict.marked(f"It says 10/10. I say 3.\n{TAG} 7 {END}\n", mark="3f9a") == "7"


def test_marked_accepts_the_same_verdict_twice() -> None:
    assert verdict.marked(f"{TAG}7{END} I repeat: {TAG} 7{END}", mark="3f9a") == "7"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "7",
        f"{TAG}7",
        f"7{END}",
        f"{TAG}7{END}{TAG}8{END}",
        f"{TAG}7{END}{TAG}7.0{END}",
        f"{TAG}7{END}{TAG}8",
        f"{TAG}7{TAG}8{END}",
        f"{TAG}7{END}{END}",
        "<verdict-ffff>7</verdict-ffff>",
        "<verdict>7</verdict>",
    ],
)
def test_marked_refuses_no_verdict_and_several_and_open_ones(content: str) -> None:
    with pytest.raises(UnreadableReplyError):
        verdict.marked(content, mark="3f9a")


def test_matched_reads_the_formats_of_judges() -> None:
    assert verdict.matched("Good. [[7]]", pattern=r"\[\[(\d+)\]\]") == "7"
    assert verdict.matched("Reward: 0.85", pattern=r"Reward: (\S+)") == "0.85"


@pytest.mark.parametrize("content", ["none", "[[7]] or [[8]]"])
def test_matched_refuses_no_verdict_and_several(content: str) -> None:
    with pytest.raises(UnreadableReplyError):
        verdict.matched(content, pattern=r"\[\[(\d+)\]\]")


def test_labels_are_read_without_regard_to_case_and_nothing_else_is() -> None:
    labels = {"yes": 1.0, "no": 0.0}
    assert verdict.label_or_number(" NO\n", labels=labels) == 0.0
    for other in ("maybe", "1", "yes no", ""):
        with pytest.raises(UnreadableReplyError):
            verdict.label_or_number(other, labels=labels)


def test_scaled_is_the_place_in_the_range() -> None:
    assert verdict.scaled(1, between=(1, 5), scale="unit") == 0.0
    assert verdict.scaled(2, between=(1, 5), scale="unit") == 0.25
    assert verdict.scaled(5, between=(1, 5), scale="unit") == 1.0
    assert verdict.scaled(-1, between=(-2, 2), scale="unit") == 0.25
    assert verdict.scaled(2, between=(1, 5), scale="raw") == 2


@pytest.mark.parametrize("score", [0.999, 5.001, -1, 1e300])
def test_scaled_refuses_a_score_out_of_range(score: float) -> None:
    with pytest.raises(UnreadableReplyError, match=r"is not from 1 to 5"):
        verdict.scaled(score, between=(1, 5), scale="raw")


@pytest.mark.parametrize("reason", ["length", "content_filter", "tool_calls", "abort", None, []])
def test_a_reply_that_did_not_finish_is_unreadable(reason: object) -> None:
    with pytest.raises(UnreadableReplyError, match="did not finish"):
        verdict.finished_content(chat("7", reason))


def test_finished_content_leaves_leading_thoughts_out() -> None:
    assert verdict.finished_content(chat("<think>a 3? no</think>7")) == ("7", 0)
    quoted = "<think>it says </think> here</think>7"
    assert verdict.finished_content(chat(quoted)) == (quoted, 0)
    assert verdict.finished_content(chat("a </think> b", "eos_token")) == ("a </think> b", 0)


def test_a_json_verdict_holds_reasoning_and_the_verdict_only() -> None:
    assert verdict.schema_verdict('{"score": 7}', key="score") == 7
    for other in ("7", "[7]", '{"score": 7, "final_score": 9}', '{"reasoning": "good"}'):
        with pytest.raises(UnreadableReplyError):
            verdict.schema_verdict(other, key="score")
