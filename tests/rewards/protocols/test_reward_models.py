"""NIM, vLLM, SGLang, text-embeddings-inference and OpenRLHF: what is asked, what is read."""

from typing import Any

import pytest

from trl_grpo_ext.rewards.api.protocols import make_protocol
from trl_grpo_ext.rewards.api.wire import Item, Reply, UnreadableReplyError, WireRequest

CHAT = [{"role": "user", "content": "2 + 2?"}]
ITEMS = [Item("2 + 2 = ", "4"), Item("2 + 2 = ", "5"), Item("3 + 3 = ", "6")]


def requests(name: str, items: list[Item] = ITEMS, **options: Any) -> list[WireRequest]:
    return make_protocol(name, **options).requests(items)


def read(name: str, body: Any, items: list[Item] = ITEMS, **options: Any) -> Reply:
    protocol = make_protocol(name, **options)
    [request] = protocol.requests(items)
    return protocol.parse(request, body)


def nim_body(content: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content}}]}


def test_nim_passes_messages_on() -> None:
    first, second = requests("nim", [Item("2 + 2?", "4"), Item(CHAT, "5")], model="reward")
    assert (first.path, first.indices, second.indices) == ("/chat/completions", (0,), (1,))
    assert first.payload == {
        "model": "reward",
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4"},
        ],
    }
    assert second.payload["messages"] == [*CHAT, {"role": "assistant", "content": "5"}]


def test_nim_adds_up_weighted_attributes() -> None:
    body = nim_body("helpfulness:1.5, correctness:2.0,verbosity:-1.0")
    weights = {"helpfulness": 2.0, "verbosity": 0.5}
    assert read("nim", body, ITEMS[:1], model="m", weights=weights).scores == [2.5]


@pytest.mark.parametrize("content", ["reward:-7.5", "-7.5", " -7.5\n"])
def test_nim_reads_a_single_score_without_weights(content: str) -> None:
    assert read("nim", nim_body(content), ITEMS[:1], model="m").scores == [-7.5]


@pytest.mark.parametrize(
    "content",
    ["a:1,b:2", "", "a:", "a:1,a:1", "a:1,", ":1", "a:b:1", "a:NaN", "a:1e999", "good", "a:1 b:2"],
)
def test_nim_refuses_what_is_not_one_score(content: str) -> None:
    with pytest.raises(UnreadableReplyError):
        read("nim", nim_body(content), ITEMS[:1], model="m")


def test_nim_refuses_a_reply_without_a_weighted_attribute_or_with_an_infinite_sum() -> None:
    for content in ("a:1", "a:1e308,b:1e308"):
        with pytest.raises(UnreadableReplyError):
            read("nim", nim_body(content), ITEMS[:1], model="m", weights={"a": 9.0, "b": 9.0})


def test_vllm_classify_passes_messages_on_by_default() -> None:
    [request] = requests("vllm_classify", [Item(CHAT, "4")], model="m", use_activation=False)
    assert request.path == "/classify"
    assert request.payload == {
        "model": "m",
        "messages": [*CHAT, {"role": "assistant", "content": "4"}],
        "use_activation": False,
    }


def test_vllm_classify_sends_texts_in_batches() -> None:
    options = {"model": "m", "send": "texts", "turn": "<{role}>{content}", "batch_size": 2}
    first, second = requests(
        "vllm_classify",
        [*ITEMS[:2], Item(CHAT, "4")],
        **options,
        use_activation=True,
        activation_key="activation",
        add_special_tokens=False,
    )
    assert first.payload == {
        "model": "m",
        "input": ["2 + 2 = 4", "2 + 2 = 5"],
        "activation": True,
        "add_special_tokens": False,
    }
    assert second.payload["input"] == ["<user>2 + 2?<assistant>4"]
    assert (first.indices, second.indices) == ((0, 1), (2,))


def test_vllm_classify_puts_the_reply_in_order() -> None:
    data = [
        {"index": 2, "probs": [0.9, 0.1], "num_classes": 2},
        {"index": 0, "probs": [0.3, 0.7], "num_classes": 2},
        {"index": 1, "probs": [0.5, 0.5], "num_classes": 2},
    ]
    reply = read(
        "vllm_classify",
        {"data": data, "usage": {"total_tokens": 12}},
        model="m",
        send="texts",
        class_index=0,
    )
    assert reply.scores == [0.3, 0.5, 0.9]
    assert reply.tokens == 12


def test_vllm_classify_does_not_guess_a_class_or_use_a_vector_of_another_length() -> None:
    body = {"data": [{"index": 0, "probs": [0.3, 0.7], "num_classes": 2}]}
    with pytest.raises(UnreadableReplyError):
        read("vllm_classify", body, ITEMS[:1], model="m")
    body["data"][0]["num_classes"] = 3
    with pytest.raises(UnreadableReplyError):
        read("vllm_classify", body, ITEMS[:1], model="m", class_index=1)


def test_vllm_score_sends_pairs_and_puts_the_reply_in_order() -> None:
    [request] = requests("vllm_score", model="m")
    assert request.path == "/score"
    assert request.payload == {
        "model": "m",
        "text_1": ["2 + 2 = ", "2 + 2 = ", "3 + 3 = "],
        "text_2": ["4", "5", "6"],
    }
    data = [{"index": index, "score": score} for index, score in ((1, 0.1), (2, 0.9), (0, 0.8))]
    assert read("vllm_score", {"data": data}, model="m").scores == [0.8, 0.1, 0.9]


@pytest.mark.parametrize(
    ("reduce", "score"), [("min", 0.25), ("last", 0.5), ("mean", 0.5), ("product", 0.09375)]
)
def test_vllm_pooling_reduces_the_steps(reduce: str, score: float) -> None:
    steps = [0.75, 0.25, 0.5]
    flat = {"data": [{"index": 0, "data": steps}]}
    rows = {"data": [{"index": 0, "data": [[1 - step, step] for step in steps]}]}
    assert read("vllm_pooling", flat, ITEMS[:1], model="m", reduce=reduce).scores == [score]
    options = {"model": "m", "reduce": reduce, "class_index": 1}
    assert read("vllm_pooling", rows, ITEMS[:1], **options).scores == [score]


@pytest.mark.parametrize(
    "value", [[], "AAAA", [[]], [[0.1], 0.2], [0.2, [0.1]], [[0.1, 0.9], [0.9]], [0.1, None]]
)
def test_vllm_pooling_refuses_steps_that_are_no_rows(value: object) -> None:
    with pytest.raises(UnreadableReplyError):
        read("vllm_pooling", {"data": [{"index": 0, "data": value}]}, ITEMS[:1], model="m")


def test_vllm_pooling_refuses_rows_of_different_lengths() -> None:
    body = {"data": [{"index": 0, "data": [[0.25, 0.75], [0.25, 0.25, 0.5]]}]}
    with pytest.raises(UnreadableReplyError):
        read("vllm_pooling", body, ITEMS[:1], model="m", class_index=1)


def test_vllm_pooling_names_its_task_if_asked_to() -> None:
    [request] = requests("vllm_pooling", ITEMS[:1], model="m", task="token_classify")
    assert (request.path, request.payload["task"]) == ("/pooling", "token_classify")


def test_sglang_speaks_its_own_api_and_that_of_embeddings() -> None:
    [own] = requests("sglang", model="m")
    texts = ["2 + 2 = 4", "2 + 2 = 5", "3 + 3 = 6"]
    assert (own.path, own.payload) == ("/classify", {"model": "m", "text": texts})
    [alike] = requests("sglang", model="m", endpoint="embeddings")
    assert (alike.path, alike.payload) == ("/v1/embeddings", {"model": "m", "input": texts})
    body = [{"embedding": [score]} for score in (0.5, -1.0, 2.0)]
    assert read("sglang", body, model="m").scores == [0.5, -1.0, 2.0]
    data = [{"index": 2 - place, "embedding": [0.0, place]} for place in range(3)]
    options = {"model": "m", "endpoint": "embeddings", "output_index": 1}
    assert read("sglang", {"data": data}, **options).scores == [2, 1, 0]


def test_sglang_does_not_guess_which_output_is_the_score() -> None:
    with pytest.raises(UnreadableReplyError):
        read("sglang", [{"embedding": [0.5, 0.25]}], ITEMS[:1], model="m")


def test_tei_predict_sends_a_list_of_lists_and_finds_the_score_by_its_label() -> None:
    [joined] = requests("tei_predict")
    assert joined.path == "/predict"
    assert joined.payload == {
        "inputs": [["2 + 2 = 4"], ["2 + 2 = 5"], ["3 + 3 = 6"]],
        "raw_scores": True,
        "truncate": False,
    }
    [pairs] = requests("tei_predict", ITEMS[:1], send="pairs", truncate=True)
    assert pairs.payload["inputs"] == [["2 + 2 = ", "4"]]
    assert pairs.payload["truncate"] is True
    good, bad = {"label": "good", "score": 0.75}, {"label": "bad", "score": 0.25}
    assert read("tei_predict", [[good, bad], [bad, good]], ITEMS[:2], label="bad").scores == [
        0.25,
        0.25,
    ]
    for label in (None, "ugly"):
        with pytest.raises(UnreadableReplyError):
            read("tei_predict", [[good, bad]], ITEMS[:1], label=label)


def test_tei_rerank_asks_about_one_prompt_at_a_time_and_puts_the_reply_in_order() -> None:
    items = [ITEMS[0], ITEMS[2], ITEMS[1], Item("2 + 2 = ", "four")]
    first, second, third = requests("tei_rerank", items, batch_size=2)
    assert first.path == "/rerank"
    assert first.payload == {
        "query": "2 + 2 = ",
        "texts": ["4", "5"],
        "raw_scores": True,
        "truncate": False,
    }
    assert (first.indices, second.indices, third.indices) == ((0, 2), (3,), (1,))
    sorted_by_score = [{"index": 1, "score": 3.0}, {"index": 0, "score": -3.0}]
    assert read("tei_rerank", sorted_by_score, ITEMS[:2]).scores == [-3.0, 3.0]


def test_openrlhf_sends_queries_prompts_and_labels() -> None:
    items = [Item("2 + 2 = ", "4", columns={"answer": 4}), Item(CHAT, "5", columns={"answer": 4})]
    [request] = requests("openrlhf", items, label_column="answer", turn="<{role}>{content}")
    assert request.path == "/get_reward"
    assert request.payload == {
        "query": ["2 + 2 = 4", "<user>2 + 2?<assistant>5"],
        "prompts": ["2 + 2 = ", "<user>2 + 2?"],
        "labels": [4, 4],
    }
    [plain] = requests("openrlhf", items)
    assert "labels" not in plain.payload
    body = {"rewards": [1.0, 0.0], "scores": [0.9, 0.1], "extra_logs": {}}
    assert read("openrlhf", body, items).scores == [1.0, 0.0]
    assert read("openrlhf", body, items, score_key="scores").scores == [0.9, 0.1]
    assert make_protocol("openrlhf", label_column="answer").required_columns == {"answer"}


@pytest.mark.parametrize("rewards", [[1.0], [1.0, 0.0, 0.5], [[1.0], [0.0]], [1.0, None], "10"])
def test_openrlhf_refuses_rewards_that_are_not_one_a_completion(rewards: object) -> None:
    with pytest.raises(UnreadableReplyError):
        read("openrlhf", {"rewards": rewards}, ITEMS[:2])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vllm_classify", {"model": "m", "send": "texts"}),
        ("vllm_pooling", {"model": "m", "send": "texts"}),
        ("vllm_score", {"model": "m"}),
        ("sglang", {"model": "m"}),
        ("tei_predict", {}),
        ("tei_rerank", {}),
        ("openrlhf", {}),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_hold_each_item_once(name: str, options: dict[str, Any], batch_size: int) -> None:
    items = [Item(f"{index % 2}?", str(index)) for index in range(5)]
    asked = requests(name, items, **options, batch_size=batch_size)
    assert sorted(index for request in asked for index in request.indices) == [0, 1, 2, 3, 4]
    assert all(len(request.indices) <= batch_size for request in asked)
    assert requests(name, [], **options) == []
