"""What candidates come from: the row of the task, the weights, and all that shapes a draw."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import ModelConfig

from trl_grpo_ext.rejection.options import RejectionArguments
from trl_grpo_ext.rewards.registry import RewardEntry, RewardSpec

_WEIGHTS = (".safetensors", ".bin")
_TAIL_BYTES = 2**20


def prompt_id(row: Mapping[str, Any]) -> str:
    """Return what stands for a row of the task, whatever its place: 16 hexadecimal digits.

    Example:
        >>> prompt_id({"prompt": "2 + 3 =", "answer": "5"})
        'e8db9b16aea48655'
    """
    return _digest(row)


def prompt_ids(rows: Dataset) -> list[str]:
    """Return :func:`prompt_id` of each row."""
    return [prompt_id(row) for row in rows]


def made_with(
    options: RejectionArguments,
    *,
    model: ModelConfig,
    weights: str,
    rewards: Iterable[RewardEntry],
    sampler: str,
) -> dict[str, Any]:
    """Return all that decides what is sampled and how it is scored, but for the prompts.

    The weights of the rewards and everything that chooses among candidates are not in it, so that
    these can change without sampling again. Of a reward's arguments only a digest is: they may
    hold a key.

    Args:
        options: Of the run.
        model: Revision and dtype.
        weights: Where ``from_pretrained`` finds it: a folder, or a name on the Hub.
        rewards: As in the YAML.
        sampler: What samples, ``group_sample`` or ``vllm``.
    """
    return {
        "sampler": sampler,
        "weights": weights_digest(weights) or weights,
        "model_revision": model.model_revision,
        "dtype": model.dtype,
        "seed": options.seed,
        "num_generations": options.num_generations,
        **options.sampling(),
        "chat_template_kwargs": options.chat_template_kwargs,
        "rewards": [_reward(entry) for entry in rewards],
    }


def weights_digest(model: str) -> str | None:
    """Return what changes when a model in a folder is trained on; ``None`` if it is no folder.

    It covers names, sizes and the last megabyte of the files that hold weights, so that a large
    model is read in no time.
    """
    if not Path(model).is_dir():
        return None
    files = sorted(path for path in Path(model).iterdir() if path.suffix in _WEIGHTS)
    return _digest([(path.name, path.stat().st_size, _tail(path)) for path in files])


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, _TAIL_BYTES), os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest()


def _reward(entry: RewardEntry) -> str:
    if isinstance(entry, str):
        return entry
    name, arguments = (
        (entry.name, entry.arguments)
        if isinstance(entry, RewardSpec)
        else (entry["name"], entry.get("arguments"))
    )
    return f"{name} {_digest(arguments)}" if arguments else str(name)


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
