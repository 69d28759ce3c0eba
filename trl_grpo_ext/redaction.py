"""What is a secret in settings, commands and addresses, and text without it."""

from __future__ import annotations

import re

HIDDEN = "(not shown)"

_SECRET_KEY = re.compile(
    r"api_?key|secret|password|authorization|bearer|(hub|access|auth)_token"
    r"|(^|_)(token|key|headers|cookies?)$",
    re.IGNORECASE,
)
_SIGNED = re.compile(r"([?&][\w.-]*(?:key|token|secret|sig\w*|password)=)[^&\s\"']+", re.IGNORECASE)
# Up to the last @ of the host's part, or of a password with a slash in it; digits are a port.
_LOGIN = re.compile(r"(?<=://)(?:[^\s/]*@|[^\s/@:]*:(?!\d+/)[^\s@]*@)")
_OPTION = re.compile(r"(--[\w-]*(?:token|key|password|secret)(?:=|\s+))[^\s\"']+", re.IGNORECASE)
_TOKEN = re.compile(r"\b(?:hf_|sk-)[\w-]{16,}")


def is_secret(key: str) -> bool:
    """Return whether what stands under this name is a secret.

    Example:
        >>> list(map(is_secret, ("hub_token", "api-key", "headers", "max_tokens", "token_env")))
        [True, True, True, False, False]
    """
    return bool(_SECRET_KEY.search(key.lstrip("-").replace("-", "_")))


def without_credentials(text: str) -> str:
    """Return text without logins in addresses, signatures of them, secret options, and tokens.

    Example:
        >>> without_credentials("https://me:p@w@host/v1?key=abc --token=abc hf_abcdefghijklmnopqrs")
        'https://(not shown)@host/v1?key=(not shown) --token=(not shown) (not shown)'
    """
    text = _LOGIN.sub(f"{HIDDEN}@", text)
    for pattern in (_SIGNED, _OPTION):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text)
