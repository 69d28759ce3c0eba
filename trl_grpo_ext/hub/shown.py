"""What may be shown of settings and of a command: everything but secrets."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path

import psutil
from huggingface_hub import get_token

from trl_grpo_ext.redaction import HIDDEN, is_secret, without_credentials

_SECRET_VARIABLE = re.compile(r"(token|key|secret|password)$", re.IGNORECASE)
_SHORTEST_SECRET = 8  # [characters] below, a word of the text could be meant
_LAUNCHERS = {"accelerate", "torchrun", "deepspeed"}


def shown(value: object) -> object:
    """Return a setting as plain values, without secrets.

    Example:
        >>> shown({"url": "https://me:pw@host/v1?key=abc", "headers": {"X-Auth": "abc"}})
        {'url': 'https://(not shown)@host/v1?key=(not shown)', 'headers': '(not shown)'}
    """
    if isinstance(value, Mapping):
        return {
            str(key): HIDDEN if is_secret(str(key)) and each else shown(each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple | set):
        return [shown(each) for each in value]
    if isinstance(value, Enum):
        return shown(value.value)
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    if isinstance(value, bool | int | float | None):
        return value
    return without_credentials(str(value))


def without_secrets(text: str, *, known: Iterable[str | None] = ()) -> str:
    """Return text without the token of the Hub, and what variables such as ``*_API_KEY`` hold.

    Args:
        text: Of a card.
        known: More secrets.
    """
    variables = [value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)]
    for secret in (*known, get_token(), *variables):
        if secret and len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, HIDDEN)
    return text


def command_line() -> str | None:
    """Return the command that started this program, without secrets; ``None`` in a notebook.

    Under a launcher it is the launcher's.
    """
    if "ipykernel" in sys.modules:
        return None
    return shown_command(_launched() or ["python", *sys.argv])


def shown_command(words: Sequence[str]) -> str:
    """Return a command as one types it, with ``...`` for the values of secret options.

    Example:
        >>> shown_command(["python", "run.py", "--hub_token", "hf_x", "--api-key=x", "--lr=1"])
        'python run.py --hub_token ... --api-key=... --lr=1'
    """
    typed: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        option, equals, _ = word.partition("=")
        if before.startswith("--") and "=" not in before and is_secret(before):
            typed.append("...")
        elif word.startswith("--") and equals and is_secret(option):
            typed.append(f"{option}=...")
        else:
            typed.append(shlex.quote(str(shown(word))))
    return " ".join(typed)


def _launched() -> list[str] | None:
    """The words of the launcher above this process, if there is one."""
    script = Path(sys.argv[0]).name
    try:
        commands = [parent.cmdline() for parent in psutil.Process().parents()]
    except psutil.Error:
        return None
    for command in reversed(commands):
        names = [Path(word).name for word in command]
        found = [index for index, name in enumerate(names[:3]) if name in _LAUNCHERS]
        if script and found and script in names:
            return [names[found[0]], *command[found[0] + 1 :]]
    return None
