"""TRL's trainer whose checkpoints say which reference they go with, and bring it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging
from trl.trainer import grpo_trainer

from trl_grpo_ext._trl.reference import ReferenceSeams
from trl_grpo_ext.checkpointing import newest_checkpoint
from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference.keeper import ReferenceKeeper
from trl_grpo_ext.reference.layer_stream import Weights, named_tensors
from trl_grpo_ext.reference.sharing import is_anywhere, of_main
from trl_grpo_ext.reference.store import (
    ReferenceNote,
    fingerprint,
    fits,
    note,
    noted,
    replace_weights,
)
from trl_grpo_ext.zero3 import without_zero3

logger = logging.get_logger(__name__)


class KeptReference(ReferenceSeams):
    """``trl.GRPOTrainer`` whose reference is saved beside the checkpoints, or found again.

    Attributes:
        reference_path: Name or folder of the model that the run began with.
    """

    _reference_hash: str | None = None
    _reference_is_another: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reference_path = str(self._causal_lm(self.model).name_or_path)

    @property
    def saves_reference(self) -> bool:
        """Whether checkpoints go with a saved reference."""
        return self.reference_keeper is not None and self.reference_keeper.store is not None

    def check_resumable(self, keeper: ReferenceKeeper) -> None:
        """Tell before it is built that the newest checkpoint here goes with another reference.

        Raises:
            ReferenceModelError: ``resume_from_checkpoint`` asks to go on from there.
        """
        asked = self.args.resume_from_checkpoint
        named = Path(asked) if asked and Path(asked).is_dir() else None
        checkpoint = of_main(named or newest_checkpoint(Path(str(self.args.output_dir))))
        if checkpoint is None:
            return
        try:
            keeper.check_resume(checkpoint, noted(checkpoint))
        except ReferenceModelError as error:
            if asked:
                raise
            if self.is_world_process_zero():
                logger.warning(f"If you resume: {error}")

    def resume_reference(self, checkpoint: Path) -> None:
        """Take the reference that the run of a checkpoint had, if this one has another."""
        found: ReferenceNote = of_main(noted(checkpoint))
        keeper, device = self.reference_keeper, self.accelerator.device
        if keeper is not None:
            keeper.check_resume(checkpoint, found)
            keeper.resume(checkpoint, found.key, self.bare_reference, device=device)
            if found.key is not None and found.path is not None:
                self.reference_path = found.path
        if self.ref_model is not None and found.path and found.weights:  # TRL's own
            self._load_again(found.path, found.weights)
        if self.ref_model is None or self.saves_reference or not self.args.sync_ref_model:
            return
        step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
        if step >= self.args.ref_model_sync_steps and self.is_world_process_zero():
            logger.warning(
                "`sync_ref_model` had moved the reference by this step, but no checkpoint holds "
                "TRL's own copy, nor what FSDP1 has split: the KL goes on against the model that "
                "this run was given. `reference: resident` is saved and resumed, but for FSDP1."
            )

    def _load_again(self, path: str, expected: str) -> None:
        """Load TRL's own reference from where the run had it from, if this run's is another one.

        What cannot be loaded stays what it is, with a warning.
        """
        own = self._weights_of_reference()
        if is_anywhere(own not in (None, expected)):
            weights: Weights = {}
            try:
                with without_zero3():
                    fresh = grpo_trainer.create_model_from_path(path, **self._load_options)
                if fingerprint(fresh) == expected:
                    weights = dict(named_tensors(fresh))
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                logger.info(f"reference: {path} cannot be loaded: {error}")
            if is_anywhere(not fits(self.bare_reference, weights)):
                if self.is_world_process_zero():
                    logger.warning(
                        f"{path} does not hold what the run's reference was loaded from any more: "
                        "the KL goes on against the model that this run was given."
                    )
                self._reference_is_another = self.reference_path == path
                return
            replace_weights(self.bare_reference, weights.items())
            self._reference_hash = expected
            if self.reference_keeper is not None:
                self.reference_keeper.take_source(expected)
            logger.info(f"reference: loaded from {path}, as when the run began")
        if own is not None:
            self.reference_path = path

    @property
    def _load_options(self) -> dict[str, Any]:
        """How TRL loads its reference; whole, in host memory."""
        given = cast(dict[str, Any], self.args.model_init_kwargs or {})
        options = {"trust_remote_code": self.args.trust_remote_code, **given}
        return options | {"dtype": self.bare_reference.dtype, "device_map": None}

    def _weights_of_reference(self) -> str | None:
        """The hash of TRL's own, which nothing changes; ``None`` if it is not known.

        It is taken once, a second a gigabyte. Every process must call it.
        """
        if self.uses_fsdp1 or self.args.sync_ref_model:  # flattened; moved
            return None
        self._reference_hash = self._reference_hash or fingerprint(self.bare_reference)
        return self._reference_hash

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Note in each checkpoint which reference it goes with."""
        super()._save_checkpoint(model, trial)
        keeper, writes = self.reference_keeper, self.args.should_save
        if self.ref_model is None or not self.extended:
            return
        found = ReferenceNote(path=self.reference_path)
        if keeper is None:
            found = found._replace(kind="resident", weights=self._weights_of_reference())
        elif keeper.store is not None:
            if of_main(keeper.is_unsaved):  # all must save one that is split
                keeper.save(self.bare_reference, writes=writes)
            settings = keeper.settings
            found = found._replace(key=keeper.key, kind=settings.kind, on_disk=settings.on_disk)
        if writes:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            note(folder, found)

    def prune_references(self, run_dir: Path) -> None:
        """Remove the saved references that no checkpoint of the run goes with any more."""
        if self.reference_keeper is not None and self.args.should_save:
            self.reference_keeper.prune(run_dir)
