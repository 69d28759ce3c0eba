import pytest

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.api.protocols import rendering
from trl_grpo_ext.rewards.api.wire import Item

CHAT = [
    {"role": "system", "content": "Be brief.", "name": None},
    {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
]


def test_messages_pass_a_conversation_on_without_empty_keys() -> None:
    assert rendering.messages(Item(CHAT, "4")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
        {"role": "assistant", "content": "4"},
    ]


def test_messages_continue_what_the_assistant_began() -> None:
    begun = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is "}]
    assert rendering.messages(Item(begun, "4")) == [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "It is 4"},
    ]
    assert begun[-1] == {"role": "assistant", "content": "It is "}


def test_joined_writes_each_message_by_the_turn() -> None:
    text = rendering.joined(Item(CHAT, "{role} 4"), turn="<{role}>{content}</>")
    assert text == "<system>Be brief.</><user>2 + 2?</><assistant>{role} 4</>"


def test_joined_concatenates_texts_whatever_the_turn() -> None:
    assert rendering.joined(Item("2 + 2 = ", "4"), turn="<{role}>") == "2 + 2 = 4"


def test_prompt_text_leaves_the_completion_out() -> None:
    assert rendering.prompt_text(CHAT) == "system: Be brief.\nuser: 2 + 2?\n"
    assert rendering.prompt_text("2 + 2?") == "2 + 2?"


def test_a_column_that_is_missing_is_an_error_that_names_the_option() -> None:
    item = Item("2 + 2?", "4", columns={"gold": "4", "id": 1})
    with pytest.raises(RewardError) as error:
        rendering.cell(item, "answer", protocol="openrlhf", option="label_column")
    assert str(error.value) == (
        "protocol 'openrlhf' got no column 'answer' (columns: gold, id), so no completion can be "
        "scored. Set `label_column` to a column of the data set."
    )
