"""Rewards by name: the built-in ones, and any function or class at an import path."""

from __future__ import annotations

import functools
import inspect
import math
import pkgutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import TypeAlias, cast

from trl_grpo_ext.errors import ConfigurationError

RewardFunction: TypeAlias = Callable[..., Sequence[float | None]]
RewardEntry: TypeAlias = "str | Mapping[str, object] | RewardSpec"

# To add a reward: write its file, add its line here.
BUILT_IN_REWARDS: Mapping[str, str] = {
    "api": "trl_grpo_ext.rewards.api.reward:APIReward",
    "code": "trl_grpo_ext.rewards.code.reward:CodeReward",
    "format": "trl_grpo_ext.rewards.format:FormatReward",
    "language": "trl_grpo_ext.rewards.language:LanguageReward",
    "last_number": "trl_grpo_ext.rewards.number:LastNumberReward",
    "length": "trl_grpo_ext.rewards.length:LengthReward",
    "math": "trl_grpo_ext.rewards.math.reward:MathReward",
    "number_distance": "trl_grpo_ext.rewards.number:NumberDistanceReward",
    "outcome_model": "trl_grpo_ext.rewards.models.outcome:OutcomeModelReward",
    "process_model": "trl_grpo_ext.rewards.models.process:ProcessModelReward",
    "reasoning_gym": "trl_grpo_ext.rewards.reasoning_gym:ReasoningGymReward",
    "repetition": "trl_grpo_ext.rewards.repetition:RepetitionReward",
}

# Passed to every reward function by TRL 1.16 beside the columns of the dataset.
TRL_ARGUMENTS = frozenset(
    {
        "prompts",
        "completions",
        "completion_ids",
        "trainer_state",
        "log_extra",
        "log_metric",
        "environments",
    }
)

# Those that are always there.
ALWAYS_PASSED = TRL_ARGUMENTS - {"environments"}


@dataclass(frozen=True)
class RewardSpec:
    """One entry of `rewards` in the YAML.

    Args:
        name: A built-in name, or an import path ``package.module:object``.
        weight: What the reward is multiplied by before the rewards are added up.
        arguments: Keyword arguments of the reward class or function.
    """

    name: str
    weight: float = 1.0
    arguments: Mapping[str, object] = field(default_factory=dict)


def resolve_reward(name: str) -> RewardFunction | type:
    """Return the reward class or function that a name stands for.

    An import path runs the code of its module, so take one only from a file that you trust.

    Args:
        name: A built-in name, or an import path ``package.module:object``.

    Raises:
        ConfigurationError: No built-in reward has this name, or the import path leads nowhere.

    Example:
        >>> resolve_reward("last_number")
        <class 'trl_grpo_ext.rewards.number.LastNumberReward'>
    """
    path = BUILT_IN_REWARDS.get(name, name)
    if ":" not in path:
        raise ConfigurationError([_unknown_name(name)])
    try:
        reward = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError([_broken_path(path, error)]) from error
    if not callable(reward):
        raise ConfigurationError([_not_callable(path, reward)])
    return cast("RewardFunction | type", reward)


def build_rewards(specs: Sequence[RewardEntry]) -> tuple[list[RewardFunction], list[float]]:
    """Return the reward functions and their weights, as TRL's trainer and config take them.

    A class is made into an object with the arguments; a function that has arguments is bound to
    them and keeps its ``__name__``, under which TRL logs it.

    Args:
        specs: Names, mappings with the keys of :class:`RewardSpec`, or such objects.

    Returns:
        The functions, to be given as ``reward_funcs``, and for each its weight, to be given as
        ``reward_weights``.

    Raises:
        ConfigurationError: What :func:`reward_problems` finds.

    Example:
        >>> functions, weights = build_rewards(
        ...     ["last_number", {"name": "format", "weight": 0.5, "arguments": {"pattern": "7"}}]
        ... )
        >>> [function.__name__ for function in functions], weights
        (['last_number', 'format'], [1.0, 0.5])
    """
    functions, weights, problems = _build_all(specs)
    if problems:
        raise ConfigurationError(problems)
    return functions, weights


def reward_problems(specs: Sequence[RewardEntry]) -> list[str]:
    """Return everything that is wrong with the rewards, one message each; empty if nothing is.

    Args:
        specs: Names, mappings with the keys of :class:`RewardSpec`, or such objects.

    Example:
        >>> print(reward_problems(["last_numbr"])[0])  # doctest: +ELLIPSIS
        reward 'last_numbr' is not known (known: ...), so the replies cannot be scored. Set \
`name` in `rewards` to 'last_number', or to an import path `package.module:object`.
    """
    return _build_all(specs)[2]


def required_columns(reward: RewardFunction) -> frozenset[str]:
    """Return the dataset columns without which the reward cannot be called.

    They are the attribute ``required_columns`` of the reward, or else the parameters without a
    default that TRL does not pass on its own.

    Example:
        >>> def solved(completions, solution, **columns): ...
        >>> required_columns(solved)
        frozenset({'solution'})
    """
    declared: frozenset[str] | None = getattr(reward, "required_columns", None)
    if declared is not None:
        return frozenset(declared)
    names = (p.name for p in _named_parameters(reward) if p.default is inspect.Parameter.empty)
    return frozenset(names) - TRL_ARGUMENTS


def _build_all(
    specs: Sequence[RewardEntry],
) -> tuple[list[RewardFunction], list[float], list[str]]:
    """Return the functions and weights that could be built, and the problems of the others."""
    functions: list[RewardFunction] = []
    weights: list[float] = []
    problems = [] if specs else [_no_rewards()]
    for entry in specs:
        try:
            spec = _read_entry(entry)
            functions.append(_build(spec))
            weights.append(spec.weight)
        except ConfigurationError as error:
            problems += error.problems
    return functions, weights, problems + _shared_names(functions)


def _read_entry(entry: RewardEntry) -> RewardSpec:
    if isinstance(entry, RewardSpec):
        return entry
    settings = {"name": entry} if isinstance(entry, str) else entry
    if problems := _entry_problems(settings):
        raise ConfigurationError(problems)
    return RewardSpec(
        name=str(settings["name"]),
        weight=float(str(settings.get("weight", 1.0))),
        arguments=cast("Mapping[str, object]", settings.get("arguments") or {}),
    )


def _entry_problems(settings: object) -> list[str]:
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        return [_no_name(settings)]
    name, problems = settings["name"], []
    known = [known.name for known in fields(RewardSpec)]
    if unknown := sorted(str(key) for key in settings if key not in known):
        problems.append(_unknown_keys(name, unknown, known))
    if not _is_finite(settings.get("weight", 1.0)):
        problems.append(_bad_weight(name, settings["weight"]))
    if not isinstance(settings.get("arguments") or {}, Mapping):
        problems.append(_bad_arguments(name, settings["arguments"]))
    return problems


def _is_finite(weight: object) -> bool:
    try:
        return math.isfinite(float(str(weight)))
    except ValueError:
        return False


def _build(spec: RewardSpec) -> RewardFunction:
    reward = resolve_reward(spec.name)
    _check_arguments(spec, reward)
    if inspect.isclass(reward):
        built = _instance(spec, reward)
    elif spec.arguments:
        built = functools.partial(reward, **spec.arguments)
        vars(built)["__name__"] = log_name(reward)
    else:
        built = reward
    _check_call(spec, built)
    return built


def _check_call(spec: RewardSpec, built: object) -> None:
    """Raise if TRL could not call what was built; a factory of rewards is such a thing."""
    parameters = inspect.signature(built).parameters if callable(built) else {}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    refused = sorted(ALWAYS_PASSED - set(parameters))
    if refused:
        raise ConfigurationError(
            [
                f"reward {spec.name!r} does not accept `{refused[0]}`, which TRL passes to every "
                "reward, so it cannot score replies. Name a function (not one that makes a "
                "function) or a class of objects to call, with `**columns` for what it does not "
                "need: def reward(*, prompts, completions, **columns)."
            ]
        )


def _instance(spec: RewardSpec, reward: type) -> RewardFunction:
    try:
        instance = reward(**spec.arguments)
    except ConfigurationError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError([_failed_to_build(spec, error)]) from error
    return cast("RewardFunction", instance)


def _check_arguments(spec: RewardSpec, reward: RewardFunction | type) -> None:
    """Raise if an argument is not accepted, or if a class lacks one that it needs."""
    named = _named_parameters(reward)
    accepted = sorted({p.name for p in named} - TRL_ARGUMENTS)
    unknown = [] if _takes_any_keyword(reward) else sorted(set(spec.arguments) - set(accepted))
    needed = {p.name for p in named if p.default is inspect.Parameter.empty}
    missing = sorted(needed - set(spec.arguments)) if inspect.isclass(reward) else []
    if unknown or missing:
        raise ConfigurationError([_wrong_arguments(spec, unknown, missing, accepted)])


def _named_parameters(reward: RewardFunction | type) -> list[inspect.Parameter]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(reward).parameters.values()
    return [parameter for parameter in parameters if parameter.kind not in variadic]


def _takes_any_keyword(reward: RewardFunction | type) -> bool:
    parameters = inspect.signature(reward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def log_name(reward: RewardFunction) -> str:
    """Return the name under which TRL logs the reward."""
    return str(getattr(reward, "__name__", type(reward).__name__))


def _shared_names(functions: Sequence[RewardFunction]) -> list[str]:
    counts = Counter(log_name(function) for function in functions)
    return [_shared_name(name, count) for name, count in counts.items() if count > 1]


def _shared_name(name: str, count: int) -> str:
    return (
        f"{count} of the `rewards` are called '{name}', so their curves would be merged in the "
        "logs. Give each its own name: built-in rewards take `log_as` in their `arguments`, your "
        "own set `__name__`."
    )


def _unknown_name(name: str) -> str:
    close = get_close_matches(name, BUILT_IN_REWARDS, n=1)
    suggestion = f"'{close[0]}'" if close else "one of them"
    return (
        f"reward '{name}' is not known (known: {', '.join(sorted(BUILT_IN_REWARDS))}), so the "
        f"replies cannot be scored. Set `name` in `rewards` to {suggestion}, or to an import path "
        "`package.module:object`."
    )


def _broken_path(path: str, error: Exception) -> str:
    return (
        f"reward '{path}' could not be imported ({type(error).__name__}: {error}), so the replies "
        "cannot be scored. Correct the import path in `rewards`, or install the module or add its "
        "folder to PYTHONPATH."
    )


def _not_callable(path: str, reward: object) -> str:
    return (
        f"reward '{path}' is a {type(reward).__name__}, which cannot be called to score replies. "
        "Set the import path in `rewards` to a function or a class."
    )


def _no_rewards() -> str:
    return (
        "`rewards` is empty, so there is nothing to learn from. Add at least one of "
        f"{', '.join(sorted(BUILT_IN_REWARDS))}, or an import path `package.module:object`."
    )


def _no_name(entry: object) -> str:
    return (
        f"`rewards` holds {entry!r}, which names no reward, so it cannot be built. Write a name, "
        "or a mapping such as {name: last_number, weight: 1.0, arguments: {}}."
    )


def _unknown_keys(name: str, unknown: Sequence[str], known: Sequence[str]) -> str:
    return (
        f"reward '{name}' has the unknown keys {', '.join(unknown)}, which would have no effect. "
        f"Use {', '.join(known)}; what the reward itself takes goes into `arguments`."
    )


def _bad_weight(name: str, weight: object) -> str:
    return (
        f"reward '{name}' has `weight`={weight!r}, which is not a finite number, so the rewards "
        "cannot be added up. Set `weight` to a number, 1.0 by default."
    )


def _bad_arguments(name: str, arguments: object) -> str:
    return (
        f"reward '{name}' has `arguments`={arguments!r}, which is not a mapping, so the reward "
        "cannot be built. Write names and values, such as {answer_column: answer}."
    )


def _wrong_arguments(
    spec: RewardSpec, unknown: Sequence[str], missing: Sequence[str], accepted: Sequence[str]
) -> str:
    found = [f"does not accept {', '.join(unknown)}"] if unknown else []
    found += [f"needs {', '.join(missing)}"] if missing else []
    takes = f"It accepts {', '.join(accepted)}" if accepted else "It accepts no arguments"
    return (
        f"reward '{spec.name}' {' and '.join(found)}, so it cannot be built. {takes}: correct its "
        "`arguments` in `rewards`."
    )


def _failed_to_build(spec: RewardSpec, error: Exception) -> str:
    return (
        f"reward '{spec.name}' refused its arguments ({type(error).__name__}: {error}), so the "
        "replies cannot be scored. Correct its `arguments` in `rewards`."
    )
