import pytest

from trl_grpo_ext.rewards.completion import Completion, completion_text

TOOL_CALL = [
    {"role": "assistant", "content": "let me look"},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]
PARTS = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}, "b"]}]


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ([{"role": "assistant", "content": "said"}], "said"),
        (TOOL_CALL, "It is 3."),
        (PARTS, "a"),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "assistant"}], ""),
        ([], ""),
    ],
)
def test_completion_text_returns_the_text_of_the_last_message(
    completion: Completion, text: str
) -> None:
    assert completion_text(completion) == text
