"""Uploading what a run could not upload, or a folder as it is: ``trl-grpo-ext push``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from huggingface_hub import get_token, is_offline_mode
from tenacity import Retrying, retry_if_result, stop_after_attempt, wait_exponential
from transformers.utils import logging

from trl_grpo_ext.errors import HubError
from trl_grpo_ext.hub.attempt import Outcome, attempt, give_up_on_silence
from trl_grpo_ext.hub.card import CARD
from trl_grpo_ext.hub.completions import folder_card
from trl_grpo_ext.hub.record import (
    IGNORED,
    RECORD,
    REFERENCES,
    Upload,
    is_repo_id,
    read_record,
    write_record,
)

logger = logging.get_logger(__name__)

_ATTEMPTS = 3


def push_folder(
    folder: str | Path, *, repo_id: str | None = None, public: bool = False, pause_s: float = 2.0
) -> list[str]:
    """Upload what the record of a run says is missing, or all of a folder that has no record.

    Args:
        folder: Of a run or a dataset. One with parquet files and no model is a dataset.
        repo_id: ``OWNER/NAME``, or a name for the owner of the token; all of the folder goes there,
            whatever the record says. By default the folder's name.
        public: Whether a repository that is created is public.
        pause_s: Before the second attempt, and doubled before the third.

    Returns:
        A line for each thing that was uploaded; none if the record says that nothing is missing.

    Raises:
        HubError: There is no such folder, no token, the Hub is not to be asked, or not all could be
            uploaded; what was not stays in the record.
    """
    run_dir = Path(folder)
    _check(run_dir)
    record = read_record(run_dir)
    if repo_id is not None or record is None:
        uploads, others = [_whole(run_dir, repo_id)], record or []
    else:
        uploads, others = [each for each in record if each.folder is not None], []
    if public:
        uploads = [replace(each, private=False) for each in uploads]
    return list(_push(run_dir, uploads, others=others, pause_s=pause_s))


def push_dataset(folder: str | Path, *, repo_id: str, private: bool = True) -> str:
    """Upload a folder of parquet files as a dataset, with a card if it has none.

    For the end of a program: it never raises because of the Hub.

    Args:
        folder: With ``*.parquet``.
        repo_id: ``OWNER/NAME``, or a name for the owner of the token.
        private: Whether the repository is created so.

    Returns:
        A line that says where it is, or what is missing and the command that uploads it.
    """
    run_dir = Path(folder)
    card = run_dir / CARD
    if not card.exists():
        card.write_text(folder_card(repo_id), encoding="utf-8")
    whole = _whole(run_dir, repo_id)
    upload = replace(whole, repo_type="dataset", ignore=IGNORED, private=private)
    return push_or_tell(run_dir, upload)


def push_or_tell(folder: str | Path, upload: Upload) -> str:
    """Upload something of a run's folder; return where it is, or what is missing and the command.

    For the end of a program: it never raises because of the Hub.
    """
    run_dir = Path(folder)
    write_record(run_dir, [upload])
    try:
        return push_folder(run_dir)[0]
    except HubError as error:
        return str(error)


def _check(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise HubError(f"{run_dir} is not a folder, so there is nothing to upload. Name a run's.")
    again = f"Nothing was uploaded from {run_dir}. Then: trl-grpo-ext push {run_dir}"
    if is_offline_mode():
        raise HubError(f"HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it. {again}")
    if get_token() is None:
        raise HubError(f"there is no token. Run `hf auth login`, or set HF_TOKEN. {again}")


def _whole(run_dir: Path, repo_id: str | None) -> Upload:
    name = repo_id or run_dir.absolute().name
    if not is_repo_id(name):
        raise HubError(
            f"{name!r} cannot be the name of a repository. Give another: --repo-id OWNER/NAME."
        )
    if _is_dataset(run_dir):
        return Upload(name, folder=".", repo_type="dataset", ignore=IGNORED)
    return Upload(name, folder=".", ignore=(*IGNORED, REFERENCES))


def _is_dataset(folder: Path) -> bool:
    has_model = any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    return not has_model and any(folder.glob("*.parquet"))


def _push(
    run_dir: Path, uploads: list[Upload], *, others: list[Upload], pause_s: float
) -> Iterator[str]:
    """Upload one after the other; yield what is done, and raise at the end if something is not."""
    give_up_on_silence()
    problems, missing = {}, list(uploads)
    for upload in uploads:
        outcome = _attempts(upload, run_dir, pause_s)
        if outcome.problem is None:
            missing.remove(upload)
            yield f"{upload.folder} -> {upload.repo_type} {outcome.repo_id}"
        else:
            problems[upload] = outcome.problem
        if missing or (run_dir / RECORD).exists():
            write_record(run_dir, [*others, *missing])
    if problems:
        told = "; ".join(f"{upload}: {problem}" for upload, problem in problems.items())
        raise HubError(f"Not uploaded: {told}. To try again: trl-grpo-ext push {run_dir}")


def _attempts(upload: Upload, run_dir: Path, pause_s: float) -> Outcome:
    retrying = Retrying(
        retry=retry_if_result(lambda outcome: outcome.problem is not None and outcome.again),
        stop=stop_after_attempt(_ATTEMPTS),
        wait=wait_exponential(multiplier=pause_s),
        retry_error_callback=lambda state: state.outcome and state.outcome.result(),
    )
    outcome: Outcome = retrying(attempt, upload.job(run_dir), token=None)
    return outcome
