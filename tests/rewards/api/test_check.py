"""The look at a service before a run."""

from __future__ import annotations

import pytest
from rewards.api.services import Lengths, serving

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.api.check import check_reward
from trl_grpo_ext.rewards.api.reward import APIReward

KEY = "sk-tell-nobody"


def test_check_shows_request_reply_and_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with (
        serving() as service,
        APIReward(service.url, protocol=Lengths(), api_key_env="JUDGE_KEY", cache=False) as reward,
    ):
        good, bad = check_reward(reward, completions=["four", "a"], prompt="p")
    assert good.url == f"{service.url}/lengths"
    assert good.headers["Authorization"] == "Bearer ***"
    assert good.payload["texts"] == ["p|four"]
    assert (good.completions, good.status, good.reply) == (
        ("four",),
        200,
        '{"scores": [4], "tokens": 10}',
    )
    assert (list(good.scores), list(bad.scores)) == ([4.0], [1.0])
    assert good.latency_s
    assert good.problem == ""


def test_check_shows_what_the_service_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with (
        serving(lambda _: (401, {}, f"bad key {KEY}".encode())) as service,
        APIReward(service.url, protocol=Lengths(), api_key_env="JUDGE_KEY", cache=False) as reward,
    ):
        first, _ = check_reward(reward)
    assert (first.status, first.reply, list(first.scores)) == (401, "bad key ***", [])
    assert "`api_key_env`" in first.problem
    assert KEY not in repr(first)


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (500, b"", "HTTP 500"),
        (200, b"<html>", "the reply is not JSON"),
        (200, b'{"scores": [null]}', "the service gave no score"),
        (200, b'{"scores": [' + b"9" * 400 + b"]}", "NaN or infinity"),
    ],
)
def test_check_says_why_there_is_no_score(status: int, body: bytes, problem: str) -> None:
    with (
        serving(lambda _: (status, {}, body)) as service,
        APIReward(service.url, protocol=Lengths(), cache=False) as reward,
    ):
        first, _ = check_reward(reward)
    assert problem in first.problem


def test_check_of_a_service_that_is_not_there_says_so() -> None:
    with serving() as service:
        address = service.url
    with APIReward(address, protocol=Lengths(), cache=False) as reward:
        first, _ = check_reward(reward)
    assert first.problem.startswith("no reply: ConnectError")


def test_check_without_anything_to_ask_is_refused() -> None:
    reward = APIReward("https://judge.example", protocol=Lengths(), cache=False)
    with pytest.raises(ConfigurationError, match="has nothing to ask"):
        check_reward(reward, completions=[])
