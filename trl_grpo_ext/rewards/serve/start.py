"""Starting a reward server, and stopping it well."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from typing import NoReturn

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.serve.backends import build_backend
from trl_grpo_ext.rewards.serve.settings import ServeSettings, serve_problems


def serve_reward(settings: ServeSettings) -> None:
    """Serve a reward until SIGTERM or Ctrl-C; requests in flight are answered first.

    Where it starts with Ctrl-C ignored, as a shell script's job in the background does, it goes on
    ignoring it: the script says when the server ends.

    Args:
        settings: What to serve, where, and to whom.

    Raises:
        ConfigurationError: Everything that keeps the server from starting.
        SystemExit: After a signal, with status 0.
    """
    if problems := list(serve_problems(settings)) or list(_port_problems(settings)):
        raise ConfigurationError(problems)
    from trl_grpo_ext.rewards.serve.app import build_server  # needs the extra `serve`

    backend = build_backend(settings)
    try:
        server = build_server(backend, settings=settings)
        with _ending_normally():
            server.run()
    finally:
        backend.close()


def _port_problems(settings: ServeSettings) -> Iterator[str]:
    """Yield why the server could not listen, before a model loads."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        yield (
            f"`port`={settings.port} on `host`={settings.host!r} cannot be listened on "
            f"({error.strerror}), so nobody could ask. Stop what listens there, or choose another "
            "`port` (--port; 0 takes a free one)."
        )


@contextlib.contextmanager
def _ending_normally() -> Iterator[None]:
    """Let the process end with status 0 after a signal to stop, which uvicorn raises again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping = (signal.SIGINT, signal.SIGTERM)
    heard = [sig for sig in stopping if signal.getsignal(sig) is not signal.SIG_IGN]
    before = {sig: signal.signal(sig, _end) for sig in heard}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _end(sig: int, frame: object) -> NoReturn:
    raise SystemExit(0)
