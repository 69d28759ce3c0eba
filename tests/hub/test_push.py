"""``trl-grpo-ext push``, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub.programs import TOKEN, push
from hub.server import Fault, serving

from trl_grpo_ext.errors import HubError
from trl_grpo_ext.hub.push import push_dataset, push_folder
from trl_grpo_ext.hub.record import Upload, read_record, write_record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run_dir = tmp_path / "my-run"
    (run_dir / "checkpoint-2").mkdir(parents=True)
    (run_dir / "config.json").write_text("{}")
    (run_dir / "checkpoint-2" / "model.safetensors").write_bytes(b"weights")
    return run_dir


def test_push_uploads_what_the_record_says_and_keeps_what_fails(folder: Path) -> None:
    checkpoint = Upload("out", folder="checkpoint-2", path_in_repo="last-checkpoint")
    write_record(
        folder, [checkpoint, Upload("me/other", folder=".", ignore=("checkpoint-*", "_*"))]
    )
    with serving(Fault("/models/me/other/commit", status=403)) as hub:
        failed = push(hub.url, folder)
        assert failed.returncode == 1
        assert (
            "the run's folder (to the model me/other): the Hub answered HTTP 403" in failed.stderr
        )
        assert [each.repo_id for each in read_record(folder) or []] == ["me/other"]
        hub.faults.clear()
        again = push(hub.url, folder)
        assert (again.returncode, again.stdout) == (0, ". -> model me/other\n")
        assert hub.files == {
            "models/me/out": {"last-checkpoint/model.safetensors": b"weights"},
            "models/me/other": {"config.json": b"{}"},
        }
        assert hub.private == {"models/me/out": True, "models/me/other": True}
        last = push(hub.url, folder)
        assert last.returncode == 0
        assert last.stdout.startswith("Nothing is missing on the Hub.")
        assert TOKEN not in "".join(p.stdout + p.stderr for p in (failed, again, last))


def test_push_without_a_record_uploads_the_folder_publicly_only_when_asked(folder: Path) -> None:
    with serving() as hub:
        done = push(hub.url, folder, "--public", "--repo-id", "you/named")
    assert done.returncode == 0
    assert hub.files == {"models/you/named": {"config.json": b"{}"}}
    assert hub.private == {"models/you/named": False}
    assert read_record(folder) is None


def test_push_refuses_what_cannot_work_in_a_sentence(folder: Path) -> None:
    for variables, path, message in (
        ({"HF_TOKEN": ""}, folder, "error: there is no token. Run `hf auth login`"),
        ({"HF_HUB_OFFLINE": "1"}, folder, "error: HF_HUB_OFFLINE is set"),
        ({}, folder / "nowhere", "nowhere is not a folder"),
    ):
        done = push("http://127.0.0.1:9", path, **variables)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_push_dataset_never_raises_because_of_the_hub(tmp_path: Path) -> None:
    told = push_dataset(tmp_path, repo_id="me/traces")  # HF_HUB_OFFLINE is set in tests
    assert told.startswith("HF_HUB_OFFLINE is set")
    assert told.endswith(f"trl-grpo-ext push {tmp_path}")
    assert read_record(tmp_path) == [
        Upload("me/traces", folder=".", repo_type="dataset", ignore=("_*", "checkpoint-*"))
    ]
    assert "configs:" in (tmp_path / "README.md").read_text()


def test_push_folder_refuses_offline(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push_folder(tmp_path)
