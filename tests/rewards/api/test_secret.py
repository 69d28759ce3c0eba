"""Masking of keys in texts that others wrote."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext.rewards.api.secret import excerpt, masked, read_key

KEYS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=4)


@given(key=KEYS, before=st.text(), after=st.text())
def test_key_is_masked_however_it_is_written(key: str, before: str, after: str) -> None:
    encoded = base64.b64encode(key.encode()).decode()
    for form in (key, json.dumps(key), quote(key, safe=""), encoded):
        assert form not in masked(before + form + after, key=key)


def test_text_without_a_key_stays_as_it_is() -> None:
    assert masked("as it is", key=None) == "as it is"
    assert masked("as it is", key="other") == "as it is"


def test_excerpt_is_one_short_line_that_can_be_printed() -> None:
    text = excerpt("a\n\n b\x1b[31m \ud800 key-key" + "c" * 900, key="key-key", max_characters=24)
    assert text == "a b\\x1b[31m \\ud800 ***cccccccccc..."  # 24, then escaped
    assert text.isprintable()


def test_key_that_is_cut_off_by_the_excerpt_is_masked_before() -> None:
    assert "sk-1" not in excerpt("x" * 6 + "sk-123456", key="sk-123456", max_characters=10)


@pytest.mark.parametrize(("value", "key"), [("k", "k"), ("", None)])
def test_key_is_read_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, value: str, key: str | None
) -> None:
    monkeypatch.setenv("JUDGE_KEY", value)
    assert read_key("JUDGE_KEY") == key
    assert read_key(None) is None
