from __future__ import annotations

from typing import Any

import pytest

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.serve.settings import (
    Limits,
    ServeSettings,
    is_loopback,
    serve_problems,
    settings_of,
)
from trl_grpo_ext.rewards.serve.start import serve_reward


def problems(**settings: Any) -> list[str]:
    return list(serve_problems(ServeSettings(**{"reward": "last_number"} | settings)))


def test_defaults_listen_on_this_machine_only() -> None:
    assert problems() == []
    assert is_loopback(ServeSettings().host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.2", "trainer.example"])
def test_other_interfaces_need_a_token(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [problem] = problems(host=host)
    assert "anybody there may use this server. Set `token_env`" in problem
    monkeypatch.setenv("SERVE_TOKEN", "secret")
    assert problems(host=host, token_env="SERVE_TOKEN") == []


@pytest.mark.parametrize(("token", "why"), [("", "empty or not set"), ("a b", "header"), ("é", "")])
def test_token_must_be_one(token: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(problems(token_env="NO_SUCH_TOKEN")) == 1
    monkeypatch.setenv("SERVE_TOKEN", token)
    [problem] = problems(token_env="SERVE_TOKEN")
    assert why in problem
    assert repr(token) not in problem


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "m"}, "`model`='m' and `reward`='last_number'"),
        ({"reward": None}, "serves one of them"),
        ({"max_batch_tokens": 0}, "`max_batch_tokens`=0 lets no text through"),
        ({"max_tokens": -1}, "`max_tokens`=-1"),
        ({"limits": Limits(characters=0)}, "`characters`=0"),
        ({"limits": Limits(texts=9, texts_in_flight=8)}, "`texts`=9 is above `texts_in_flight`=8"),
        ({"max_padding": 1.0}, "`max_padding`=1.0 is no share"),
        ({"max_wait_ms": -1}, "`max_wait_ms`=-1"),
        ({"grace_s": float("nan")}, "`grace_s`=nan"),
        ({"port": 65536}, "`port`=65536 does not exist"),
        ({"dtype": "float16"}, "`dtype`='float16' is not known"),
        ({"label": -1}, "`label`=-1"),
    ],
)
def test_what_cannot_work_is_said(settings: dict[str, Any], said: str) -> None:
    [problem] = problems(**settings)
    assert said in problem


def test_server_does_not_start_with_problems_and_names_all() -> None:
    with pytest.raises(ConfigurationError) as caught:
        serve_reward(ServeSettings(host="0.0.0.0", port=-1))
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("typed", ["[4]", "span=4", ""])
def test_reward_arguments_are_a_json_object(typed: str) -> None:
    with pytest.raises(ConfigurationError, match="is no JSON object"):
        settings_of(reward="number_distance", reward_arguments=typed)
    settings = settings_of(reward="last_number", reward_arguments='{"answer_column": "gold"}')
    assert settings == ServeSettings(
        reward="last_number", reward_arguments={"answer_column": "gold"}
    )
