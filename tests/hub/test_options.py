"""What cannot work on the Hub is said before a model loads."""

from __future__ import annotations

import pytest

from trl_grpo_ext import ConfigurationError, ExtGRPOConfig
from trl_grpo_ext.hub.options import HubOptions, hub_problems

GIVEN = {"output_dir": "out", "hub_model_id": None, "hub_token": None, "log_completions": True}


def test_hub_problems_names_each_thing_that_cannot_work() -> None:
    options = HubOptions(push_completions=True, hub_wait_s=-1.0)
    wait, vain = hub_problems(options, push_to_hub=False, **GIVEN)
    assert "`hub_wait_s` is -1.0" in wait
    assert "`push_completions` is true" in vain


@pytest.mark.parametrize(
    ("output_dir", "hub_model_id", "fits"),
    [
        ("runs/my run", None, False),
        ("runs/my run", "me/run", True),
        ("runs/run", "a/b/c", False),
        ("runs/run", None, True),
    ],
)
def test_hub_problems_names_a_repository_that_cannot_be(
    output_dir: str, hub_model_id: str | None, fits: bool
) -> None:
    given = GIVEN | {"output_dir": output_dir, "hub_model_id": hub_model_id}
    problems = list(hub_problems(HubOptions(), push_to_hub=True, **given))
    assert problems == [] if fits else "cannot be the name of a repository" in problems[0]


def test_hub_problems_wants_a_token_of_the_main_process_unless_offline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trl_grpo_ext.hub.options.is_offline_mode", lambda: False)
    monkeypatch.setattr("trl_grpo_ext.hub.options.get_token", lambda: None)
    (problem,) = hub_problems(HubOptions(), push_to_hub=True, **GIVEN)
    assert "there is no token" in problem
    assert not list(hub_problems(HubOptions(), push_to_hub=True, **GIVEN | {"hub_token": "hf_x"}))
    monkeypatch.setenv("RANK", "1")
    assert not list(hub_problems(HubOptions(), push_to_hub=True, **GIVEN))


def test_config_refuses_what_cannot_be_pushed() -> None:
    with pytest.raises(ConfigurationError, match="`push_completions` is true"):
        ExtGRPOConfig(output_dir="out", use_cpu=True, bf16=False, push_completions=True)
    with pytest.raises(ConfigurationError, match="`extensions` is false"):
        ExtGRPOConfig(output_dir="out", use_cpu=True, bf16=False, extensions=False, hub_wait_s=1.0)
