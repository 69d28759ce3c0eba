"""How two processes that do not trust each other talk: frames of JSON, and values of plain types.

Only values of exact standard types cross, so what arrives compares as the standard types do,
whatever the other side did to its own.
"""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

Keep = Callable[[object], int]
Find = Callable[[int], object]

_HEADER_BYTES = 8
_SMALL_INT_BITS = 1000  # larger ones are written in hexadecimal, which takes linear time

_SEQUENCES: dict[str, Any] = {kind.__name__: kind for kind in (list, tuple, set, frozenset, deque)}
_MAPPINGS: dict[str, Any] = {
    kind.__name__: kind for kind in (dict, OrderedDict, Counter, defaultdict)
}
_WRITTEN: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bytes: ("bytes", bytes.hex),
    bytearray: ("bytearray", bytearray.hex),
    complex: ("complex", lambda value: [value.real, value.imag]),
    range: ("range", lambda value: [value.start, value.stop, value.step]),
    Decimal: ("Decimal", str),
    Fraction: ("Fraction", lambda value: [hex(value.numerator), hex(value.denominator)]),
    datetime.date: ("date", datetime.date.isoformat),
    datetime.datetime: ("datetime", datetime.datetime.isoformat),
    datetime.timedelta: (
        "timedelta",
        lambda value: [value.days, value.seconds, value.microseconds],
    ),
}
_READ: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
    "Decimal": Decimal,
    "Fraction": lambda parts: Fraction(int(parts[0], 16), int(parts[1], 16)),
    "date": datetime.date.fromisoformat,
    "datetime": datetime.datetime.fromisoformat,
    "timedelta": lambda parts: datetime.timedelta(*parts),
}


def encode(value: Any, *, keep: Keep) -> Any:
    """Return a value as JSON can hold it, with its exact type.

    Args:
        value: Of any type.
        keep: Given a value that is not of a plain type, returns the number that stands for it.

    Example:
        >>> encode([1, (2.5, "a")], keep=id)
        ['list', [1, ['tuple', [2.5, 'a']]]]
    """
    kind: Any = type(value)
    if kind is int and value.bit_length() > _SMALL_INT_BITS:
        return ["int", hex(value)]
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in _SEQUENCES.values():
        return [kind.__name__, [encode(item, keep=keep) for item in value]]
    if kind in _MAPPINGS.values():
        pairs = [[encode(part, keep=keep) for part in pair] for pair in value.items()]
        return [kind.__name__, pairs]
    if kind in _WRITTEN:
        name, write = _WRITTEN[kind]
        return [name, write(value)]
    return ["object", keep(value)]


def decode(data: Any, *, find: Find) -> Any:
    """Return the value that :func:`encode` wrote.

    Args:
        data: Decoded JSON, of any content.
        find: Given the number that stands for a value of no plain type, returns the stand-in.

    Raises:
        ValueError: it is nothing that :func:`encode` writes; other standard exceptions where a
            value cannot be built, such as a set of lists.

    Example:
        >>> decode(["list", [1, ["tuple", [2.5, "a"]]]], find=print)
        [1, (2.5, 'a')]
    """
    if not isinstance(data, list):
        return data
    name, content = data
    if name in _SEQUENCES:
        return _SEQUENCES[name](decode(item, find=find) for item in content)
    if name in _MAPPINGS:
        pairs = {decode(key, find=find): decode(item, find=find) for key, item in content}
        return defaultdict(None, pairs) if name == "defaultdict" else _MAPPINGS[name](pairs)
    if name in _READ:
        return _READ[name](content)
    if name == "object":
        return find(content)
    raise ValueError(f"{name!r} is no plain type")


class Channel:
    """Frames of JSON over two file descriptors, which may be one socket.

    Args:
        read_fd: Where frames come from.
        write_fd: Where frames go to.
        max_bytes: Of a frame that is read; a longer one is refused unread.
    """

    def __init__(self, read_fd: int, write_fd: int, *, max_bytes: int) -> None:
        self._read_fd, self._write_fd, self._max_bytes = read_fd, write_fd, max_bytes

    def send(self, message: Any) -> None:
        """Write a frame.

        Raises:
            OSError: The other side is gone.
        """
        write_all(self._write_fd, frame(message))

    def receive(self) -> Any:
        """Return what the next frame holds.

        Raises:
            EOFError: The other side is gone, or its frame is too long.
        """
        length = int.from_bytes(self._read(_HEADER_BYTES), "big")
        if length > self._max_bytes:
            raise EOFError(f"a frame of {length} bytes")
        return json.loads(self._read(length))

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = os.read(self._read_fd, min(count - len(parts), 1 << 16))
            if not part:
                raise EOFError("the other side ended")
            parts += part
        return bytes(parts)


def frame(message: Any) -> bytes:
    """Return a message as it is written: eight bytes of length, then JSON."""
    content = json.dumps(message).encode()
    return len(content).to_bytes(_HEADER_BYTES, "big") + content


def write_all(fd: int, data: bytes) -> None:
    """Write all bytes to a blocking file descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
