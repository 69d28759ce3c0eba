"""Fine-tuning and rejection sampling upload at their end, or say what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub.programs import TOKEN, environment, push, run_program
from hub.server import serving
from huggingface_hub import ModelCard

ROOT = Path(__file__).parents[2]
GIVEN_TOKEN = "hf_givenAsAnOptionOfTheRun0123456789"
SFT: dict[str, Any] = {
    "solver": "sums",
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
}
REJECTION: dict[str, Any] = {
    "num_generations": 8,
    "max_completion_length": 6,
    "keep_truncated": True,
    "keep_special_tokens": True,
    "correct_threshold": -100.0,
}


def recipe(url: str, name: str, tmp_path: Path, model: Path, **options: Any) -> Any:
    rows = [{"prompt": f"{a} + 1 =", "answer": str(a + 1)} for a in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    keys = {
        "model_name_or_path": str(model),
        "dataset": str(tmp_path / "rows.jsonl"),
        "rewards": ["last_number"],
        "output_dir": str(tmp_path / "out"),
        "push_to_hub": True,
        **options,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys))
    words = [sys.executable, str(ROOT / "recipes" / f"{name}.py")]
    words += ["--config", str(tmp_path / "run.yaml")]
    return run_program(words, environment(url, tmp_path / "home"), limit_s=240)


def test_sft_uploads_model_and_card_in_private(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving() as hub:
        options = {**SFT, "hub_token": GIVEN_TOKEN, "num_eval_prompts": 1, "hub_revision": "next"}
        run = recipe(hub.url, "sft", tmp_path, tiny_model_dir, **options)
    assert run.returncode == 0, run.stderr
    assert hub.private == {"models/me/out": True}
    assert [asked.path for asked in hub.asked if "/commit/" in asked.path] == [
        "/api/models/me/out/commit/next"
    ]
    files = hub.files["models/me/out"]
    for name in ("model.safetensors", "README.md", "report.md", "chat_template.jinja"):
        assert files[name] == (out / name).read_bytes()
    assert hub.tokens == {GIVEN_TOKEN}  # not that of the environment
    card = ModelCard(files["README.md"].decode())
    for part in (
        "to imitate traces of `rows.jsonl`",
        "## Command",
        "| `max_steps` | 1 |",
        'model="out"',
    ):
        assert part in card.text
    (accuracy,) = card.data.eval_results
    assert accuracy.metric_type == "accuracy"
    assert accuracy.metric_value == json.loads(files["summary.json"])["accuracy_after"]
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    for text in (*written, run.stdout.encode(), run.stderr.encode()):
        assert TOKEN.encode() not in text
        assert GIVEN_TOKEN.encode() not in text


@pytest.mark.slow
def test_sft_ends_well_without_a_hub_and_push_uploads_it_later(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = recipe("http://127.0.0.1:9", "sft", tmp_path, tiny_model_dir, **SFT)
    assert run.returncode == 0, run.stderr
    assert f"trl-grpo-ext push {out}" in run.stdout
    with serving() as hub:
        assert push(hub.url, out).returncode == 0
    assert hub.files["models/me/out"]["config.json"] == (out / "config.json").read_bytes()


@pytest.mark.slow
def test_rejection_sampling_uploads_its_dataset(tiny_model_dir: Path, tmp_path: Path) -> None:
    given = {**REJECTION, "hub_dataset_id": "me/traces", "hub_private_repo": False}
    with serving() as hub:
        run = recipe(hub.url, "rejection_sampling", tmp_path, tiny_model_dir, **given)
    assert run.returncode == 0, run.stderr
    assert hub.private == {"datasets/me/traces": False}
    path = tmp_path / "out" / "dataset" / "train.parquet"
    assert hub.files["datasets/me/traces"]["train.parquet"] == path.read_bytes()
    assert b"configs:" in hub.files["datasets/me/traces"]["README.md"]


def test_a_name_that_no_repository_can_have_is_refused_first(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    run = recipe("http://127.0.0.1:9", "sft", tmp_path, tiny_model_dir, **SFT, hub_model_id="a/b/c")
    assert run.returncode == 1
    assert "'a/b/c' cannot be the name of a repository" in run.stderr
    assert not (tmp_path / "out").exists()
