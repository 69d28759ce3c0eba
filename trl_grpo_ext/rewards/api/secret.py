"""The key of a service: read from the environment, and masked wherever text leaves us."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator

MASK = "***"

# What a variable usually is called. Anything else may be a key, put there by mistake.
_USUAL_NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
_HEADER_SAFE = re.compile(r"[!-~]+")


def read_key(variable: str | None) -> str | None:
    """Return what the environment variable holds, ``None`` without a variable or without a value.

    The key is read where it is used, and kept in no object that is printed or pickled.
    """
    return os.environ.get(variable) or None if variable else None


def key_problems(variable: object) -> Iterator[str]:
    """Yield why this is not the name of a variable with a key in it."""
    if variable is None:
        return
    if not isinstance(variable, str) or not variable:
        yield (
            "`api_key_env` is not the name of an environment variable, so there would be no key. "
            "Set `api_key_env` to such a name, or leave it out for a service without keys."
        )
        return
    key = read_key(variable)
    if key is None:
        yield (
            f"`api_key_env` names {shown_name(variable)}, which is not set, so the service would "
            "refuse every request. Export the key in a variable, and set `api_key_env` to the "
            "variable's name, not to the key."
        )
    elif not _HEADER_SAFE.fullmatch(key):
        yield (
            f"`api_key_env` names {shown_name(variable)}, whose value holds spaces, line breaks "
            "or letters beyond ASCII, so it cannot be sent in a header. Export the key alone."
        )


def shown_name(variable: str) -> str:
    """Return the variable's name, or a mask if it does not look like one.

    Example:
        >>> shown_name("JUDGE_API_KEY"), shown_name("sk-live-4242")
        ("'JUDGE_API_KEY'", '***')
    """
    return repr(variable) if _USUAL_NAME.fullmatch(variable) else MASK


def masked(text: str, *, key: str | None) -> str:
    """Return the text without the key, also where it is escaped for JSON or for a URL, or base64.

    Example:
        >>> masked('{"error": "no such key: a+b"}', key="a+b")
        '{"error": "no such key: ***"}'
    """
    if not key:
        return text
    escaped = "".join(_forms(letter) for letter in key)
    return re.sub("|".join([escaped, *map(re.escape, _encoded(key))]), MASK, text)


def excerpt(text: str, *, key: str | None, max_characters: int = 300) -> str:
    """Return the start of an untrusted text on one line, masked, for a message.

    Control characters and lone surrogates are escaped.
    """
    line = " ".join(masked(text, key=key).split())
    cut = line[:max_characters] + ("..." if len(line) > max_characters else "")
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in cut
    )


def _encoded(key: str) -> list[str]:
    """Return the key in base64, of either alphabet; padding may follow."""
    written = key.encode()
    forms = [base64.b64encode(written), base64.urlsafe_b64encode(written)]
    return [form.decode().rstrip("=") for form in forms]


def _forms(letter: str) -> str:
    """Return a pattern for a letter as it is, or escaped for JSON or for a URL."""
    escapes = rf"\\u(?i:{ord(letter):04x})|%(?i:{ord(letter):02x})"
    return rf"(?:\\?{re.escape(letter)}|{escapes})"
