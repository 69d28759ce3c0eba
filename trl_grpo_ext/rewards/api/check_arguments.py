"""What was typed after ``check-reward``: which services to ask, and about which samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.api.check import SAMPLE_COMPLETIONS, SAMPLE_PROMPT
from trl_grpo_ext.rewards.api.protocols import PROTOCOLS
from trl_grpo_ext.rewards.api.reward import APIReward
from trl_grpo_ext.rewards.registry import RewardEntry, build_rewards

_OWN_FLAGS = ("base_url", "protocol", "api_key_env")


def rewards_to_check(
    *,
    config: Path | None = None,
    base_url: str | None = None,
    protocol: str | None = None,
    option: Sequence[str] | None = None,
    api_key_env: str | None = None,
) -> list[APIReward]:
    """Return the rewards from an API of a recipe's YAML, or the one that the flags describe.

    Args:
        config: The YAML; it or ``base_url`` is given.
        base_url: Of the service.
        protocol: Its name; with ``base_url`` only, like the following.
        option: Other arguments of :class:`APIReward`, as ``name=value``; a value that is JSON is
            read as such.
        api_key_env: The environment variable that holds the key.

    Raises:
        ConfigurationError: Everything that cannot work in them.

    Example:
        >>> flags = {"base_url": "https://judge.example/v1", "protocol": "openai_chat"}
        >>> [reward] = rewards_to_check(**flags, option=["model=judge", "score_range=[1, 5]"])
        >>> reward.protocol.model, reward.protocol.score_range
        ('judge', [1, 5])
    """
    described = {"protocol": protocol, "option": option or None, "api_key_env": api_key_env}
    given = [name for name, value in described.items() if value is not None]
    if problems := list(_source_problems(config, base_url, given)):
        raise ConfigurationError(problems)
    if config is not None:
        return api_rewards(_rewards_of(config))
    options = {name: _value(text) for name, text in _pairs(option or (), flag="option").items()}
    if own := [name for name in _OWN_FLAGS if name in options]:
        raise ConfigurationError([_has_a_flag(name) for name in own])
    reward = APIReward(
        str(base_url), protocol=str(protocol), api_key_env=api_key_env or None, **options
    )
    return [reward]


def samples_to_check(
    *, prompt: str | None, completion: Sequence[str] | None, column: Sequence[str] | None
) -> dict[str, Any]:
    """Return the keyword arguments of ``check_reward``, where nothing was typed its samples.

    Raises:
        ConfigurationError: a column is not ``name=value``.

    Example:
        >>> samples_to_check(prompt="3 + 4?", completion=["7"], column=["answer=7"])
        {'prompt': '3 + 4?', 'completions': ('7',), 'columns': {'answer': '7'}}
    """
    return {
        "prompt": SAMPLE_PROMPT if prompt is None else prompt,
        "completions": tuple(completion or SAMPLE_COMPLETIONS),
        "columns": _pairs(column or (), flag="column"),
    }


def api_rewards(specs: Sequence[RewardEntry]) -> list[APIReward]:
    """Return the rewards from an API among the `rewards` of a YAML.

    Raises:
        ConfigurationError: the rewards cannot be built, or none is from an API.
    """
    rewards = [reward for reward in build_rewards(specs)[0] if isinstance(reward, APIReward)]
    if not rewards:
        raise ConfigurationError(
            [
                "None of the `rewards` is from an API, so there is no service to check. Name one "
                "in `rewards`, with `base_url` and `protocol` in its `arguments`."
            ]
        )
    return rewards


def _source_problems(
    config: Path | None, base_url: str | None, given: Sequence[str]
) -> Iterator[str]:
    """Yield what is wrong with where the service is to be found."""
    if (config is None) == (base_url is None):
        found = "neither" if config is None else "both"
        yield (
            f"`--config` and `--base-url`: {found} of them is given, so it is open which service "
            "to ask. Give the YAML of a recipe, or the address of a service with its `--protocol`."
        )
    elif config is not None and given:
        names = " and ".join(f"`{_flag(name)}`" for name in given)
        yield (
            f"{names} would have no effect beside `--config`, as the YAML says what to ask. Change "
            "`arguments` there, or give `--base-url` instead."
        )
    elif config is None and "protocol" not in given:
        yield (
            "`--protocol` is not given, so it is open how to ask the service. Name one of "
            f"{', '.join(sorted(PROTOCOLS))}."
        )


def _rewards_of(config: Path) -> Sequence[RewardEntry]:
    try:
        keys = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError([_not_yaml(config, str(error))]) from error
    rewards = keys.get("rewards", []) if isinstance(keys, Mapping) else None
    if not isinstance(rewards, list):
        raise ConfigurationError([_not_yaml(config, "it has no list `rewards`")])
    return rewards


def _pairs(typed: Sequence[str], *, flag: str) -> dict[str, str]:
    """Return what was typed as ``name=value``."""
    split = [text.partition("=") for text in typed]
    names = Counter(name for name, _, _ in split)
    problems = [
        _no_pair(flag, at)
        for at, (name, equals, _) in enumerate(split, start=1)
        if not equals or not name
    ]
    problems += [
        f"`{_flag(flag)}` gives {name} several times, so it is open which one counts. Give it once."
        for name, count in names.items()
        if count > 1 and not problems
    ]
    if problems:
        raise ConfigurationError(problems)
    return {name: value for name, _, value in split}


def _value(text: str) -> Any:
    """Return what a text is as JSON, or else the text.

    Example:
        >>> _value("0.5"), _value("null"), _value("Is it right?")
        (0.5, None, 'Is it right?')
    """
    try:
        return json.loads(text)
    except ValueError:
        return text


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _no_pair(flag: str, at: int) -> str:
    """What was typed is not repeated: it may be a key."""
    example = "answer=4" if flag == "column" else "model=judge"
    return (
        f"`{_flag(flag)}` number {at} is not name=value, so it is open what it sets. Write it like "
        f"{_flag(flag)} {example}."
    )


def _has_a_flag(name: str) -> str:
    return (
        f"`--option` gives {name}, which has a flag of its own, so it is open which one counts. "
        f"Write {_flag(name)}."
    )


def _not_yaml(config: Path, reason: str) -> str:
    return (
        f"`--config` {config} is not the YAML of a recipe ({reason}), so no service can be found "
        "in it. Correct the file, or describe the service with `--base-url` and `--protocol`."
    )
