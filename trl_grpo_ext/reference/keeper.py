"""The reference of a run: built once, kept beside the checkpoints, moved if the run asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from trl_grpo_ext.cpu_linear import use_onednn
from trl_grpo_ext.errors import LayerOrderError, ReferenceModelError
from trl_grpo_ext.reference.build import build_reference, check_options, summarize_reference
from trl_grpo_ext.reference.calibration import (
    Rank,
    calibrate,
    rank_up_to,
    rank_within,
)
from trl_grpo_ext.reference.completions import CompletionBatch
from trl_grpo_ext.reference.distillation import distill
from trl_grpo_ext.reference.fidelity import KLPenalty, ReferenceFidelity, measure_fidelity
from trl_grpo_ext.reference.frozen import check_policy
from trl_grpo_ext.reference.layer_stream import named_tensors, streamed_layers
from trl_grpo_ext.reference.mixed import calibrate_mixed, widen
from trl_grpo_ext.reference.notices import tell_few_tokens, tell_fidelity, tell_unknown_experts
from trl_grpo_ext.reference.options import DEFAULT_RANK, ReferenceSettings
from trl_grpo_ext.reference.sampling import CalibrationData
from trl_grpo_ext.reference.sharing import is_anywhere, is_main, of_main, sent
from trl_grpo_ext.reference.store import (
    FOLDER,
    ReferenceNote,
    ReferenceStore,
    fingerprint,
    reference_key,
    replace_weights,
)
from trl_grpo_ext.reference.streamed import (
    build_streamed_reference,
    describe_streamed,
    mix_streamed,
    remove_mixed,
)
from trl_grpo_ext.reference.whole import split_again, unsplit

logger = logging.get_logger(__name__)

Batches = Sequence[CompletionBatch]


@dataclass
class ReferenceKeeper:
    """Builds a run's reference, saves it beside the checkpoints, and finds it again on a resume.

    Attributes:
        settings: Of the reference.
        sample: Draws completions of the policy to calibrate and to measure on; ``None`` if that is
            not possible, so that a quantized reference is rounded to nearest and not measured.
        penalty: That the fidelity is measured with.
        drawn_from: A hash of what ``sample`` draws from; another one makes another reference.
        store: Where references are saved; ``None`` if nothing of the run is. One on disk needs it.
        onednn: Whether float32 layers on a CPU run in oneDNN.
        progress: Whether bars are shown.
        key: Of the reference in its store; empty without one.
        initial_key: Of the reference that was built first; that is kept until the run ends.
        fidelity: Of a quantized reference, measured when it was built.
        wide: Names of the layers in 8 bits of a ``mixed`` one, once they are chosen: a reference
            that is built anew has the same.
        waits: Whether the reference that was built last still needs the main process's weights.
    """

    settings: ReferenceSettings
    sample: Callable[[PreTrainedModel], CalibrationData] | None
    penalty: KLPenalty
    drawn_from: str = ""
    store: ReferenceStore | None = None
    onednn: bool = False
    progress: bool = False
    key: str = ""
    initial_key: str = ""
    fidelity: ReferenceFidelity | None = None
    wide: list[str] | None = None
    waits: bool = False

    def build(self, policy: PreTrainedModel) -> PreTrainedModel:
        """Return the reference of this policy: a saved one if it was built before.

        Of several processes the first one builds a quantized reference and saves it. Another one
        that does not find it there ``waits`` for :meth:`share`.

        Raises:
            ReferenceModelError: it cannot be built.
        """
        check_policy(policy)
        if self.settings.kind == "quantized":
            keep_modules, rank = self.settings.keep_modules, self.settings.rank or 0
            check_options(policy, keep_modules=keep_modules, rank=rank)
        if self.store is not None:
            self.key = self._key_of(fingerprint(policy))
            self.initial_key = self.initial_key or self.key
        reference = self._uncalibrated(policy)
        kind = self.settings.kind
        if kind == "quantized":
            if self.store is not None and self.store.manifest(self.key) is not None:
                self._restore(self.store, self.key, reference)
                self._measure_again(self.store, reference, policy)
            elif not is_main():
                self.waits = True
            else:
                self._calibrate(reference, policy)
                self.save(reference)
            if self.fidelity is not None:
                tell_fidelity(self.fidelity, self.settings)
            tell_unknown_experts(reference, self.settings)
        tell = describe_streamed if kind == "streamed" else summarize_reference
        logger.info(f"reference: {kind}, {tell(reference)}")
        return reference

    def _key_of(self, source: str) -> str:
        drawn = {"drawn_from": self.drawn_from} if self.drawn_from else {}
        return reference_key(source, self.settings.identity | drawn)

    def share(self, reference: PreTrainedModel, *, device: torch.device) -> None:
        """Give what the main process has just built to those that wait; every one must call it."""
        if not is_anywhere(self.waits):
            return
        wide, fidelity = of_main((self.wide, self.fidelity))
        if self.waits:
            self.wide, self.fidelity = wide, fidelity
            widen(reference, wide or [], narrow=self.settings.quantization)
        weights = sent(dict(named_tensors(reference)), device=device)
        if self.waits:
            replace_weights(reference, weights)
            logger.info("reference: sent by the main process, whose disk is not seen here")
            self.waits = False
        else:
            for _ in weights:
                pass

    def _uncalibrated(self, policy: PreTrainedModel) -> PreTrainedModel:
        settings = self.settings
        if settings.kind == "streamed":
            reference = self._streamed(policy)
        else:
            reference = build_reference(
                policy,
                kind="resident" if settings.kind == "resident" else "quantized",
                quantization=settings.quantization,
                block_size=settings.block_size,
                double_quantization=settings.double_quantization,
                embedding_quantization=settings.embedding_quantization,
                keep_modules=settings.keep_modules,
            )
        if self.onednn:
            for module in (reference, *(layer.host for layer in streamed_layers(reference))):
                use_onednn(module)
        return reference

    def _streamed(self, policy: PreTrainedModel) -> PreTrainedModel:
        if not self.settings.on_disk:
            return build_streamed_reference(policy)
        assert self.store is not None
        if is_main():  # which builds before the others
            remove_mixed(self.store.folder(self.key))
        reference = build_streamed_reference(policy, folder=self.store.folder(self.key))
        self.store.describe(self.key, self._manifest())  # its files are what a resume needs
        return reference

    def _calibrate(self, reference: PreTrainedModel, policy: PreTrainedModel) -> None:
        settings = self.settings
        if self.sample is None:
            logger.warning(
                "The reference is rounded to nearest and not measured: prompts may hold images, on "
                "which it is not calibrated. Watch `kl` from the first step on, or set "
                "`reference: streamed`, which is exact."
            )
            return
        data = self.sample(policy)
        if settings.compensation != "none":
            tell_few_tokens(data, asked=settings.calibration_tokens)
            self._compensate(reference, policy, data.calibration)
        if settings.distillation_steps:
            distill(
                reference,
                policy,
                data.calibration,
                num_steps=settings.distillation_steps,
                temperature=self.penalty.temperature,
                progress=self.progress,
            )
        self._measure(reference, policy, data)

    def _measure(
        self, reference: PreTrainedModel, policy: PreTrainedModel, data: CalibrationData
    ) -> None:
        try:
            self.fidelity = measure_fidelity(
                policy,
                reference,
                data.held_out,
                penalty=self.penalty,
                kl_target=self.settings.kl_target,
            )
        except LayerOrderError:
            logger.warning(
                "How faithful the reference is cannot be measured, because the layers of "
                f"{type(policy).__name__} cannot be run one by one. Watch `kl` from the first step "
                "on, or set `reference: resident`, which is exact."
            )

    def _measure_again(
        self, store: ReferenceStore, reference: PreTrainedModel, policy: PreTrainedModel
    ) -> None:
        """Measure a saved reference with the penalty of this run, if its run had another one."""
        saved = store.manifest(self.key) or {}
        if self.sample is not None and saved.get("measured") != self._manifest()["measured"]:
            self._measure(reference, policy, self.sample(policy))
            store.describe(self.key, self._manifest())

    def _compensate(
        self, reference: PreTrainedModel, policy: PreTrainedModel, batches: Batches
    ) -> None:
        if self.settings.compensation == "mixed" and self.wide is None:
            self.wide = calibrate_mixed(
                reference, policy, batches, bits=self.settings.bits, progress=self.progress
            )
            return
        widen(reference, self.wide or [], narrow=self.settings.quantization, policy=policy)
        calibrate(reference, policy, batches, rank=self._rank(), progress=self.progress)

    def _rank(self) -> Rank:
        settings = self.settings
        if settings.compensation != "low_rank":
            return 0
        if settings.bits is not None:
            return rank_within(settings.bits)
        return rank_up_to(DEFAULT_RANK) if settings.rank is None else settings.rank

    # Beside the checkpoints -----------------------------------------------------------------------

    @property
    def is_unsaved(self) -> bool:
        """Whether the reference of this moment should be saved, and is not yet."""
        return self.store is not None and self.store.manifest(self.key) is None

    def save(self, reference: PreTrainedModel, *, writes: bool = True) -> None:
        """Save the reference; if it is split over processes, each calls it, and one writes."""
        if self.store is not None:
            self.store.save(self.key, reference, self._manifest(), writes=writes)

    def prune(self, run_dir: Path) -> None:
        """Remove the saved references that no checkpoint of the folder goes with any more."""
        if self.store is not None:
            self.store.prune(run_dir, keep={self.key, self.initial_key})

    def take_source(self, source: str) -> None:
        """Go by the key of the reference of a policy with this hash, whose weights it has now."""
        if self.store is not None:
            self.key = self.initial_key = self._key_of(source)

    def resume(
        self, checkpoint: Path, key: str | None, reference: PreTrainedModel, *, device: torch.device
    ) -> None:
        """Make the reference that of the run that wrote a checkpoint, if it is another one.

        Every process must call it. Where one does not see the files, the main process sends them.

        Args:
            checkpoint: Beside the folder of the saved ones.
            key: Of the saved one, the same in each process; ``None`` if that is not known.
            reference: Changed in place.
            device: What the processes talk over.

        Raises:
            ReferenceModelError: the saved one is gone, or is not the kind of reference that
                :meth:`check_resume` has seen.
        """
        if not is_anywhere(key is not None and key != self.key):
            return
        assert key is not None
        store = ReferenceStore(checkpoint.parent / FOLDER)
        manifest = of_main(store.manifest(key))
        is_missing = is_anywhere(store.manifest(key) is None)
        if manifest is None or self.settings.on_disk or not is_missing:
            self._restore(store, key, reference)
        else:
            self._adopt(manifest, reference)
            weights = store.weights(key, reference) if is_main() else {}
            replace_weights(reference, sent(weights, device=device))
            logger.info("reference: sent by the main process, from where the run had saved it")
        self.key = key

    def check_resume(self, checkpoint: Path, found: ReferenceNote) -> None:
        """Refuse to go on from a checkpoint whose run had a reference of other settings.

        Every process must call it; what the main process sees counts.

        Args:
            checkpoint: Beside the folder of the saved ones.
            found: What it notes. TRL's own copy, which is not saved, was a resident one.

        Raises:
            ReferenceModelError: it had.
        """
        store = ReferenceStore(checkpoint.parent / FOLDER)
        saved = None if found.key is None else store.manifest(found.key)
        own = {"kind": found.kind} if found.weights else None
        then, here = of_main(own if saved is None else saved["settings"]), self._settings()
        if then not in (None, here):
            raise ReferenceModelError(
                f"{checkpoint} was written by a run with another reference "
                f"({_changes(then, here)}), so its KL would jump. Set the `reference` options to "
                "what they were, or start anew from the checkpoint's weights."
            )

    def _restore(self, store: ReferenceStore, key: str, reference: PreTrainedModel) -> None:
        self._adopt(store.manifest(key) or {}, reference)
        store.restore(key, reference, mapped=self.settings.on_disk)
        logger.info(f"reference: loaded from {store.folder(key)}")

    def _adopt(self, manifest: dict[str, Any], reference: PreTrainedModel) -> None:
        """Take over what a saved reference was measured to be, and which of its layers are wide."""
        self.wide = manifest.get("wide")
        widen(reference, self.wide or [], narrow=self.settings.quantization)
        fidelity = manifest.get("fidelity")
        self.fidelity = None if fidelity is None else ReferenceFidelity(**fidelity)

    def _settings(self) -> dict[str, Any]:
        """What the reference is made of, as JSON reads it back."""
        values = self.settings.identity
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    def _manifest(self) -> dict[str, Any]:
        fidelity = None if self.fidelity is None else asdict(self.fidelity)
        measured = asdict(self.penalty) | {"kl_target": self.settings.kl_target}
        return {
            "settings": self._settings(),
            "fidelity": fidelity,
            "measured": measured,
            "wide": self.wide,
        }

    # Moved by `sync_ref_model` --------------------------------------------------------------------

    def take(self, built: PreTrainedModel, *, into: PreTrainedModel) -> None:
        """Give a quantized reference the weights of one that was built anew."""
        widen(into, self.wide or [], narrow=self.settings.quantization)
        replace_weights(into, named_tensors(built))

    def mix(self, reference: PreTrainedModel, policy: PreTrainedModel, *, alpha: float) -> None:
        """Move an exact reference towards the policy.

        Args:
            reference: Changed in place.
            policy: As it is now, not wrapped. Only for a resident reference, which is split as it
                is, may processes hold parts of it; every one must call this then.
            alpha: 1 makes the reference the policy of this moment.
        """
        if self.settings.kind == "streamed":
            mix_streamed(reference, policy, alpha=alpha)
        else:
            _mix(reference, policy, alpha)
        if self.store is not None:
            self.key = reference_key(fingerprint(policy), {"into": self.key, "alpha": alpha})


def _changes(then: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs between two settings: the kind, or else all that does."""
    names = {"kind"} if then["kind"] != here["kind"] else then.keys() | here.keys()
    return ", ".join(
        f"{name}: {then.get(name)!r}, here {here.get(name)!r}"
        for name in sorted(names)
        if then.get(name) != here.get(name)
    )


@torch.no_grad()
def _mix(reference: nn.Module, policy: nn.Module, alpha: float) -> None:
    split_again(reference)
    for target, live in zip(reference.parameters(), policy.parameters(), strict=True):
        with unsplit(live), unsplit(target, writes=True):
            target.mul_(1.0 - alpha).add_(live.to(target.device), alpha=alpha)
