"""What of a run is not on the Hub yet: kept in its folder, so that it can be uploaded later."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # not in its __all__

RECORD = "_hub.json"  # uploads leave out what starts with an underscore
IGNORED = ("_*", "checkpoint-*")  # of a run's folder, as in transformers
REFERENCES = "reference/*"  # of a model's run: copies of the initial weights, for a resume

RepoType = Literal["model", "dataset"]


@dataclass(frozen=True)
class Upload:
    """A folder that is to be on the Hub.

    Attributes:
        repo_id: ``owner/name``, or the name alone for the owner of the token.
        folder: Relative to the run's; ``"."`` is that itself. ``None`` only creates the repository.
        path_in_repo: Folder on the Hub.
        private: Whether the repository is created so. One that is there stays as it is.
        revision: Branch; the main one if ``None``.
        ignore: Patterns of files that stay here.

    Example:
        >>> old, new = (Upload("me/model", folder=".", message=text) for text in "12")
        >>> old.place == new.place
        True
    """

    repo_id: str
    folder: str | None
    repo_type: RepoType = "model"
    path_in_repo: str = ""
    private: bool = True
    message: str = "Upload"
    revision: str | None = None
    ignore: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[str, ...]:
        """Where it goes: a later upload to the same place replaces it."""
        return (*self.repo, self.revision or "", self.path_in_repo)

    @property
    def repo(self) -> tuple[str, str]:
        """The repository, by type and name, without the owner."""
        return self.repo_type, self.repo_id.rpartition("/")[2]

    def job(self, run_dir: Path) -> dict[str, Any]:
        """Return what :func:`~trl_grpo_ext.hub.attempt.attempt` takes."""
        folder = None if self.folder is None else str(run_dir / self.folder)
        return asdict(replace(self, folder=folder))

    def __str__(self) -> str:
        if self.folder is None:
            return f"the {self.repo_type} repository {self.repo_id}"
        what = "the run's folder" if self.folder == "." else self.folder
        return f"{what} (to the {self.repo_type} {self.repo_id})"


def is_repo_id(name: str) -> bool:
    """Return whether a repository can have this name, with or without an owner.

    Example:
        >>> is_repo_id("me/model"), is_repo_id("model"), is_repo_id("my model"), is_repo_id("a/b/c")
        (True, True, False, False)
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def read_record(run_dir: Path) -> list[Upload] | None:
    """Return what is not uploaded; ``None`` if there is no record, or none that can be read."""
    try:
        missing = json.loads((run_dir / RECORD).read_text(encoding="utf-8"))["missing"]
        return [_upload(entry) for entry in missing]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(run_dir: Path, missing: Sequence[Upload]) -> None:
    """Note what is not uploaded."""
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"missing": [asdict(upload) for upload in missing]}, indent=1)
    temporary = run_dir / f"{RECORD}.{os.getpid()}"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(run_dir / RECORD)


def _upload(entry: dict[str, Any]) -> Upload:
    known = {f.name: entry[f.name] for f in fields(Upload)}
    return Upload(**known | {"ignore": tuple(known["ignore"])})
