"""A real server on this machine, and small models to serve."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rewards.models.tiny_orm import save_orm
from rewards.serve.client import Client, Serving, until

from trl_grpo_ext.rewards.serve.app import build_server
from trl_grpo_ext.rewards.serve.backends import Backend
from trl_grpo_ext.rewards.serve.settings import ServeSettings


@pytest.fixture
def serving() -> Serving:
    """``with serving(backend, **settings) as client``: uvicorn in a thread, on a free port."""

    @contextlib.contextmanager
    def serve(backend: Backend, **settings: Any) -> Iterator[Client]:
        server = build_server(backend, settings=ServeSettings(name="tiny", port=0, **settings))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            until(lambda: server.started)
            yield Client(server.servers[0].sockets[0].getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
            backend.close()

    return serve


@pytest.fixture
def save_classifier() -> Callable[..., Path]:
    """``save_classifier(folder, num_labels=1, **config)``, for models with a flaw."""
    return save_orm


@pytest.fixture(scope="session")
def reward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of one label: a reward model. Do not write into it."""
    return save_orm(tmp_path_factory.mktemp("served") / "reward", num_labels=1)


@pytest.fixture(scope="session")
def three_labels_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of three labels. Do not write into it."""
    names = {0: "bad", 1: "fair", 2: "good"}
    folder = tmp_path_factory.mktemp("served") / "three"
    return save_orm(folder, num_labels=3, id2label=names)
