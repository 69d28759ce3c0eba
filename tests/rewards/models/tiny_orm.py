"""Reward models small enough to build in a second, and their scores without any of our code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import build_tiny_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)


def save_orm(
    folder: Path,
    *,
    num_labels: int = 1,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **config: Any,
) -> Path:
    """Write a random float32 classifier of 2 layers and its tokenizer."""
    tokenizer = tokenizer or build_tiny_tokenizer()
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


def logits_at(folder: Path, ids: Sequence[int], place: int = -1) -> list[float]:
    """The head at one token of a text: no batch, no padding, no pooling of transformers."""
    model = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([list(ids)])).last_hidden_state
        logits: list[float] = model.score(hidden[0, place]).tolist()
    return logits


def without_architecture(folder: Path, copy: Path) -> Path:
    """Copy a model whose configuration then does not say of what kind it is."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    del config["architectures"]
    (copy / "config.json").write_text(json.dumps(config))
    return copy
