"""The connections by which each process hears of the end of another; see ``peers.py``."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:  # it is generic in the type stubs only
    Line = Connection[Any, Any]

logger = logging.getLogger(__name__)

_HEARING_S = 1.0  # in which the hub also hears what else happened, before it rules
_CONNECT_S = 20.0
_KEEP_ALIVE_S = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # if a machine is gone

_LONGEST_MESSAGE = 10_000  # [bytes]

_open: set[Line] = set()


@dataclass(frozen=True)
class Ruling:
    """What ended the run: ``cause`` of process ``rank``; ``None`` if it ended without a word."""

    rank: int
    cause: str | None

    def line(self, *, rank: int, world: int) -> str:
        """What process ``rank`` of ``world`` says when it ends."""
        who = f"process {self.rank} of {world}"
        if self.cause is None:
            return f"{who} ended without a word (killed?); process {rank} ends too"
        kind = self.cause.partition(": ")[0]  # its message stands in its traceback
        return f"{who} failed with {kind}; process {rank} ends too"


class Hub:
    """In process 0: hears of every process, and rules whose failure is the cause."""

    def __init__(self, ranks: dict[Line, int]) -> None:
        self._ranks = ranks  # of the open connections
        self._world = len(ranks)
        self._num_done = 0
        self._causes: dict[int, str] = {}
        self._ruling: Ruling | None = None
        threading.Thread(target=self._serve, name="peers-hub", daemon=True).start()

    def _serve(self) -> None:
        while self._ranks:
            self._hear(_HEARING_S if self._causes and self._ruling is None else None)
            if self._num_done == self._world:
                self._broadcast({"done": True})
                break
            if len(self._causes) == self._world and len(set(self._causes.values())) == 1:
                self._rule(*next(iter(self._causes.items())))
                self._broadcast({"alike": True})
                break
        for connection in self._ranks:
            close(connection)

    def _hear(self, seconds: float | None) -> None:
        """Hear of some processes; after ``seconds`` of silence, the first error is the cause."""
        ready = wait(list(self._ranks), seconds)
        for connection in ready:
            assert isinstance(connection, Connection)
            self._note(connection, receive(connection))
        if not ready:
            self._rule(*next(iter(self._causes.items())))

    def _note(self, connection: Line, message: dict[str, Any]) -> None:
        rank = self._ranks[connection]
        if "done" in message:
            self._num_done += 1
        elif "failed" in message:
            self._causes[rank] = message["failed"]
        else:  # the process ended
            del self._ranks[connection]
            close(connection)
            if rank not in self._causes:  # the errors of others may come from that
                self._rule(rank, None)

    def _rule(self, rank: int, cause: str | None) -> None:
        if self._ruling is None:
            self._ruling = Ruling(rank, cause)
            self._broadcast(vars(self._ruling))

    def _broadcast(self, message: dict[str, Any]) -> None:
        """Send to every process, to process 0 last: it may end as soon as it has heard."""
        for connection in sorted(self._ranks, key=lambda each: -self._ranks[each]):
            send(connection, message)


# Set up -------------------------------------------------------------------------------------------


def connect_all() -> Line | None:
    """Connect every process of the default group to a hub in process 0; each must call it.

    Returns:
        This process's end; ``None``, with a warning, where some process does not reach process 0.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    server = _server(backlog=world) if rank == 0 else None
    place: list[Any] = [None]
    if server is not None:
        place = [(_own_host(), server.getsockname()[1], secrets.token_hex(16))]
    dist.broadcast_object_list(place, src=0)
    host, port, secret = place[0]
    connection = _connect(host, port)
    connected: list[Any] = [None] * world
    dist.all_gather_object(connected, connection is not None)
    if connection is None or not all(connected):
        if rank == 0:
            logger.warning(_unreachable(host, port, connected))
        return None
    send(connection, {"rank": rank, "secret": secret})
    if server is not None:
        with server:
            Hub(_accept(server, secret, world))
    return connection


def _own_host() -> str:
    """Where the others find process 0: as for ``torch.distributed``, if that was told."""
    return os.environ.get("MASTER_ADDR") or socket.gethostname()


def _server(*, backlog: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=both)


def _connect(host: str, port: int) -> Line | None:
    try:
        return _as_connection(socket.create_connection((host, port), timeout=_CONNECT_S))
    except OSError:
        return None


def _accept(server: socket.socket, secret: str, world: int) -> dict[Line, int]:
    """Return the connections, which all wait in the backlog, with their ranks."""
    ranks: dict[Line, int] = {}
    while len(ranks) < world:
        connection = _as_connection(server.accept()[0])
        hello = receive(connection) if connection.poll(_CONNECT_S) else {}
        if hello.get("secret") == secret:
            ranks[connection] = hello["rank"]
        else:
            close(connection)  # a stranger
    return ranks


def _as_connection(connected: socket.socket) -> Line:
    connected.settimeout(None)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in _KEEP_ALIVE_S.items():
        if hasattr(socket, option):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
    connection: Line = Connection(connected.detach())
    _open.add(connection)
    return connection


def _unreachable(host: str, port: int, connected: list[bool]) -> str:
    ranks = ", ".join(str(rank) for rank, reached in enumerate(connected) if not reached)
    return (
        f"processes {ranks} do not reach process 0 at {host}:{port}, so a process that fails is "
        "noticed by the time limit of the collectives only. Let the machines of the run connect to "
        "each other at any port, or set MASTER_ADDR to where process 0 is."
    )


# Messages -----------------------------------------------------------------------------------------


def send(connection: Line, message: dict[str, Any]) -> None:
    """Send; if the other end is gone, whoever receives from it hears of that."""
    with suppress(OSError):
        connection.send_bytes(json.dumps(message).encode())


def receive(connection: Line) -> dict[str, Any]:
    """Return the next message; an empty one if the other end is gone."""
    try:
        message: dict[str, Any] = json.loads(connection.recv_bytes(_LONGEST_MESSAGE))
    except (EOFError, OSError, ValueError):
        return {}
    return message


def close(connection: Line) -> None:
    """Close this end; the process at the other one hears of it."""
    _open.discard(connection)
    connection.close()


def _forget_in_child() -> None:
    """A forked child holds no connection: it may outlive its process, whose end must be heard."""
    for connection in list(_open):
        close(connection)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
