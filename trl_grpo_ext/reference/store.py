"""The built reference beside the checkpoints, so that a resume neither calibrates nor guesses.

``output_dir/reference/<key>/`` holds the weights of one reference as they are stored, with a
manifest that says what it was made of. The key is a hash of the initial policy's weights and of the
settings; each checkpoint notes the key of the reference that its run has.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference.initial_files import map_initial, map_weights, raw_bytes
from trl_grpo_ext.reference.layer_files import OUTSIDE_LAYERS, save_weights
from trl_grpo_ext.reference.layer_stream import Weights, named_tensors, streamed_layers
from trl_grpo_ext.reference.whole import aligned, gathered, split_again, unsplit, whole_shape

FOLDER = "reference"  # beside the checkpoints
NOTE = "reference.json"  # in a checkpoint: which reference its run has
_MANIFEST = "manifest.json"
_KEY = re.compile("[0-9a-f]{16}")  # from reference_key


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's weights: SHA-256 of names, types, shapes and bytes.

    Reads all weights once: about a second a gigabyte. Of a model that is split over processes,
    every one must call it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(whole_shape(tensor))}\n".encode())
        digest.update(cast(Any, raw_bytes(gathered(tensor)).numpy()))
    return digest.hexdigest()


def reference_key(source: str, settings: Mapping[str, Any]) -> str:
    """Return the name of the reference that these settings make of a policy with this hash."""
    text = json.dumps({"source": source, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ReferenceStore:
    """The references that are saved in one folder.

    Attributes:
        root: The folder; made when a reference is saved.
    """

    root: Path

    def manifest(self, key: str) -> dict[str, Any] | None:
        """Return what a saved reference was made of; ``None`` if it is not there, or not whole."""
        try:
            text = (self.root / key / _MANIFEST).read_text(encoding="utf-8")
            return cast(dict[str, Any], json.loads(text))
        except (OSError, ValueError):
            return None

    def folder(self, key: str) -> Path:
        """Return where the reference of this name is, or would be."""
        return self.root / key

    def save(
        self,
        key: str,
        reference: PreTrainedModel,
        manifest: Mapping[str, Any],
        *,
        writes: bool = True,
    ) -> None:
        """Write a reference; it is there whole, with its manifest, or not at all.

        Args:
            key: Its name.
            reference: If it is split over processes, every one must call this.
            manifest: What it was made of.
            writes: Whether this process is the one that writes.

        Raises:
            ReferenceModelError: the disk is too small.
        """
        folder = self.root / key
        split_again(reference)
        files = dict(_stored(reference))
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            _check_disk(folder, sum(_num_bytes(t) for of in files.values() for t in of.values()))
        for stem, weights in files.items():
            whole: Weights = {}
            for name, tensor in weights.items():
                value = gathered(tensor)
                if writes:
                    whole[name] = value
            if writes:
                save_weights(whole, folder / f"{stem}.safetensors")
        if writes:
            self.describe(key, manifest)

    def describe(self, key: str, manifest: Mapping[str, Any]) -> None:
        """Write the manifest of a reference whose weights are there: that makes it a saved one."""
        _write_json(self.root / key / _MANIFEST, manifest)

    def weights(self, key: str, reference: PreTrainedModel) -> Weights:
        """Return the saved weights of a reference of the same kind and settings, mapped.

        Raises:
            ReferenceModelError: the saved one is not there, damaged, or of another kind.
        """
        folder = self.root / key
        if self.manifest(key) is None:
            raise ReferenceModelError(
                f"There is no reference in {folder}, so this run cannot go on with the one that "
                "it started with. Put the folder back, or start from the initial model without "
                "`resume_from_checkpoint`."
            )
        weights = map_initial(folder, verify=True)
        for stem, _ in _stored(reference):
            weights |= map_weights(folder / f"{stem}.safetensors")
        if misfits := sorted(_misfits(reference, weights)):
            raise ReferenceModelError(
                f"{folder} does not hold this reference whole: {len(misfits)} tensors are missing, "
                f"too many, or of another shape (the first is {misfits[0]}), so it cannot be read. "
                "Put back what was there; or delete the folder and start with the initial model, "
                "from which the reference is built again."
            )
        return weights

    def restore(self, key: str, reference: PreTrainedModel, *, mapped: bool = False) -> None:
        """Put the saved weights into a reference of the same kind and settings, in place.

        Args:
            key: Of the saved one.
            reference: Changed once all files were found to be whole.
            mapped: Whether the reference reads its weights from these files from here on.

        Raises:
            ReferenceModelError: as :meth:`weights`; or files in another dtype are to be mapped.
        """
        weights = self.weights(key, reference)
        if mapped:
            _check_types(self.root / key, reference, weights)
        replace_weights(reference, weights.items(), mapped=mapped)

    def prune(self, output_dir: Path, *, keep: Collection[str]) -> None:
        """Remove saved references that no checkpoint of the folder notes, but for ``keep``.

        Other folders stay. Nothing is removed where a note cannot be read, as it may name any.
        """
        notes = output_dir.glob(f"checkpoint-*/{NOTE}")
        try:
            kept = {noted(path.parent).key for path in notes}.union(keep)
        except ReferenceModelError:
            return
        for folder in self.root.glob("*"):  # none on a machine that was sent it
            if _KEY.fullmatch(folder.name) and folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)


class ReferenceNote(NamedTuple):
    """Which reference the run of a checkpoint has.

    Attributes:
        key: In its store; ``None`` if it is not saved.
        kind: What it is; ``None`` in notes of older versions.
        on_disk: Whether a streamed one is read from disk.
        path: Name or folder of the model that the run began with.
        weights: Hash of those that were loaded from there, if the reference is not saved.
    """

    key: str | None = None
    kind: str | None = None
    on_disk: bool = False
    path: str | None = None
    weights: str | None = None


def note(checkpoint: Path, reference: ReferenceNote) -> None:
    """Write into a checkpoint which reference its run has."""
    values = reference._asdict()
    _write_json(checkpoint / NOTE, {"reference": values.pop("key"), **values})


def noted(checkpoint: Path) -> ReferenceNote:
    """Return what was noted in a checkpoint; nothing if it has no note.

    Raises:
        ReferenceModelError: the note is damaged.
    """
    try:
        values = json.loads((checkpoint / NOTE).read_text(encoding="utf-8"))
        known = {name: values[name] for name in ReferenceNote._fields if name in values}
        return ReferenceNote(**known | {"key": values["reference"]})
    except FileNotFoundError:
        return ReferenceNote()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReferenceModelError(
            f"{checkpoint / NOTE} is damaged, so nothing says which reference the run has. Put "
            "the file back, or resume from another checkpoint."
        ) from error


def _stored(reference: PreTrainedModel) -> Iterator[tuple[str, Weights]]:
    """The tensors of a reference by the stem of their file, and by name; tied ones once."""
    for layer in streamed_layers(reference):
        tensors = {layer.prefix + name: tensor for name, tensor in named_tensors(layer.host)}
        yield f"layer-{layer.index:05d}", tensors
    yield OUTSIDE_LAYERS, dict(named_tensors(reference))


def fits(reference: PreTrainedModel, weights: Weights) -> bool:
    """Return whether weights have the names and shapes of a reference's."""
    return not _misfits(reference, weights)


@torch.no_grad()
def replace_weights(
    reference: PreTrainedModel, weights: Iterable[tuple[str, Tensor]], *, mapped: bool = False
) -> None:
    """Give each tensor of the reference that ``weights`` names the value there.

    Args:
        reference: Changed in place; page-locked memory of a streamed one stays in use.
        weights: By their names in the reference.
        mapped: Whether layers that are streamed hold these very tensors from here on.

    Raises:
        KeyError: the reference has no such tensor.
    """
    split_again(reference)
    layers = streamed_layers(reference)
    for layer in layers[:1]:
        layer.stream.forget()
    hosts = {id(tensor) for layer in layers for _, tensor in named_tensors(layer.host)}
    owners = _owners(reference)
    for name, value in weights:
        module, attribute = owners[name]
        held = getattr(module, attribute)
        if held is None:  # low-rank factors that the fresh reference does not have
            module._buffers[attribute] = value.to(_device(module), copy=True)
        elif mapped and id(held) in hosts:
            held.data = value
        else:
            with unsplit(held, writes=True):
                own, part = aligned(held, value)
                own.copy_(part)


def _misfits(reference: PreTrainedModel, weights: Weights) -> set[str]:
    """Names of tensors that are not among the weights, not of the reference, or of another shape.

    A fresh reference has none in the place of low-rank factors, so any will fit.
    """
    expected = {name: t for _, tensors in _stored(reference) for name, t in tensors.items()}
    others = {
        name
        for name in weights.keys() & expected
        if weights[name].shape != whole_shape(expected[name])
    }
    return (expected.keys() - weights) | (weights.keys() - _owners(reference)) | others


def _check_types(folder: Path, reference: PreTrainedModel, weights: Weights) -> None:
    for layer in streamed_layers(reference):
        for name, tensor in named_tensors(layer.host):
            saved = weights[layer.prefix + name].dtype
            if saved != tensor.dtype:
                raise ReferenceModelError(
                    f"{folder} holds the reference in {saved}, but this run computes it in "
                    f"{tensor.dtype}, so that its layers cannot be read from there as they are. "
                    "Set `dtype` to what it was, or `reference_on_disk: false`."
                )


def _owners(reference: PreTrainedModel) -> dict[str, tuple[nn.Module, str]]:
    """The module and the attribute of each tensor, by its name; also of buffers that are none."""
    roots = [("", cast(nn.Module, reference))]
    roots += [(layer.prefix, layer.host) for layer in streamed_layers(reference)]
    return {
        f"{prefix}{name}.{attribute}" if name else prefix + attribute: (module, attribute)
        for prefix, root in roots
        for name, module in root.named_modules()
        for attribute in [*module._parameters, *module._buffers]
    }


def _device(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return tensors[0].device if tensors else torch.device("cpu")


def _num_bytes(tensor: Tensor) -> int:
    return whole_shape(tensor).numel() * tensor.element_size()


def _check_disk(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ReferenceModelError(
            f"The reference takes {num_bytes / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB "
            "are free, so that a resume could not have it back. Make room, or set `output_dir` to "
            "a disk with that much, or `save_strategy: no`."
        )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)
