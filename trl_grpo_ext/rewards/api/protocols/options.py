"""The options of a protocol: fields of a frozen dataclass, checked as a whole."""

from __future__ import annotations

import hashlib
import json
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.api.wire import Item, Reply, WireRequest

# Options that change how many requests are made, but no score.
_NOT_IN_VERSION = frozenset({"batch_size"})


@dataclass(frozen=True, kw_only=True)
class ServiceProtocol:
    """Base of the protocols: its fields are the options, :meth:`problems` says what cannot work.

    Raises:
        ConfigurationError: the options cannot work; all problems at once.
    """

    name: ClassVar[str] = ""
    # Counted up when the same items are asked or read differently with the same options.
    revision: ClassVar[int] = 1
    required: ClassVar[tuple[str, ...]] = ()
    # Whether a score depends on the other completions of the group.
    is_relative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        problems = type_problems(type(self), values) or list(self.problems())
        if problems:
            raise ConfigurationError(problems)

    @property
    def version(self) -> str:
        """The name, the revision and a digest of the options."""
        options = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if option.name not in _NOT_IN_VERSION
        }
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{self.revision}-{digest[:16]}"

    @property
    def is_sampled(self) -> bool:
        """Whether the same request may give another score; reward models do not sample."""
        return False

    @property
    def required_columns(self) -> frozenset[str]:
        """The columns of the data set that are sent or compared with."""
        named = (o.name for o in fields(self) if o.name == "column" or o.name.endswith("_column"))
        return frozenset(getattr(self, option) for option in named if getattr(self, option))

    def requests(self, items: Sequence[Item]) -> list[WireRequest]:
        """Return the requests that score these items."""
        raise NotImplementedError

    def parse(self, request: WireRequest, body: Any) -> Reply:
        """Return the scores in a decoded JSON body."""
        raise NotImplementedError

    def problems(self) -> Iterator[str]:
        """Yield what cannot work, one sentence of three parts each."""
        for option in self.required:
            if not getattr(self, option):
                yield self.problem(
                    option, "is not set, so the service could not be asked", "Set it"
                )
        size = getattr(self, "batch_size", 1)
        if size < 1:
            yield self.problem(
                "batch_size", f"is {size}, so nothing could be asked", "Use 1 or more"
            )

    def problem(self, option: str, found: str, advice: str) -> str:
        """Return a message about one option."""
        return f"protocol '{self.name}': `{option}` {found}. {advice}."


def type_problems(protocol: type[ServiceProtocol], options: Mapping[str, object]) -> list[str]:
    """Return a message for each of the options whose value is of another type than it should be."""
    hints = get_type_hints(protocol)
    return [
        f"protocol '{protocol.name}': `{option}` is {shown(value)}, which is not "
        f"{described(hints[option])}, so the service could not be asked. Correct it."
        for option, value in options.items()
        if not fits(value, hints[option])
    ]


def fits(value: object, hint: Any) -> bool:
    """Return whether a value from a YAML file is of the type that an annotation names.

    A list counts as a tuple, an integer as a float; a boolean is no number, and a number is finite.

    Example:
        >>> fits([0, 10], tuple[float, float]), fits(True, float), fits(None, str | None)
        (True, False, True)
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return _is_json(value)
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        return _fits_each(value, args)
    if origin is Mapping:
        return isinstance(value, dict) and all(
            fits(key, args[0]) and fits(entry, args[1]) for key, entry in value.items()
        )
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value)
    return isinstance(value, hint) and (hint is not int or not isinstance(value, bool))


def _fits_each(value: object, args: tuple[Any, ...]) -> bool:
    if not isinstance(value, list | tuple):
        return False
    wanted = args[:1] * len(value) if args[-1] is Ellipsis else args
    return len(value) == len(wanted) and all(map(fits, value, wanted))


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


_WORDS = {bool: "true or false", float: "a finite number", int: "a whole number", str: "a text"}


def described(hint: Any) -> str:
    """Return the words for a type in a message.

    Example:
        >>> described(Literal["mean", "min"] | None), described(tuple[float, float])
        ("one of 'mean', 'min' or null", 'a list of 2 (a finite number)')
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(described(arg) for arg in args)
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is tuple:
        length = "" if args[-1] is Ellipsis else f" of {len(args)}"
        return f"a list{length} ({described(args[0])})"
    if origin is Mapping:
        return f"a mapping (texts to {described(args[1])})"
    return "null" if hint is type(None) else _WORDS.get(hint, "JSON")


def shown(value: object) -> str:
    """Return the start of a value and its type, for a message."""
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"
