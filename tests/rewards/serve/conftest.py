"""A real server on this machine, and small models to serve."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rewards.serve.client import Client, Serving, until
from tiny import build_tiny_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

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


def _save_classifier(folder: Path, *, num_labels: int, **config: Any) -> Path:
    """Write a random float32 classifier of 2 layers and its tokenizer."""
    tokenizer = build_tiny_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # wide, so that the scores of two texts differ
        "pad_token_id": tokenizer.pad_token_id,
        "num_labels": num_labels,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(LlamaConfig(**settings | config)).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def save_classifier() -> Callable[..., Path]:
    """``save_classifier(folder, num_labels=1, **config)``, for models with a flaw."""
    return _save_classifier


@pytest.fixture(scope="session")
def reward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of one label: a reward model. Do not write into it."""
    return _save_classifier(tmp_path_factory.mktemp("served") / "reward", num_labels=1)


@pytest.fixture(scope="session")
def three_labels_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of three labels. Do not write into it."""
    names = {0: "bad", 1: "fair", 2: "good"}
    folder = tmp_path_factory.mktemp("served") / "three"
    return _save_classifier(folder, num_labels=3, id2label=names)
