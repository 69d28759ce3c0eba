"""Starting a server: what is refused before anything loads."""

from __future__ import annotations

import socket

import pytest

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.serve.settings import ServeSettings
from trl_grpo_ext.rewards.serve.start import serve_reward


@pytest.mark.parametrize(
    ("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)]
)
def test_a_port_that_is_taken_is_named(host: str, family: socket.AddressFamily) -> None:
    try:
        taken = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with taken:
        port = taken.getsockname()[1]
        settings = ServeSettings(model="/no/such/model", host=host, port=port)
        with pytest.raises(ConfigurationError, match=f"`port`={port} .* cannot be listened on"):
            serve_reward(settings)
