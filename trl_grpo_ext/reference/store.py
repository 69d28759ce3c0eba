"""The built reference beside the checkpoints, so that a resume neither calibrates nor guesses.

``output_dir/reference/<key>/`` holds the weights of one reference as they are stored, with a
manifest that says what it was made of. The key is a hash of the initial policy's weights and of the
settings; each checkpoint notes the key of the reference that its run has.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference.layer_files import (
    OUTSIDE_LAYERS,
    check_disk,
    map_weights,
    save_weights,
)
from trl_grpo_ext.reference.layer_stream import Weights, named_tensors, streamed_layers

NOTE = "reference.json"  # in a checkpoint: which reference its run has
_MANIFEST = "manifest.json"


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's weights: SHA-256 of names, types, shapes and bytes.

    Reads all weights once: about a second a gigabyte.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
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

    def save(self, key: str, reference: PreTrainedModel, manifest: Mapping[str, Any]) -> None:
        """Write a reference; it is there whole, with its manifest, or not at all.

        Raises:
            ReferenceModelError: the disk is too small.
        """
        folder = self.root / key
        folder.mkdir(parents=True, exist_ok=True)
        files = dict(_stored(reference))
        check_disk(folder, sum(t.nbytes for weights in files.values() for t in weights.values()))
        for stem, weights in files.items():
            save_weights(weights, folder / f"{stem}.safetensors")
        _write_json(folder / _MANIFEST, manifest)

    @torch.no_grad()
    def restore(self, key: str, reference: PreTrainedModel) -> None:
        """Put the saved weights into a reference of the same kind and settings, in place.

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
        for stem, _ in _stored(reference):
            replace_weights(reference, map_weights(folder / f"{stem}.safetensors"))
        for layer in streamed_layers(reference)[:1]:
            layer.stream.forget()

    def note(self, checkpoint: Path, key: str) -> None:
        """Write into a checkpoint which reference its run has."""
        _write_json(checkpoint / NOTE, {"reference": key})

    def noted(self, checkpoint: Path) -> str | None:
        """Return which reference the run of a checkpoint has; ``None`` if that is not noted."""
        try:
            return str(json.loads((checkpoint / NOTE).read_text(encoding="utf-8"))["reference"])
        except FileNotFoundError:
            return None

    def prune(self, output_dir: Path, *, keep: str) -> None:
        """Remove saved references that no checkpoint of the folder notes, but for ``keep``."""
        noted = {self.noted(note.parent) for note in output_dir.glob(f"checkpoint-*/{NOTE}")}
        for folder in self.root.iterdir():
            if folder.name not in {*noted, keep}:
                shutil.rmtree(folder, ignore_errors=True)


def _stored(reference: PreTrainedModel) -> Iterator[tuple[str, Weights]]:
    """The tensors of a reference by the stem of their file, and by name; tied ones once."""
    for layer in streamed_layers(reference):
        tensors = {layer.prefix + name: tensor for name, tensor in named_tensors(layer.host)}
        yield f"layer-{layer.index:05d}", tensors
    yield OUTSIDE_LAYERS, dict(named_tensors(reference))


def replace_weights(reference: PreTrainedModel, weights: Weights) -> None:
    """Give each tensor of the reference that ``weights`` names the value there.

    Raises:
        KeyError: the reference has no such tensor.
    """
    owners = _owners(reference)
    for name, value in weights.items():
        module, attribute = owners[name]
        held = getattr(module, attribute)
        if isinstance(held, nn.Parameter):
            held.data = value.to(held.device)
        else:  # low-rank factors may have another rank, or have been none
            module._buffers[attribute] = value.to(_device(module))


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


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)
