"""The completions of a run as a dataset."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml
from datasets import load_dataset

from trl_grpo_ext.hub.completions import write_completions

ATTACK = "<script>alert(1)</script>\n# not a title\n---\n"


def logged(run_dir: Path, step: int, **columns: list[object]) -> None:
    folder = run_dir / "completions"
    folder.mkdir(exist_ok=True)
    pd.DataFrame({"step": step, **columns}).to_parquet(folder / f"completions_{step:05d}.parquet")


def read(folder: Path, cache: Path) -> list[dict[str, object]]:
    """As the Hub's viewer does: by what the card says."""
    return list(load_dataset(str(folder), split="train", cache_dir=str(cache)))


def test_completions_have_one_schema_whatever_each_log_had(tmp_path: Path) -> None:
    logged(tmp_path, 1, prompt=["a"], completion=[ATTACK], math=[1], advantage=[0.5])
    logged(tmp_path, 2, prompt=["b"], completion=["y"], math=[None], advantage=[-1.0], seen=["s"])
    folder = write_completions(tmp_path, model="me/out")
    assert folder is not None
    assert read(folder, tmp_path / "cache") == [
        {"step": 1, "prompt": "a", "completion": ATTACK, "math": 1.0, "seen": None}
        | {"advantage": 0.5},
        {"step": 2, "prompt": "b", "completion": "y", "math": None, "seen": "s"}
        | {"advantage": -1.0},
    ]
    card = (folder / "README.md").read_text()
    assert "script" not in card
    assert "2 completions" in card
    (config,) = yaml.safe_load(card.split("---")[1])["configs"]
    assert config["data_files"] == [{"split": "train", "path": "data/train.parquet"}]


def test_completions_of_conversations_stay_messages(tmp_path: Path) -> None:
    question = [{"role": "user", "content": "2 + 2?"}]
    answer = [{"role": "assistant", "content": "4"}]
    logged(tmp_path, 1, prompt=[question], completion=[answer], advantage=[0.0])
    folder = write_completions(tmp_path, model="out")
    assert folder is not None
    (row,) = read(folder, tmp_path / "cache")
    assert row["prompt"] == question
    assert row["completion"] == answer


def test_completions_are_none_where_none_were_logged(tmp_path: Path) -> None:
    assert write_completions(tmp_path, model="out") is None


@pytest.mark.parametrize("mixed", ["text", [{"type": "image"}]])
def test_completions_of_mixed_shapes_become_text(tmp_path: Path, mixed: object) -> None:
    question = [{"role": "user", "content": "2 + 2?"}]
    logged(tmp_path, 1, prompt=[question], completion=["x"], advantage=[0.0])
    logged(tmp_path, 2, prompt=[mixed], completion=["y"], advantage=[0.0])
    folder = write_completions(tmp_path, model="out")
    assert folder is not None
    first, second = read(folder, tmp_path / "cache")
    assert first["prompt"] == "user: 2 + 2?"
    assert second["prompt"] == ("text" if mixed == "text" else '[{"type": "image"}]')
