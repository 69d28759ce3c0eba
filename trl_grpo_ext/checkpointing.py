"""Checkpoints that are whole, or are not there.

A checkpoint is written into a folder beside the others (``_unfinished``), hashed, flushed to the
disk and renamed; the manifest of hashes is written last. So a kill at any moment, or a full disk,
leaves no folder that looks like a checkpoint and is none. One that was damaged later does not match
its manifest: it is named, put aside, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from trl_grpo_ext.errors import CheckpointError

logger = logging.get_logger(__name__)

LAST_GOOD = "last-good"  # for `resume_from_checkpoint`
MANIFEST = "manifest.json"
UNFINISHED = "_unfinished"  # pushes to the Hub leave out what starts with an underscore

_NAME = re.compile(r"checkpoint-(\d+)")
_MAX_READERS = 8  # threads that hash


def finish_checkpoint(folder: Path, final: Path) -> None:
    """Hash what is in ``folder``, flush it to the disk and rename it to ``final``.

    A folder that is there under that name already is replaced.
    """
    _write_manifest(folder)
    replaced = folder.parent / f"replaced-{final.name}"
    if final.exists():
        final.rename(replaced)
    folder.rename(final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    _remove_if_empty(folder.parent)


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint; ``None`` if it matches its manifest.

    Every file is read, which takes about a second a gigabyte.
    """
    if not checkpoint.is_dir():
        return "it is not a folder"
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {str(name): int(entry["bytes"]) for name, entry in listed.items()}
        hashes = {str(name): str(entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so plain TRL wrote it, or it was never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    found = _hashes(checkpoint, list(hashes))
    return next((f"{name} was changed" for name in hashes if found[name] != hashes[name]), None)


def checkpoint_to_resume(
    asked: str | bool | None,  # noqa: FBT001 - what `train` was given
    output_dir: Path,
) -> str | None:
    """Return the folder to resume from; ``None`` to start anew.

    Args:
        asked: A folder, or ``"last-good"`` or true for the newest whole checkpoint.
        output_dir: Of the run. What a run that was killed had begun to write there is removed.

    Raises:
        CheckpointError: what was asked for is not there, or damaged.
    """
    if not asked:
        remove_unfinished(output_dir)
        return None
    if asked is True or asked == LAST_GOOD:
        found = last_good_checkpoint(output_dir)
        remove_unfinished(output_dir)
        if found is None and asked is True:
            raise CheckpointError(
                f"there is no checkpoint in {output_dir} to resume from. Name its folder, or leave "
                "`resume_from_checkpoint` out to start anew."
            )
        logger.info(f"resuming from {found}" if found else "no checkpoint yet: starting anew")
        return None if found is None else str(found)
    if not Path(asked).is_dir():
        raise CheckpointError(
            f"`resume_from_checkpoint` is {asked!r}, which is not a folder. Name a checkpoint-N "
            f"folder of the run, or {LAST_GOOD!r} for its newest whole one."
        )
    if (Path(asked) / MANIFEST).exists() and (problem := damage(Path(asked))) is not None:
        raise CheckpointError(
            f"{asked} is damaged: {problem}. Resume from the one before it: "
            f"`resume_from_checkpoint: {LAST_GOOD}` finds it."
        )
    return asked


def last_good_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest whole checkpoint; ``None`` if the folder has no checkpoint at all.

    One that a kill left finished but not renamed is renamed; damaged ones that are newer than the
    one returned are named in a warning and put aside as ``damaged-checkpoint-N``, so that no
    rotation counts them.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    _recover(output_dir)
    problems: dict[Path, str] = {}
    for checkpoint in _checkpoints(output_dir):
        problem = damage(checkpoint)
        if problem is None:
            _put_aside(problems)
            return checkpoint
        problems[checkpoint] = problem
    if not problems:
        return None
    listed = "; ".join(f"{path.name}: {problem}" for path, problem in problems.items())
    raise CheckpointError(
        f"no checkpoint in {output_dir} is whole ({listed}). Put one back from a "
        "copy, such as that on the Hub; or start anew with another `output_dir`."
    )


def newest_checkpoint(output_dir: Path) -> Path | None:
    """Return the checkpoint of the most steps, whole or not; ``None`` if there is none."""
    return next(iter(_checkpoints(output_dir)), None)


def rotate(output_dir: Path, *, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond a limit, as transformers does.

    Each loses its name first: one that is half deleted when the run is killed must not look like
    one that can be resumed, or count as one in the next rotation.

    Args:
        output_dir: Of the run.
        limit: How many stay; ``None`` or 0 for all.
        best: One that always stays, as does the newest.
    """
    checkpoints = [Path(path) for path in sort_checkpoints(str(output_dir), use_mtime=True)]
    kept = {*checkpoints[-1:], *([Path(best)] if best else [])}
    excess = len(checkpoints) - max(limit, len(kept)) if limit else 0
    oldest = [path for path in checkpoints if path not in kept][: max(excess, 0)]
    for path in oldest:
        nameless = output_dir / UNFINISHED / f"deleted-{path.name}"
        nameless.parent.mkdir(exist_ok=True)
        if nameless.exists():  # of a run that was killed here before
            shutil.rmtree(nameless)
        path.rename(nameless)
        shutil.rmtree(nameless, ignore_errors=True)
        _remove_if_empty(nameless.parent)


def remove_unfinished(output_dir: Path) -> None:
    """Remove what a run that was killed had begun to write."""
    _recover(output_dir)
    shutil.rmtree(output_dir / UNFINISHED, ignore_errors=True)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # something else is in it
        folder.rmdir()


def _recover(output_dir: Path) -> None:
    """Rename checkpoints that were whole when the run was killed, just before they got a name."""
    for prefix in ("", "replaced-"):
        for folder in sorted((output_dir / UNFINISHED).glob(f"{prefix}checkpoint-*")):
            final = output_dir / folder.name.removeprefix("replaced-")
            if not final.exists() and damage(folder) is None:
                folder.rename(final)
                _flush(output_dir)


def _checkpoints(output_dir: Path) -> list[Path]:
    """The newest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*")]
    steps = [(int(match[1]), path) for match, path in found if match and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def _put_aside(problems: dict[Path, str]) -> None:
    for path, problem in problems.items():
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning(
            f"{path.name} is damaged: {problem}. The checkpoint before it is used; the damaged one "
            f"is kept as {aside.name}, and can be deleted."
        )


def _write_manifest(folder: Path) -> None:
    names = [path.relative_to(folder).as_posix() for path in _files(folder)]
    names = [name for name in names if name != MANIFEST]
    hashes = _hashes(folder, names)
    for path in folder.rglob("*"):
        _flush(path)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": hashes[name]} for name in names
    }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    _flush(manifest)
    _flush(folder)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(_MAX_READERS) as pool:
        return dict(zip(names, pool.map(_sha256, [folder / name for name in names]), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the disk hold what was written, so that a power cut does not take it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
