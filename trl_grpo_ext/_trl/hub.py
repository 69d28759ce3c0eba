"""TRL's trainer whose uploads run in the background, and never in the way of the training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import CommitInfo, is_offline_mode
from transformers import trainer as transformers_trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from trl_grpo_ext._trl.guards import GuardSeams
from trl_grpo_ext.hub.card import write_card
from trl_grpo_ext.hub.completions import COMPLETIONS, write_completions
from trl_grpo_ext.hub.facts import run_facts
from trl_grpo_ext.hub.record import REFERENCES, Upload
from trl_grpo_ext.hub.upload import BackgroundUploads
from trl_grpo_ext.report.history import History
from trl_grpo_ext.report.plots import write_plots

logger = logging.get_logger(__name__)

_WITH_CHECKPOINTS = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


class HubSeams(GuardSeams):
    """``trl.GRPOTrainer`` that asks a queue for what transformers asks the Hub for.

    Attributes:
        run_settings: What the model card lists of the settings; the options that differ from their
            defaults if ``None``. A recipe sets it.
        run_dataset: Name of the data, for the model card.
    """

    run_settings: Mapping[str, object] | None = None
    run_dataset: str | None = None
    hub_model_id: Any  # None, or the name of the repository
    _uploads: BackgroundUploads | None = None
    _makes_private = True

    @property
    def hub_secrets(self) -> list[str]:
        """What must not be in a card."""
        tokens = (self.args.hub_token, self._uploads and self._uploads.token)
        return [token for token in tokens if token]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:  # noqa: FBT001
        """Have the repository created in the background, private unless told otherwise."""
        if not self.extended or not self.is_world_process_zero():
            super().init_hf_repo(token, private)
            return
        self._uploads = self._uploads or BackgroundUploads(
            Path(str(self.args.output_dir)),
            wait_s=self.options.hub_wait_s,
            offline=is_offline_mode(),
            on_created=self._named,
        )
        self._uploads.token = token or self.args.hub_token or self._uploads.token
        asked = self.args.hub_private_repo if private is None else private
        self._makes_private = asked is not False
        with self._asks_queue():
            super().init_hf_repo(token, private)
        kind = "private" if self._makes_private else "public, as `hub_private_repo` is false"
        later = " HF_HUB_OFFLINE is set: nothing is uploaded in this run." * self._uploads.offline
        logger.warning(f"push_to_hub: {self.hub_model_id}, {kind} if it is new.{later}")

    def _named(self, repo_id: str) -> None:
        self.hub_model_id = repo_id

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,  # noqa: FBT001, FBT002 - transformers' signature
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,  # noqa: FBT001
        **kwargs: Any,
    ) -> Any:
        """Write plots and card, and upload the run's folder.

        With several processes it does not wait: the others would wait too. The program does, when
        it ends.

        Returns:
            The commit; ``None`` if it was not uploaded, which is told. With ``blocking=False``, or
            several processes, a future of that.
        """
        rest = {"token": token, "revision": revision, "private": private, **kwargs}
        if not self.extended:
            return super().push_to_hub(commit_message, blocking, **rest)
        if self.hub_model_id is None or token is not None:
            self.init_hf_repo(token, private)
        uploads: BackgroundUploads | None = self._uploads
        if uploads is None:  # not the main process
            return super().push_to_hub(commit_message, blocking, **rest)
        self.run_dataset = kwargs.get("dataset_name") or self.run_dataset
        # What is read for an earlier upload is written anew here, and replaces it.
        with uploads.held(withdraw=True), self._asks_queue():
            self._write_plots()
            future: Any = super().push_to_hub(commit_message, blocking=False, **rest)
            self._push_completions()
        uploads.waits_at_exit = True
        if not blocking or self.accelerator.num_processes > 1:
            return future
        uploads.wait()
        return future.result() if future.done() else None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Queue what transformers pushes; if it skips a checkpoint that it is to keep, queue that.

        transformers pushes nothing while an earlier push is under way, unless `hub_always_push`.
        One that waits for the Hub to come back is replaced.
        """
        if self._uploads is None:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        self._uploads.waits_at_exit = False
        with self._uploads.held(withdraw=self.args.hub_always_push) as free:
            if free:
                self.push_in_progress = None
            with self._asks_queue(), self._without_token():
                super()._push_from_checkpoint(checkpoint_folder)
        if not free and self.args.hub_strategy in _WITH_CHECKPOINTS:
            self._push_checkpoint_only(Path(checkpoint_folder).name)

    def _push_checkpoint_only(self, name: str) -> None:
        every = self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
        self._queue(
            Upload(
                str(self.hub_model_id),
                folder=name,
                path_in_repo=name if every else "last-checkpoint",
                message=f"Training in progress, {name}",
                revision=self.args.hub_revision,
                private=self._makes_private,
            )
        )

    def _finish_current_push(self) -> None:
        """Let uploads go on; the program waits for them when it ends."""
        if self._uploads is None:
            super()._finish_current_push()
        else:
            self._uploads.waits_at_exit = True

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with self._without_token():
            super()._save(*args, **kwargs)

    @contextmanager
    def _without_token(self) -> Iterator[None]:
        """While it runs, the arguments have no token: transformers saves and uploads them."""
        token = self.args.hub_token
        self.args.hub_token = None if self.extended else token
        try:
            yield
        finally:
            self.args.hub_token = token

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card, with what this run was."""
        super().create_model_card(*args, **kwargs)
        if self.extended and self.is_world_process_zero():
            write_card(Path(str(self.args.output_dir)), run_facts(self))

    # The queue ------------------------------------------------------------------------------------

    @contextmanager
    def _asks_queue(self) -> Iterator[None]:
        """While it runs, transformers' trainer asks this one instead of ``HfApi``."""
        module: Any = transformers_trainer
        own = module.hf_api
        queue = SimpleNamespace(create_repo=self._create_repo, upload_folder=self._upload_folder)
        module.hf_api = lambda: queue
        try:
            yield
        finally:
            module.hf_api = own

    def _create_repo(self, repo_id: str, **_: Any) -> SimpleNamespace:
        self._queue(Upload(repo_id, folder=None, private=self._makes_private))
        return SimpleNamespace(repo_id=repo_id)

    def _upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        commit_message: str | None,
        path_in_repo: str = "",
        revision: str | None = None,
        ignore_patterns: tuple[str, ...] = (),
        **_: Any,
    ) -> Future[CommitInfo | None]:
        return self._queue(
            Upload(
                repo_id,
                folder=os.path.relpath(folder_path, str(self.args.output_dir)),
                path_in_repo=path_in_repo,
                private=self._makes_private,
                message=commit_message or "Upload",
                revision=revision,
                ignore=(*ignore_patterns, REFERENCES),
            )
        )

    def _queue(self, upload: Upload) -> Future[CommitInfo | None]:
        assert self._uploads is not None
        return self._uploads.submit(upload)

    def _push_completions(self) -> None:
        run_dir, model = Path(str(self.args.output_dir)), str(self.hub_model_id)
        if self.options.push_completions and write_completions(run_dir, model=model):
            self._queue(
                Upload(
                    f"{model}-completions",
                    folder=COMPLETIONS,
                    repo_type="dataset",
                    private=self._makes_private,
                    message="Completions of the training",
                )
            )

    def _write_plots(self) -> None:
        if self.state.log_history:
            folder = Path(str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            write_plots(folder / "plots", History.of(self.state.log_history))
