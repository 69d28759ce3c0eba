"""A checkpoint is whole, or it is named and passed over; nothing that was whole is lost."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from trl_grpo_ext.checkpointing import (
    MANIFEST,
    UNFINISHED,
    damage,
    finish_checkpoint,
    last_good_checkpoint,
    remove_unfinished,
    rotate,
)
from trl_grpo_ext.errors import CheckpointError


def write(run: Path, step: int, *, text: str = "weights") -> Path:
    """Write the files of a checkpoint aside, as the trainer does, and return their folder."""
    folder = run / UNFINISHED / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.bin").write_text(text)
    (folder / "shards" / "0.bin").write_text(f"{text} 0")
    return folder


def save(run: Path, step: int, **options: str) -> Path:
    final = run / f"checkpoint-{step}"
    finish_checkpoint(write(run, step, **options), final)
    return final


def test_finished_checkpoint_has_the_hash_of_each_file(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 3)
    listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert listed == {
        "model.bin": {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()},
        "shards/0.bin": {"bytes": 9, "sha256": hashlib.sha256(b"weights 0").hexdigest()},
    }
    assert damage(checkpoint) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3"]


def test_a_folder_that_is_not_finished_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 5)
    assert list(tmp_path.glob("checkpoint-*")) == []
    assert last_good_checkpoint(tmp_path) is None
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5, text="first")
    checkpoint = save(tmp_path, 5, text="second")
    assert (checkpoint / "model.bin").read_text() == "second"
    assert damage(checkpoint) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5"]


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (lambda c: (c / "model.bin").unlink(), "model.bin is missing"),
        (lambda c: (c / "model.bin").write_text("weight"), "model.bin has 6 bytes instead of 7"),
        (lambda c: (c / "shards" / "0.bin").write_text("weights 1"), "shards/0.bin was changed"),
        (lambda c: (c / MANIFEST).unlink(), "it has no manifest.json, so plain TRL wrote it"),
        (lambda c: (c / MANIFEST).write_text("{"), "its manifest.json cannot be read"),
        (lambda c: (c / MANIFEST).write_text("[]"), "its manifest.json cannot be read"),
    ],
)
def test_damage_says_what_is_wrong(tmp_path: Path, break_it: object, problem: str) -> None:
    checkpoint = save(tmp_path, 3)
    break_it(checkpoint)
    assert damage(checkpoint).startswith(problem)


def test_files_that_were_added_do_no_damage(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 3)
    (checkpoint / "notes.txt").write_text("by a callback of the user's")
    assert damage(checkpoint) is None


def test_last_good_passes_over_a_damaged_checkpoint_and_puts_it_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 10, 9):
        save(tmp_path, step)
    (tmp_path / "checkpoint-10" / "model.bin").write_text("wei")
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert "checkpoint-10 is damaged: model.bin has 3 bytes instead of 7" in caplog.text
    assert (tmp_path / "damaged-checkpoint-10" / "model.bin").read_text() == "wei"
    assert not (tmp_path / "checkpoint-10").exists()
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-9"


def test_no_whole_checkpoint_is_an_error_that_names_each(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-2: model.bin is missing; checkpoint-1"):
        last_good_checkpoint(tmp_path)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_killed_just_before_the_name_was_given(tmp_path: Path) -> None:
    save(tmp_path, 4)
    save(tmp_path, 6)
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / "checkpoint-6").rename(tmp_path / UNFINISHED / "checkpoint-6")
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_killed_while_a_step_was_saved_again(tmp_path: Path) -> None:
    """The old folder is aside already, and the one to replace it is whole, or is not."""
    old = save(tmp_path, 6, text="old")
    new = write(tmp_path, 6, text="new")
    old.rename(new.parent / "replaced-checkpoint-6")
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    assert (tmp_path / "checkpoint-6" / "model.bin").read_text() == "old"
    remove_unfinished(tmp_path)
    assert (tmp_path / "checkpoint-6").is_dir()
    assert not (tmp_path / UNFINISHED).exists()


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6]),
        (2, None, [4, 6]),
        (1, None, [6]),
        (1, "checkpoint-2", [2, 6]),
        (2, "checkpoint-2", [2, 6]),
        (2, "checkpoint-6", [4, 6]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(
    tmp_path: Path, limit: int | None, best: str | None, left: list[int]
) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    rotate(tmp_path, limit=limit, best=best and str(tmp_path / best))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in left]


def test_killed_in_a_rotation_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4):
        save(tmp_path, step)

    def killed(folder: Path, **_: object) -> None:
        (folder / "model.bin").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            rotate(tmp_path, limit=1, best=None)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
