import json

from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.rewards.api.protocols import fence


def test_fence_mark_is_reproducible_and_depends_on_each_text() -> None:
    marks = {fence.fence_mark(texts) for texts in (["a", "b"], ["ab"], ["a", "c"], ["b", "a"], [])}
    assert len(marks) == 5
    assert fence.fence_mark(["a", "b"]) in marks


def test_fence_mark_is_another_one_when_it_occurs_in_a_text(monkeypatch) -> None:
    digests = iter(["abc", "abc", "def"])  # the dependency, hashlib, is what gives way here

    class Digest:
        def __init__(self, data: bytes) -> None:
            self.attempt = json.loads(data)[0]

        def hexdigest(self) -> str:
            return next(digests)

    monkeypatch.setattr(fence.hashlib, "sha256", Digest)
    assert fence.fence_mark(["a text with ABC in it"]) == "def"


@given(st.lists(st.text()))
def test_fence_mark_occurs_in_no_text(texts: list[str]) -> None:
    mark = fence.fence_mark(texts)
    assert len(mark) == 16
    assert not any(mark in text.casefold() for text in texts)


def test_control_tokens_of_chat_templates_are_broken_up() -> None:
    tokens = (
        "<|im_start|> <|eot_id|> <｜Assistant｜> <s> </s> <bos> <eos> "
        "<start_of_turn> <end_of_turn> [INST] [/INST] <<SYS>> <</SYS>> [SYSTEM_PROMPT]"
    )
    broken = fence.without_control_tokens(tokens)
    assert not any(token in broken for token in tokens.split())
    assert broken.replace("< ", "<").replace("[ ", "[") == tokens


def test_other_text_is_left_alone() -> None:
    code = "if a < b and b <= c: x[i] = '<span>' << 2  # [1] <seed> |x|"
    assert fence.without_control_tokens(code) == code
