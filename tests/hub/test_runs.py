"""Runs that push, in processes of their own that know the loopback Hub only."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hub.programs import TOKEN, push, train
from hub.server import Fault, Hub, serving

from trl_grpo_ext.hub.record import read_record

GIVEN_TOKEN = "hf_givenAsAnOptionOfTheRun0123456789"


def same_as_on_disk(hub: Hub, repo: str, folder: Path, *, below: str = "") -> list[str]:
    """The paths below a folder of a repository, each equal to the file it came from."""
    found = {name: data for name, data in hub.files[repo].items() if name.startswith(below)}
    for name, data in found.items():
        assert (folder / name).read_bytes() == data, name
    return sorted(found)


def test_run_pushes_model_checkpoints_card_plots_and_completions_in_private(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {"push_completions": True, "log_completions": True, "hub_token": GIVEN_TOKEN}
    options |= {"beta": 0.1, "reference": "streamed", "reference_on_disk": True}
    with serving() as hub:
        run = train(hub.url, tiny_model_dir, out, hub_strategy="all_checkpoints", **options)
    assert run.returncode == 0, run.stderr
    assert re.search(r"PUSHED a{40}", run.stdout)
    assert hub.private == {"models/me/out": True, "datasets/me/out-completions": True}
    assert "push_to_hub: out, private if it is new." in run.stderr
    paths = same_as_on_disk(hub, "models/me/out", out)
    assert {"README.md", "model.safetensors", "config.json", "plots/kl.png"} <= set(paths)
    assert {"checkpoint-1/model.safetensors", "checkpoint-2/model.safetensors"} <= set(paths)
    assert list((out / "reference").glob("*/initial-*"))  # which stays here
    assert not any(path.startswith(("_", "reference/")) for path in paths)
    same_as_on_disk(hub, "datasets/me/out-completions", out / "_completions")
    rows = pq.read_table(out / "_completions" / "data" / "train.parquet")
    assert rows.column_names == ["step", "prompt", "completion", "vowels", "advantage"]
    assert rows.num_rows == 16  # 2 steps of 8 completions
    card = hub.files["models/me/out"]["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["datasets"] == ["some/sums"]
    assert "a fine-tuned version of `tiny-llama`" in card
    assert read_record(out) == []
    # The token that was given, not that of the login; and it is in nothing but the headers.
    assert hub.tokens == {GIVEN_TOKEN}
    arguments = torch.load(out / "training_args.bin", weights_only=False)
    assert arguments.hub_token is None
    sent = [asked.body for asked in hub.asked]
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    for text in (*sent, *written, run.stdout.encode(), run.stderr.encode()):
        assert GIVEN_TOKEN.encode() not in text.replace(TOKEN.encode(), b"")
        assert TOKEN.encode() not in text


def test_run_trains_to_its_end_without_a_hub_and_push_uploads_it_later(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused = "http://127.0.0.1:9"
    run = train(refused, tiny_model_dir, out, hub_wait_s=1, hub_strategy="checkpoint")
    assert run.returncode == 0, run.stderr
    assert "PUSHED None" in run.stdout
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("Not on the Hub: ")
    assert "the run's folder" in last
    assert last.endswith(f"To upload it: trl-grpo-ext push {out}")
    assert TOKEN not in run.stdout + run.stderr
    with serving() as hub:
        pushed = push(hub.url, out)
        assert pushed.returncode == 0, pushed.stderr
    below = "last-checkpoint/"
    found = {name for name in hub.files["models/me/out"] if name.startswith(below)}
    assert f"{below}optimizer.pt" in found
    checkpoint = hub.files["models/me/out"][f"{below}model.safetensors"]
    assert checkpoint == (out / "checkpoint-2" / "model.safetensors").read_bytes()
    assert hub.files["models/me/out"]["README.md"] == (out / "README.md").read_bytes()
    assert read_record(out) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [Fault("", "hang"), Fault("PUT /lfs", "hang"), Fault("", status=500)],
    ids=["hangs", "hangs-in-an-upload", "500"],
)  # fmt: skip
def test_run_ends_soon_whatever_the_hub_does(
    tiny_model_dir: Path, tmp_path: Path, fault: Fault
) -> None:
    out = tmp_path / "out"
    with serving(fault) as hub:
        run = train(hub.url, tiny_model_dir, out, limit_s=120, hub_wait_s=2)
    assert run.returncode == 0, run.stderr
    assert "TRAINED" in run.stdout
    assert "Not on the Hub: " in run.stderr
    assert read_record(out)
    assert (out / "model.safetensors").is_file()


@pytest.mark.slow
def test_run_that_was_killed_leaves_the_record_for_push(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with serving(Fault("", "hang")) as hub:
        run = train(hub.url, tiny_model_dir, out, ends="killed", hub_strategy="all_checkpoints")
        assert run.returncode == 9
        hub.faults.clear()
        assert push(hub.url, out).returncode == 0
    assert "checkpoint-2/model.safetensors" in hub.files["models/me/out"]


@pytest.mark.slow
def test_run_waits_at_its_end_for_what_is_under_way(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving(Fault("repos/create", status=500, times=2)) as hub:
        run = train(hub.url, tiny_model_dir, out, ends="nothing", hub_strategy="checkpoint")
    assert run.returncode == 0, run.stderr
    assert "Waiting for the Hub" in run.stderr
    assert "last-checkpoint/model.safetensors" in hub.files["models/me/out"]
    assert read_record(out) == []


@pytest.mark.slow
def test_run_is_offline_when_told_and_says_so(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving() as hub:
        run = train(hub.url, tiny_model_dir, out, variables={"HF_HUB_OFFLINE": "1"})
    assert run.returncode == 0, run.stderr
    assert "HF_HUB_OFFLINE is set: nothing is uploaded in this run." in run.stderr
    assert hub.asked == []
    assert read_record(out)


@pytest.mark.slow
def test_run_without_extensions_is_plain_trl(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with serving() as hub:
        run = train(hub.url, tiny_model_dir, out, extensions=False)
    assert run.returncode == 0, run.stderr
    assert hub.private == {"models/me/out": False}  # TRL leaves it to the Hub
    assert "## Limitations" not in (out / "README.md").read_text()
    assert read_record(out) is None
    down = train("http://127.0.0.1:9", tiny_model_dir, tmp_path / "down", extensions=False)
    assert down.returncode != 0
    assert "TRAINED" not in down.stdout
