"""The command line of the look at a service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from rewards.api.services import Asked, Service, serving
from typer.testing import CliRunner

from trl_grpo_ext.cli import app
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.api.check_arguments import (
    api_rewards,
    rewards_to_check,
    samples_to_check,
)

KEY = "sk-tell-nobody"


def judge(asked: Asked) -> tuple[int, dict[str, str], bytes]:
    """A judge for ``verdict=pattern``: 1 to an answer with a 4 in it, else 0."""
    assert asked.path == "/v1/chat/completions"
    answer = asked.payload["messages"][1]["content"].partition("<response-")[2].partition("</")[0]
    message = {"content": f"[[{int('4' in answer.partition('>')[2])}]]"}
    choice = {"message": message, "finish_reason": "stop"}
    return 200, {}, json.dumps({"choices": [choice], "usage": {"total_tokens": 9}}).encode()


@pytest.fixture
def service() -> Iterator[Service]:
    with serving(judge) as running:
        yield running


def check(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check-reward", *arguments])


def flags(service: Service, *more: str) -> list[str]:
    given = ["--base-url", f"{service.url}/v1", "--protocol", "openai_chat"]
    options = ["model=judge", r"verdict_pattern=\[\[(\d+)\]\]", "verdict=pattern"]
    options += ["rubric=Is it right?", "score_range=[0, 1]", "cache=false"]
    return [*given, *(word for option in options for word in ("--option", option)), *more]


def test_check_reward_asks_the_service_that_the_flags_describe(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    shown = check(*flags(service, "--api-key-env", "JUDGE_KEY"))
    assert shown.exit_code == 0, shown.output
    assert service.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    assert service.asked[0].payload["model"] == "judge"
    assert "Is it right?" in service.asked[0].payload["messages"][0]["content"]
    for text in (
        "reward openai_chat",
        f"asked: {service.url}/v1/chat/completions",
        '"Authorization": "Bearer ***"',
        '"model": "judge"',
        "reply: HTTP 200: {",
        "score 1.0 for '2 + 2 is 4.'",
        "score 0.0 for 'I would rather not say.'",
    ):
        assert text in shown.stdout
    assert KEY not in shown.output


def test_check_reward_takes_samples_of_the_user(service: Service) -> None:
    samples = [
        "--prompt",
        "3 + 1?",
        "--completion",
        "five",
        "--completion",
        "4",
        "--completion",
        "2",
    ]
    samples += ["--column", "gold=four = 4", "--option", "reference_column=gold", "--json"]
    found = check(*flags(service, *samples))
    assert found.exit_code == 0, found.output
    checked = json.loads(found.stdout)
    assert [one["completions"] for one in checked] == [["five"], ["4"], ["2"]]
    assert [one["scores"] for one in checked] == [[0.0], [1.0], [0.0]]
    asked = service.asked[0].payload["messages"][1]["content"]
    assert "\n3 + 1?\n" in asked
    assert "\nfour = 4\n" in asked


def test_check_reward_of_a_yaml_takes_samples_too(service: Service, tmp_path: Path) -> None:
    arguments = {"base_url": f"{service.url}/v1", "protocol": "openai_chat", "model": "judge"}
    arguments |= {"verdict": "pattern", "verdict_pattern": r"\[\[(\d+)\]\]", "cache": False}
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump({"rewards": [{"name": "api", "arguments": arguments}]}))
    found = check("--config", str(config), "--completion", "4", "--json")
    assert [one["scores"] for one in json.loads(found.stdout)] == [[0.1]]  # 1 of 0 to 10


def test_check_reward_ends_with_1_where_there_is_no_score(service: Service) -> None:
    shown = check(*flags(service), "--option", "max_reply_bytes=10")
    assert shown.exit_code == 1
    assert "problem: no reply" in shown.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "`--config` and `--base-url`: neither of them is given"),
        ({"config": Path("a.yaml"), "base_url": "https://j.example"}, "both of them is given"),
        ({"base_url": "https://j.example"}, "`--protocol` is not given"),
        (
            {"config": Path("a.yaml"), "protocol": "nim", "api_key_env": "K", "option": ["a=1"]},
            "`--protocol` and `--option` and `--api-key-env` would have no effect",
        ),
        ({"option": ["model=m", KEY]}, "`--option` number 2 is not name=value"),
        ({"option": [f"={KEY}"]}, "`--option` number 1 is not name=value"),
        ({"option": ["model=m", "model=n"]}, "`--option` gives model several times"),
        ({"option": ["protocol=nim"]}, "`--option` gives protocol, which has a flag of its own"),
        ({"option": ["modell=m"]}, "`modell` is not an option"),
        ({"option": ["model=7"]}, "`model` is 7 (int), which is not a text"),
        ({"option": ["model=m", f"api_key={KEY}"]}, "`api_key` is not an option"),
        ({"option": ["model=m"], "api_key_env": KEY}, "`api_key_env` names ***, which is not set"),
    ],
)
def test_flags_that_cannot_work_are_refused(given: dict[str, Any], message: str) -> None:
    service = {"base_url": "https://judge.example", "protocol": "openai_chat"}
    complete = "config" in given or "base_url" in given or not given
    with pytest.raises(ConfigurationError) as caught:
        rewards_to_check(**(given if complete else service | given))
    assert message in str(caught.value)
    assert KEY not in str(caught.value)


def test_check_reward_says_what_is_wrong_without_a_traceback() -> None:
    refused = check("--base-url", "http://judge.example/v1", "--protocol", "openai_chart")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: 2 problems")
    assert "is not encrypted" in refused.stderr
    assert "Use 'openai_chat'" in refused.stderr


@pytest.mark.parametrize("text", ["- last_number", "", "rewards: api", "a: [", "rewards: {a: 1}"])
def test_yaml_without_rewards_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match="is not the YAML of a recipe"):
        rewards_to_check(config=tmp_path / "a.yaml")


def test_columns_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="`--column` number 1 is not name=value"):
        samples_to_check(prompt=None, completion=None, column=["answer"])


def test_rewards_of_a_yaml_that_are_from_an_api_are_found() -> None:
    entry = {
        "name": "trl_grpo_ext.rewards.api.reward:APIReward",
        "arguments": {
            "base_url": "https://judge.example/v1",
            "protocol": "openai_chat",
            "model": "judge",
            "log_as": "judge",
        },
    }
    (reward,) = api_rewards(["last_number", entry])
    assert reward.__name__ == "judge"
    with pytest.raises(ConfigurationError, match="None of the `rewards` is from an API"):
        api_rewards(["last_number"])
