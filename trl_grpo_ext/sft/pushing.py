"""The upload of a fine-tuned model: once, at the end, and never in the way of the training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trl import SFTConfig, SFTTrainer

from trl_grpo_ext.hub.card import write_card
from trl_grpo_ext.hub.facts import fine_tuning_facts
from trl_grpo_ext.hub.push import push_or_tell
from trl_grpo_ext.hub.record import IGNORED, Upload


@dataclass(frozen=True)
class Push:
    """What was asked for.

    Attributes:
        repo_id: ``OWNER/NAME``, or a name.
        private: Whether the repository is created so.
        revision: The branch, or the default one.
    """

    repo_id: str
    private: bool
    revision: str | None


def take_push(args: SFTConfig) -> Push | None:
    """Return what is to be uploaded, and switch transformers' own uploads off.

    Those ask the Hub when the trainer is made, and end the run if it does not answer.
    """
    if not args.push_to_hub:
        return None
    args.push_to_hub = False
    if args.hub_token:  # transformers would save it with its arguments, in the folder
        os.environ["HF_TOKEN"] = args.hub_token
        args.hub_token = None
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    return Push(name, private=args.hub_private_repo is not False, revision=args.hub_revision)


def push_at_end(trainer: SFTTrainer, *, asked: Push | None, settings: Mapping[str, object]) -> None:
    """Upload the folder with its card; what is not uploaded is told, with the command for it.

    Args:
        trainer: In the main process; its model and its report are saved.
        asked: From :func:`take_push`.
        settings: Every option that was given, by its key.
    """
    if asked is None:
        return
    vars(trainer)["hub_model_id"] = asked.repo_id  # the card says how to load it
    trainer.create_model_card(model_name=asked.repo_id)
    facts = fine_tuning_facts(trainer, {**settings, "push_to_hub": True})
    write_card(Path(str(trainer.args.output_dir)), facts)
    upload = Upload(
        asked.repo_id,
        folder=".",
        private=asked.private,
        revision=asked.revision,
        ignore=IGNORED,
    )
    trainer.accelerator.print(push_or_tell(str(trainer.args.output_dir), upload))
