"""What a reward server is started with, checked before a model loads."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any, get_args

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.models.settings import DType


@dataclass(frozen=True)
class Limits:
    """What one server takes from its clients; what is beyond is refused.

    Args:
        body_bytes: Of one request.
        texts: In one request.
        characters: In one text.
        requests: Read or answered at once; more get status 429.
        texts_in_flight: Waiting or being scored, of all requests; more get status 429.
        read_timeout_s: In which the body of a request must arrive.
    """

    body_bytes: int = 16 * 2**20
    texts: int = 1024
    characters: int = 200_000
    requests: int = 64
    texts_in_flight: int = 8192
    read_timeout_s: float = 30.0


@dataclass(frozen=True)
class ServeSettings:
    """Settings of ``trl-grpo-ext serve-reward``; one of ``model`` and ``reward`` is given.

    Args:
        model: Folder or Hub name of a sequence-classification model.
        reward: Built-in name or import path of a reward function. An import path runs its code.
        reward_arguments: Keyword arguments of the reward class or function.
        name: Under which clients know it; ``model`` or ``reward`` if not given.
        host: Interface to listen on.
        port: To listen on; 0 takes a free one.
        token_env: Environment variable that holds the token clients must send.
        label: Index of the logit that is the reward, for a model with several labels.
        label_column: What a reward function calls the ``labels`` of a request.
        pad_token: For a model that names none, a token of its vocabulary.
        device: ``auto`` (the GPU where there is one), or a name of torch such as ``cuda:1``.
        dtype: Of the weights; ``auto`` is bfloat16 on a GPU that has it, else float32.
        max_tokens: Of one text; the model's own limit if not given.
        max_batch_tokens: Of one forward pass, padding included; a longer text goes alone.
        max_padding: Share of padding in one forward pass, from 0 to below 1.
        max_wait_ms: How long a request waits for others to share its forward pass.
        grace_s: For requests in flight when the server is told to stop.
        limits: See :class:`Limits`.
    """

    model: str | None = None
    reward: str | None = None
    reward_arguments: Mapping[str, object] = field(default_factory=dict)
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    token_env: str | None = None
    label: int | None = None
    label_column: str = "answer"
    pad_token: str | None = None
    device: str = "auto"
    dtype: DType = "auto"
    max_tokens: int | None = None
    max_batch_tokens: int = 16384
    max_padding: float = 0.25
    max_wait_ms: float = 5.0
    grace_s: int = 30
    limits: Limits = field(default_factory=Limits)

    @property
    def served_name(self) -> str:
        """The name under which clients know what is served."""
        return self.name or self.model or self.reward or ""

    @property
    def token(self) -> str | None:
        """The token that clients must send, or ``None`` if anybody may ask."""
        return os.environ.get(self.token_env, "") if self.token_env is not None else None


def settings_of(*, reward_arguments: str, **typed: Any) -> ServeSettings:
    """Return settings from what was typed, each option as in ``serve-reward --help``.

    Raises:
        ConfigurationError: ``reward_arguments`` is no JSON object.

    Example:
        >>> settings_of(reward="number_distance", reward_arguments='{"span": 4}').reward_arguments
        {'span': 4}
    """
    try:
        arguments = json.loads(reward_arguments)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        problem = (
            f"`reward_arguments`={reward_arguments!r} is no JSON object, so the reward cannot be "
            """built. Write them like '{"span": 4}'."""
        )
        raise ConfigurationError([problem])
    return ServeSettings(reward_arguments=arguments, **typed)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server on that interface.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0")
        (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name, or empty, which is every interface
        return False


def serve_problems(settings: ServeSettings) -> Iterator[str]:
    """Yield everything that keeps a server from starting with these settings.

    Example:
        >>> [problem] = serve_problems(ServeSettings(reward="last_number", host="0.0.0.0"))
        >>> problem.startswith("`host`='0.0.0.0' can be reached from other machines")
        True
    """
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        yield (
            f"{' and '.join(missing)} is not installed, so nothing can be served. "
            "Install it with pip install 'trl-grpo-ext[serve]'."
        )
    if (settings.model is None) == (settings.reward is None):
        yield (
            f"`model`={settings.model!r} and `reward`={settings.reward!r}: a server serves one of "
            "them. Give a model, or the name of a reward function."
        )
    yield from _token_problems(settings)
    yield from _number_problems(settings)


def _token_problems(settings: ServeSettings) -> Iterator[str]:
    if settings.token_env is None:
        if not is_loopback(settings.host):
            yield (
                f"`host`={settings.host!r} can be reached from other machines, and without a token "
                "anybody there may use this server. Set `token_env` to the name of an environment "
                "variable that holds a token, or listen on 127.0.0.1."
            )
        return
    token = settings.token
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        yield (
            f"The environment variable {settings.token_env} (`token_env`) is "
            f"{'not what a header can hold' if token else 'empty or not set'}, so no client could "
            "be told from a stranger. Put a token of printable ASCII without spaces into it."
        )


def _number_problems(settings: ServeSettings) -> Iterator[str]:
    """Yield what is out of range."""
    whole = {"max_batch_tokens": settings.max_batch_tokens, "max_tokens": settings.max_tokens}
    whole |= {name: getattr(settings.limits, name) for name in (f.name for f in fields(Limits))}
    for name, value in whole.items():
        if value is not None and not value > 0:
            yield f"`{name}`={value} lets no text through. Set it above 0."
    if not 0 <= settings.max_padding < 1:
        yield (
            f"`max_padding`={settings.max_padding} is no share of a forward pass. "
            "Set it from 0 (only texts of one length together) to below 1."
        )
    for name in ("max_wait_ms", "grace_s"):
        if not 0 <= getattr(settings, name) < float("inf"):
            yield f"`{name}`={getattr(settings, name)} is no time to wait. Set it to 0 or more."
    if not 0 <= settings.port < 65536:
        yield f"`port`={settings.port} does not exist. Choose one from 1 to 65535, or 0 for any."
    if settings.limits.texts > settings.limits.texts_in_flight:
        yield (
            f"`texts`={settings.limits.texts} is above "
            f"`texts_in_flight`={settings.limits.texts_in_flight}, so the largest requests would "
            "be told to come back for ever. Lower the one or raise the other."
        )
    if settings.dtype not in get_args(DType):
        yield f"`dtype`={settings.dtype!r} is not known. Choose auto, float32 or bfloat16."
    if settings.label is not None and settings.label < 0:
        yield f"`label`={settings.label} is no index of a logit. Count from 0."
