"""What tests that train a tiny model share: settings of a short run on a CPU, and its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def settings(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """Options of a run of three steps, as keyword arguments of a configuration."""
    return {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_steps": 3,
        "beta": 0.04,
        "seed": 7,
    } | changes


def train(trainer: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train, and return the log and the weights."""
    trainer.train()
    return trainer.state.log_history, trainer.model.state_dict()


def series(history: list[dict[str, Any]], key: str) -> list[float]:
    """The values of one metric, step after step."""
    return [entry[key] for entry in history if key in entry]


def vowels(*, completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within a group of random text."""
    return [float(sum(character in "aeiou13579" for character in text)) for text in completions]
