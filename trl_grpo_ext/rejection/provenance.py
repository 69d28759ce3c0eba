"""What candidates come from: the row of the task, the weights, and all that shapes a draw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import ModelConfig

from trl_grpo_ext.rejection.options import RejectionArguments
from trl_grpo_ext.rewards.registry import RewardEntry, RewardSpec

_WEIGHTS = (".safetensors", ".bin")
_BESIDE = (  # files that decide what is sampled, as weights do
    *("config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
_OF_TRAINING = "training_args.bin"


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
        "vllm_max_model_length": options.vllm_max_model_length if sampler == "vllm" else None,
        "chat_template_kwargs": options.chat_template_kwargs,
        "rewards": [_reward(entry) for entry in rewards],
    }


def weights_digest(model: str) -> str | None:
    """Return a hash of a model in a folder: weights, configuration, tokenizer and chat template.

    Reads all of it once, about a second a gigabyte. ``None`` if it is no folder.
    """
    if not Path(model).is_dir():
        return None
    files = sorted(path for path in Path(model).iterdir() if _decides(path))
    return _digest([(path.name, _file_digest(path)) for path in files])


def _decides(path: Path) -> bool:
    return path.name in _BESIDE or (path.suffix in _WEIGHTS and path.name != _OF_TRAINING)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
