"""The upload of a fine-tuned model: once, at the end, and never in the way of the training."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from trl import SFTConfig, SFTTrainer

from trl_grpo_ext.hub.push import push_or_tell
from trl_grpo_ext.hub.record import IGNORED, Upload


@dataclass(frozen=True)
class Push:
    """What was asked for.

    Attributes:
        repo_id: ``OWNER/NAME``, or a name.
        private: Whether the repository is created so.
    """

    repo_id: str
    private: bool


def take_push(args: SFTConfig) -> Push | None:
    """Return what is to be uploaded, and switch transformers' own uploads off.

    Those ask the Hub when the trainer is made, and end the run if it does not answer.
    """
    if not args.push_to_hub:
        return None
    args.push_to_hub = False
    if args.hub_token:  # transformers would save it with its arguments, in the folder
        os.environ.setdefault("HF_TOKEN", args.hub_token)
        args.hub_token = None
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    return Push(name, private=args.hub_private_repo is not False)


def push_at_end(trainer: SFTTrainer, *, asked: Push | None) -> None:
    """Upload the folder with TRL's card; what is not uploaded is told, with the command for it.

    Args:
        trainer: In the main process; its model is saved.
        asked: From :func:`take_push`.
    """
    if asked is None:
        return
    trainer.create_model_card(model_name=asked.repo_id)
    upload = Upload(asked.repo_id, folder=".", private=asked.private, ignore=IGNORED)
    trainer.accelerator.print(push_or_tell(str(trainer.args.output_dir), upload))
