"""What was typed after ``score``: which rewards, and how their completions become tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.completion import Completion, completion_text
from trl_grpo_ext.rewards.registry import RewardEntry, RewardFunction, build_rewards

TokenIds = Callable[[Sequence[Completion]], list[list[int]]]


def rewards_to_score(
    *, reward: Sequence[str], arguments: Sequence[str], config: Path | None
) -> list[RewardFunction]:
    """Return the rewards by their names, or those of a recipe's YAML.

    Args:
        reward: Built-in names, or import paths, which run their code.
        arguments: JSON objects: the first belongs to the first reward, and so on; those of the
            last rewards may be left out.
        config: The YAML; it or ``reward`` is given.

    Raises:
        ConfigurationError: Everything that cannot work in them.

    Example:
        >>> names = ["last_number", "format"]
        >>> rewards = rewards_to_score(
        ...     reward=names, arguments=["{}", '{"structure": "answer"}'], config=None
        ... )
        >>> [reward.__name__ for reward in rewards]
        ['last_number', 'format']
    """
    if problems := list(_source_problems(reward, arguments, config)):
        raise ConfigurationError(problems)
    if config is not None:
        return build_rewards(_rewards_of(config))[0]
    entries: list[RewardEntry] = [{"name": name} for name in reward]
    for at, text in enumerate(arguments):
        entries[at] = {"name": reward[at], "arguments": _object(at, text)}
    return build_rewards(entries)[0]


def tokens_by(tokenizer: str | None) -> TokenIds | None:
    """Return what counts the tokens of completions, ``None`` without a tokenizer.

    It reads the text of each completion, so it knows nothing of tokens that were sampled and do not
    show in the text, such as the one at the end.

    Args:
        tokenizer: A folder, or a name on the Hub.

    Raises:
        ConfigurationError: It cannot be loaded.
    """
    if tokenizer is None:
        return None
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise ConfigurationError([_no_tokenizer(tokenizer, error)]) from error

    def token_ids(completions: Sequence[Completion]) -> list[list[int]]:
        texts = [completion_text(completion) for completion in completions]
        ids: list[list[int]] = loaded(texts, add_special_tokens=False)["input_ids"]
        return ids

    return token_ids


def _source_problems(
    reward: Sequence[str], arguments: Sequence[str], config: Path | None
) -> Iterator[str]:
    if bool(reward) == (config is not None):
        yield (
            f"`--reward` and `--config`: {'both' if reward else 'neither'} of them is given, so it "
            "is open what to score with. Name a reward, or give the YAML of a recipe."
        )
    elif config is not None and arguments:
        yield (
            "`--arguments` would have no effect beside `--config`, as the YAML has the arguments "
            "of its rewards. Change them there, or name the reward with `--reward`."
        )
    elif len(arguments) > len(reward) and config is None:
        yield (
            f"`--arguments` is given {len(arguments)} times for {len(reward)} `--reward`, so it is "
            "open what the last ones belong to. Give at most one a reward, in their order."
        )


def _object(at: int, text: str) -> Mapping[str, object]:
    """What was typed is not repeated: it may hold a key."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigurationError(
            [
                f"`--arguments` number {at + 1} is not a JSON object, so the reward cannot be "
                "built. Write names and values in double quotes, such as '{\"span\": 5}'."
            ]
        )
    return value


def _rewards_of(config: Path) -> Sequence[RewardEntry]:
    try:
        keys = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError([_not_yaml(config, " ".join(str(error).split()))]) from error
    rewards = keys.get("rewards") if isinstance(keys, Mapping) else None
    if not isinstance(rewards, list):
        raise ConfigurationError([_not_yaml(config, "it has no list `rewards`")])
    return rewards


def _not_yaml(config: Path, reason: str) -> str:
    return (
        f"`--config` {config} is not the YAML of a recipe ({reason}), so there is no reward to "
        "score with. Correct the file, or name a reward with `--reward`."
    )


def _no_tokenizer(tokenizer: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return (
        f"`--tokenizer` {tokenizer} cannot be loaded ({reason}), so tokens cannot be counted. Give "
        "the folder of a model, or its name on the Hub."
    )
