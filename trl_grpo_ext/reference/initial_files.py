"""The safetensors that a model was loaded from: where they hold its weights, nothing is written.

A link to each of them lies beside the files of a streamed reference (:mod:`.layer_files`), hard
where the file system allows it, so that the weights outlive the model's own folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.files import write_atomically
from trl_grpo_ext.reference.layer_stream import Weights

_INDEX = "initial.json"  # the links of a folder: names of their tensors that count, and hashes
_LINK = "initial-{:05d}.safetensors"


def initial_files(model: PreTrainedModel) -> list[Path]:
    """Return the safetensors on this machine that a model was loaded from; none without them."""
    whole, index = _cached(model, SAFE_WEIGHTS_NAME), _cached(model, SAFE_WEIGHTS_INDEX_NAME)
    if whole is not None:  # which is what transformers loads, if both are there
        return [whole]
    if index is None:
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):  # the model is not from there
        return []
    found = [_cached(model, name) for name in sorted(names)]
    return [path for path in found if path is not None]


def link_initial(model: PreTrainedModel, folder: Path, weights: Weights) -> set[str]:
    """Link the initial files of a model into a folder, instead of links that are there.

    Args:
        model: Loaded from them, perhaps changed since.
        folder: Where to.
        weights: Of the model, by their names.

    Returns:
        The names of the weights that the files hold, bit for bit.
    """
    links = {}
    for number, path in enumerate(initial_files(model)):
        if path.resolve().parent in folder.resolve().parents:
            continue  # the run's own folder, where pushes to the Hub write into the file itself
        same = {
            name: _hash(tensor)
            for name, tensor in _like(path, weights)
            if torch.equal(raw_bytes(tensor), raw_bytes(weights[name]))
        }
        link = _LINK.format(number)
        if same and _link(path, folder / link):
            links[link] = same
    if links:
        write_atomically(folder / _INDEX, json.dumps(links, indent=2))
    else:
        (folder / _INDEX).unlink(missing_ok=True)
    return {name for same in links.values() for name in same}


def map_initial(folder: Path, *, verify: bool = False) -> Weights:
    """Return the tensors that the links of a folder stand for, read when they are used.

    Args:
        folder: Without links it has none.
        verify: Whether to read them all, to see whether they are what was linked.

    Raises:
        ReferenceModelError: a file is gone, damaged, or has changed.
    """
    found: Weights = {}
    for link, hashes in _links(folder).items():
        path = folder / link
        weights = map_weights(path)
        changed = [
            name
            for name, digest in hashes.items()
            if name not in weights or (verify and _hash(weights[name]) != digest)
        ]
        if changed:
            where = f" ({path.resolve()})" if path.is_symlink() else ""
            raise ReferenceModelError(
                f"{path} is a link to one of the files that the model was loaded from{where}, "
                f"which is gone or has changed ({len(changed)} of {len(hashes)} tensors, the "
                f"first is {changed[0]}), so that the reference cannot be read from it. Put it "
                "back; or start anew from the initial model."
            )
        found |= {name: weights[name] for name in hashes}
    return found


def bytes_beside(model: PreTrainedModel, weights: Weights) -> int:
    """Return the bytes of weights that the initial files do not have, by name, type and shape."""
    there = {name for path in initial_files(model) for name, _ in _like(path, weights)}
    return sum(tensor.nbytes for name, tensor in weights.items() if name not in there)


def map_weights(path: Path) -> Weights:
    """Return the tensors of a file, read when they are used; none if there is no such file.

    Raises:
        ReferenceModelError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ReferenceModelError(
            f"{path} is damaged ({error}), so the reference cannot be read from it. "
            f"Delete the folder {path.parent}, and start again."
        ) from error


def raw_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, in host memory, shape ``(tensor.nbytes,)``."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def kinds_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Return types and shapes by name."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in weights.items()}


def _cached(model: PreTrainedModel, name: str) -> Path | None:
    """A file of the model's folder, or of the Hub's cache; nothing is downloaded."""
    source = str(model.name_or_path or "")
    if not source:
        return None
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        found = try_to_load_from_cache(
            source, name, revision=getattr(model.config, "_commit_hash", None)
        )
    except HFValidationError:  # neither a folder nor a name on the Hub
        return None
    return Path(found) if isinstance(found, str) else None


def _like(path: Path, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file that have name, type and shape of some of these weights."""
    wanted = kinds_of(weights)
    try:
        there = map_weights(path)
    except ReferenceModelError:  # damaged, so the model is not from there
        return
    for name, kind in kinds_of(there).items():
        if wanted.get(name) == kind:
            yield name, there[name]


def _links(folder: Path) -> dict[str, dict[str, str]]:
    """Of each link in a folder, the hashes of its tensors that count, by their names."""
    index = folder / _INDEX
    try:
        return cast(dict[str, dict[str, str]], json.loads(index.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ReferenceModelError(
            f"{index} is damaged ({error}), so the reference cannot be read from {folder}. "
            "Delete that folder, and start again."
        ) from error


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(cast(Any, raw_bytes(tensor).numpy())).hexdigest()


def _link(path: Path, link: Path) -> bool:
    """Link a file, instead of a link that is there; false where the file system has no links."""
    new = link.with_suffix(f".{os.getpid()}.partial")
    new.unlink(missing_ok=True)
    for make in (os.link, os.symlink):  # hard ones are not for another file system
        try:
            make(path.resolve(), new)
        except OSError:
            continue
        os.replace(new, link)
        new.unlink(missing_ok=True)  # which stays if both were the same file already
        return True
    return False
