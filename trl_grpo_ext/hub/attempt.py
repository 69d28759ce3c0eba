"""One upload to the Hub. As a script: in a process that can be ended, since a request may hang.

``huggingface_hub`` waits for ever where a server does not answer, in threads that Python joins when
it exits. So a run uploads in a process of its own. It reads ``{"job": ..., "token": ...}`` from
standard input and prints an :class:`Outcome` as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STALL_S = 60.0  # longest time that a request may go without a byte
_PARENT_CHECK_S = 1.0
_TRY_AGAIN = (408, 409, 412, 423, 425, 429)  # and every answer from 500 on


@dataclass(frozen=True)
class Outcome:
    """What became of an upload.

    Attributes:
        repo_id: With its owner, once the Hub told it.
        private: Whether the repository is; told when it is created.
        commit: Fields of ``huggingface_hub.CommitInfo``, of what was uploaded.
        problem: Why it was not uploaded, without a token or an address in it.
        again: Whether it may succeed later.
    """

    repo_id: str | None = None
    private: bool | None = None
    commit: dict[str, str] | None = None
    problem: str | None = None
    again: bool = True


def attempt(job: dict[str, Any], *, token: str | None) -> Outcome:
    """Create the repository if it is not there, and upload a folder to it.

    Args:
        job: ``repo_id``, ``repo_type``, ``private``, and ``folder``; ``None`` only creates. With a
            folder also ``path_in_repo``, ``message``, ``revision`` and ``ignore``.
        token: As of ``HfApi``; ``None`` for the one of the login.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = job["folder"]
    if folder is not None and not Path(folder).is_dir():
        return Outcome(problem="the folder is not there any more", again=False)
    try:
        return _upload(job, token)
    except HFValidationError as error:
        return Outcome(problem=_first_line(error), again=False)
    except (HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        return _told(error)
    except Exception as error:  # noqa: BLE001 - of httpx, which huggingface_hub lets through
        return _told(error)


def _upload(job: dict[str, Any], token: str | None) -> Outcome:
    from huggingface_hub import HfApi

    api = HfApi()
    kind: Any = job["repo_type"]
    repo = {"repo_id": job["repo_id"], "repo_type": kind, "token": token}
    repo["repo_id"] = api.create_repo(**repo, private=job["private"], exist_ok=True).repo_id
    if job["folder"] is None:
        return Outcome(repo_id=repo["repo_id"], private=bool(api.repo_info(**repo).private))
    commit = api.upload_folder(
        **repo,
        folder_path=job["folder"],
        path_in_repo=job["path_in_repo"],
        commit_message=job["message"],
        revision=job["revision"],
        ignore_patterns=list(job["ignore"]),
    )
    names = ("commit_url", "commit_message", "commit_description", "oid")
    return Outcome(
        repo_id=repo["repo_id"], commit={name: str(getattr(commit, name)) for name in names}
    )


def _told(error: Exception) -> Outcome:
    """What went wrong, in a line: addresses can be signed, and so are left out."""
    for each in _chain(error):
        status = getattr(getattr(each, "response", None), "status_code", None)
        if status is not None:
            again = status in _TRY_AGAIN or status >= 500
            return Outcome(problem=f"the Hub answered HTTP {status}", again=again)
    *_, cause = _chain(error)
    if "Invalid metadata in README.md" in str(error):
        return Outcome(problem="the Hub finds README.md invalid", again=False)
    return Outcome(problem=f"{type(cause).__name__}: {_first_line(cause)}".rstrip(": "))


def _chain(error: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__


def _first_line(error: BaseException) -> str:
    words = (str(error).splitlines() or [""])[0].split()
    return " ".join(word for word in words if "://" not in word)


def give_up_on_silence() -> None:
    """Have requests fail that go without a byte for :data:`STALL_S`, for the whole process."""
    from huggingface_hub import get_session, set_client_factory

    usual: Any = get_session()

    def client() -> Any:
        hooks = usual.event_hooks
        return type(usual)(event_hooks=hooks, follow_redirects=True, timeout=STALL_S)

    set_client_factory(client)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(1)


def main() -> None:
    """Do what standard input says."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    told = json.loads(sys.stdin.read())
    give_up_on_silence()
    sys.stdout.write(json.dumps(asdict(attempt(told["job"], token=told["token"]))) + "\n")


if __name__ == "__main__":
    main()
