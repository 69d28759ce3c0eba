"""Uploads in the background, against a Hub on loopback that fails in every way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.programs import TOKEN, environment
from hub.server import Fault, Hub, serving, wait_for
from huggingface_hub import constants

from trl_grpo_ext.hub.record import Upload, read_record
from trl_grpo_ext.hub.upload import BackgroundUploads

WEIGHTS = bytes(range(256)) * 40
README = b"---\nlicense: mit\n---\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run_dir = tmp_path / "out"
    run_dir.mkdir()
    (run_dir / "model.safetensors").write_bytes(WEIGHTS)
    (run_dir / "README.md").write_bytes(README)
    (run_dir / "_secret.txt").write_text("stays here")
    return run_dir


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        for name, value in environment(hub.url, tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


def run_upload(message: str = "End", **changes: object) -> Upload:
    return Upload("out", folder=".", message=message, ignore=("_*",), **changes)


def closed(uploads: BackgroundUploads) -> BackgroundUploads:
    uploads.close()
    return uploads


def test_uploads_arrive_byte_for_byte_in_a_private_repository(folder: Path, hub: Hub) -> None:
    names: list[str] = []
    uploads = BackgroundUploads(folder, on_created=names.append)
    created = uploads.submit(Upload("out", folder=None))
    wait_for(created.done)
    future = uploads.submit(run_upload())
    assert uploads.wait()
    assert hub.files["models/me/out"] == {"model.safetensors": WEIGHTS, "README.md": README}
    assert hub.private == {"models/me/out": True}
    commit = future.result(timeout=0)
    assert commit is not None
    assert commit.commit_message == "End"
    assert set(names) == {"me/out"}
    assert hub.tokens == {TOKEN}
    assert read_record(folder) == []
    assert closed(uploads).missing == []


def test_uploads_are_public_only_when_asked(folder: Path, hub: Hub) -> None:
    uploads = BackgroundUploads(folder)
    uploads.submit(run_upload(private=False))
    assert uploads.wait()
    assert hub.private == {"models/me/out": False}
    uploads.close()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("repos/create", status=500, times=1),
        Fault("preupload", status=429, times=1),
        Fault("PUT /lfs", "drop", times=1),
        Fault("/commit/", status=503, times=1),
    ],
    ids=["500", "429", "dropped-upload", "503-commit"],
)
def test_uploads_are_tried_again(folder: Path, hub: Hub, fault: Fault) -> None:
    hub.faults = [fault]
    uploads = BackgroundUploads(folder)
    uploads.submit(run_upload())
    assert uploads.wait()
    assert fault.times == 0
    assert hub.files["models/me/out"]["model.safetensors"] == WEIGHTS
    uploads.close()


def test_uploads_that_the_hub_refuses_are_told_and_not_asked_again(
    folder: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults = [Fault("", status=401)]
    uploads = BackgroundUploads(folder, wait_s=60)
    began = time.monotonic()
    future = uploads.submit(run_upload())
    assert not uploads.wait()
    assert time.monotonic() - began < 30
    assert future.result(timeout=0) is None
    assert len(hub.sent("repos/create")) == 1
    assert uploads.missing == [run_upload()]
    told = uploads.not_uploaded()
    assert "HTTP 401" in told
    assert told.endswith(f"trl-grpo-ext push {folder}")
    hub.faults = []
    uploads.submit(Upload("out", folder=".", path_in_repo="again"))  # the token may be right now
    assert uploads.wait()
    uploads.close()


def test_uploads_to_a_hub_that_hangs_end_when_they_must(folder: Path, hub: Hub) -> None:
    hub.faults = [Fault("preupload", "hang")]
    uploads = BackgroundUploads(folder, wait_s=1.0)
    began = time.monotonic()
    uploads.submit(run_upload())
    uploads.waits_at_exit = True
    wait_for(lambda: hub.sent("preupload"))
    uploads.close()
    assert time.monotonic() - began < 20
    assert read_record(folder) == [run_upload()]
    process = uploads._process
    assert process is None or process.wait(10) != 0


def test_uploads_that_nobody_waits_for_end_at_once(folder: Path, hub: Hub) -> None:
    hub.faults = [Fault("", "hang")]
    uploads = BackgroundUploads(folder)
    uploads.submit(run_upload())
    began = time.monotonic()
    uploads.close()
    assert time.monotonic() - began < 2
    assert uploads.missing == [run_upload()]


def test_upload_to_the_same_place_replaces_the_earlier(folder: Path, hub: Hub) -> None:
    uploads = BackgroundUploads(folder, offline=True)
    create = uploads.submit(Upload("out", folder=None))
    first = uploads.submit(run_upload("first"))
    second = uploads.submit(run_upload("second"))
    uploads.submit(Upload("out", folder="checkpoint-2", path_in_repo="checkpoint-2"))
    assert create.result(timeout=0) is None
    assert first.result(timeout=0) is None
    assert not second.done()
    assert [each.message for each in uploads.missing] == ["second", "Upload"]
    assert not uploads.wait()
    assert hub.asked == []
    uploads.close()


def test_uploads_that_an_earlier_run_left_are_made(folder: Path, hub: Hub) -> None:
    before = BackgroundUploads(folder, offline=True)
    before.submit(run_upload("of the earlier run"))
    before.close()
    uploads = BackgroundUploads(folder)
    uploads.submit(Upload("out", folder=None, repo_type="dataset"))
    assert uploads.wait()
    assert [commit.message for commit in hub.commits] == ["of the earlier run"]
    uploads.close()


def test_uploads_of_a_folder_that_was_deleted_are_given_up(folder: Path, hub: Hub) -> None:
    uploads = BackgroundUploads(folder)
    future = uploads.submit(Upload("out", folder="checkpoint-1", path_in_repo="checkpoint-1"))
    assert uploads.wait()
    assert future.result(timeout=0) is None
    assert hub.commits == []
    uploads.close()


def test_held_uploads_read_nothing_and_a_withdrawn_one_is_made_again(
    folder: Path, hub: Hub
) -> None:
    hub.faults = [Fault("/commit/", "hang", times=1)]
    uploads = BackgroundUploads(folder)
    uploads.submit(run_upload("old"))
    wait_for(lambda: hub.sent("/commit/"))
    with uploads.held(withdraw=False) as free:
        assert not free
    with uploads.held(withdraw=True) as free:
        assert free
        (folder / "model.safetensors").write_bytes(b"new")
        uploads.submit(run_upload("new"))
    assert uploads.wait()
    assert [commit.message for commit in hub.commits] == ["new"]
    assert hub.files["models/me/out"]["model.safetensors"] == b"new"
    uploads.close()


def test_uploads_never_tell_the_token_or_a_signed_address(
    folder: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults = [Fault("PUT /lfs", status=403)]
    uploads = BackgroundUploads(folder, token="hf_anotherMadeUpToken987654321")
    uploads.submit(run_upload())
    assert not uploads.wait()
    uploads.close()
    said = caplog.text + uploads.not_uploaded() + (folder / "_hub.json").read_text()
    assert "HTTP 403" in said
    assert "hf_" not in said
    assert "signed-" not in said
    assert hub.tokens == {"hf_anotherMadeUpToken987654321"}
    assert not any(b"hf_another" in asked.body for asked in hub.asked)
