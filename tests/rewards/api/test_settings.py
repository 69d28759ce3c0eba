"""Settings of a reward from an API: what cannot work is said at once, and shows no secret."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from trl_grpo_ext.rewards.api.settings import APISettings, api_problems, shown_url

GOOD = "https://judge.example/v1"


def problems(*urls: str, **settings: Any) -> list[str]:
    return list(api_problems(APISettings(urls or (GOOD,), **settings)))


@pytest.mark.parametrize(
    "url",
    [
        GOOD,
        "https://judge.example:8443",
        "http://127.0.0.1:8000/v1",
        "http://127.8.8.8",
        "http://[::1]:8000",
        "http://localhost:8000",
    ],
)
def test_addresses_that_work_have_no_problems(url: str) -> None:
    assert problems(url) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://judge.example/v1", "`base_url`=http://judge.example/v1 is not encrypted"),
        ("http://127.0.0.1.example", "is not encrypted"),
        ("http://0.0.0.0:8000", "is not encrypted"),
        ("http://10.0.0.7:8000", "is not encrypted"),
        ("https://me:tell-nobody@judge.example", "has a user, a query or a fragment"),
        ("https://tell-nobody@judge.example", "has a user, a query or a fragment"),
        ("https://judge.example/v1?key=tell-nobody", "has a user, a query or a fragment"),
        ("https://judge.example/v1#tell-nobody", "has a user, a query or a fragment"),
        ("judge.example/v1", "is no address"),
        ("ftp://judge.example", "is no address"),
        ("https://", "is no address"),
        ("https://judge.example:port", "is no address"),
        ("https://judge.example/v1\r\nX-Key: tell-nobody", "is no address"),
        ("https://[::1", "is no address"),
    ],
)
def test_address_that_cannot_work_is_refused_without_what_may_be_secret(
    url: str, message: str
) -> None:
    (problem,) = problems(url)
    assert message in problem
    assert "tell-nobody" not in problem
    assert "tell-nobody" not in shown_url(url)


def test_plain_http_is_sent_where_it_was_asked_for() -> None:
    assert problems("http://judge.example", allow_http=True) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connect_timeout_s", 0),
        ("read_timeout_s", -1.0),
        ("timeout_s", math.nan),
        ("deadline_s", math.inf),
        ("deadline_s", None),
        ("max_backoff_s", "30"),
        ("backoff_s", -0.1),
        ("max_attempts", 0),
        ("max_attempts", 2.5),
        ("max_concurrent", True),
        ("max_reply_bytes", 0),
        ("requests_per_minute", 0),
        ("tokens_per_minute", -3),
        ("price_per_million_tokens", -1),
        ("allow_http", "yes"),
        ("cache", 1),
        ("cache_dir", 7),
        ("cache_dir", "/dev/null/scores"),
        ("api_key_header", "X-Key: 7"),
        ("api_key_header", None),
        ("api_key_env", ""),
        ("api_key_env", 7),
    ],
)
def test_setting_that_cannot_work_is_named(name: str, value: object) -> None:
    (problem,) = problems(**{name: value})
    assert f"`{name}`" in problem


def test_settings_at_their_limits_have_no_problems(tmp_path: Path) -> None:
    assert (
        problems(
            max_attempts=1,
            max_concurrent=1,
            backoff_s=0,
            requests_per_minute=0.5,
            tokens_per_minute=1,
            price_per_million_tokens=0,
            cache=False,
            cache_dir=tmp_path / "not" / "there",
        )
        == []
    )


def test_all_problems_are_said_at_once() -> None:
    found = problems("http://judge.example", "nonsense", max_attempts=0, timeout_s=0)
    assert [name in problem for name, problem in zip(_NAMES, found, strict=True)] == [True] * 4


_NAMES = ("not encrypted", "no address", "max_attempts", "timeout_s")


def test_no_address_is_a_problem() -> None:
    assert "nobody to ask" in next(iter(api_problems(APISettings(()))))


def test_unset_key_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    (problem,) = problems(api_key_env="JUDGE_KEY")
    assert "`api_key_env` names 'JUDGE_KEY', which is not set" in problem


def test_key_instead_of_its_variable_is_not_shown() -> None:
    (problem,) = problems(api_key_env="sk-tell-nobody")
    assert "tell-nobody" not in problem
    assert "tell-nobody" not in repr(APISettings((GOOD,), api_key_env="sk-tell-nobody"))
    assert "tell-nobody" not in APISettings((GOOD,), api_key_env="sk-tell-nobody").shown()


@pytest.mark.parametrize("key", ["two words", "broken\r\nHost: x", "schlüssel"])
def test_key_that_does_not_fit_a_header_is_refused(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    (problem,) = problems(api_key_env="JUDGE_KEY")
    assert "cannot be sent in a header" in problem
    assert key not in problem
