"""The weights of a model as one safetensors file a layer, and one of all the rest.

Tensors have the names that they have in the model. What the model's initial files hold is linked
from there (:mod:`.initial_files`), and not in these. Files are memory-mapped: what is read lies in
the page cache, which all processes of a machine share and the kernel takes back when it must.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.layerwise import decoder_layers
from trl_grpo_ext.reference.initial_files import kinds_of, map_initial, map_weights, raw_bytes
from trl_grpo_ext.reference.layer_stream import Weights, named_tensors

OUTSIDE_LAYERS = "outside-layers"  # embeddings, last norm, head


def layers_by_prefix(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the decoder layers in order, each with what its tensors' names begin with.

    Raises:
        LayerOrderError: the model has no list of ``num_hidden_layers`` layers.
    """
    layers = decoder_layers(model)
    name = next(name for name, module in model.named_modules() if module is layers)
    return {f"{name}.{index}.": layer for index, layer in enumerate(layers)}


def weights_by_file(model: PreTrainedModel) -> dict[str, Weights]:
    """Return parameters and buffers by the stem of their file, and by name; tied ones once.

    Raises:
        LayerOrderError: the model has no list of ``num_hidden_layers`` layers.
        ReferenceModelError: a layer shares a tensor with another, or with the rest of the model.
    """
    prefixes = layers_by_prefix(model)
    files = {
        f"layer-{index:05d}": {prefix + name: tensor for name, tensor in named_tensors(layer)}
        for index, (prefix, layer) in enumerate(prefixes.items())
    }
    owner = {id(tensor): file for file, weights in files.items() for tensor in weights.values()}
    for name, tensor in _all_named_tensors(model):
        own = next((f for f, p in zip(files, prefixes, strict=True) if name.startswith(p)), None)
        if owner.get(id(tensor)) != own:
            raise ReferenceModelError(
                f"{type(model).__name__} shares {name} between a layer and another part of the "
                "model, so its layers cannot be kept apart. Use `reference: resident`."
            )
    rest = {name: tensor for name, tensor in named_tensors(model) if id(tensor) not in owner}
    return files | {OUTSIDE_LAYERS: rest}


def check_disk(folder: Path, num_bytes: int) -> None:
    """Refuse to write more than there is room for.

    Raises:
        ReferenceModelError: the disk of the folder has less room.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ReferenceModelError(
            f"The streamed reference writes {num_bytes / 1e9:.2f} GB of weights into {folder}, "
            f"where {free / 1e9:.2f} GB are free, so that it could not be read back whole. "
            "Use `reference: quantized`, or give it a folder on a disk with that much room."
        )


def save_weights(weights: Weights, path: Path) -> None:
    """Write tensors into a file, which is there whole or not at all."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in weights.items()}, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def map_model(folder: Path, model: PreTrainedModel) -> Weights:
    """Return the tensors of all files in a folder that :func:`weights_by_file` names.

    Raises:
        ReferenceModelError: a file is damaged, or not of a model like this one.
    """
    found: Weights = {}
    for path, weights, expected in _mapped(folder, model):
        kinds, wanted = kinds_of(weights), kinds_of(expected)
        if others := sorted(n for n in kinds | wanted if kinds.get(n) != wanted.get(n)):
            raise ReferenceModelError(
                f"{path} does not hold this policy: {len(others)} tensors are missing, too many, "
                f"or of another shape or type (the first is {others[0]}), so it cannot be read as "
                "its reference. Delete the folder, or give the reference another one."
            )
        found |= weights
    return found


def folder_holds(folder: Path, model: PreTrainedModel) -> bool:
    """Return whether the files in a folder are the weights of a model, bit for bit."""
    try:
        return all(
            kinds_of(weights) == kinds_of(expected)
            and all(torch.equal(raw_bytes(weights[n]), raw_bytes(expected[n])) for n in expected)
            for _, weights, expected in _mapped(folder, model)
        )
    except ReferenceModelError:  # damaged
        return False


def _mapped(folder: Path, model: PreTrainedModel) -> Iterator[tuple[Path, Weights, Weights]]:
    """Each file with its tensors, those that are linked too, and what they should be like."""
    linked = map_initial(folder)
    for stem, expected in weights_by_file(model).items():
        path = folder / f"{stem}.safetensors"
        initial = {name: linked[name] for name in expected if name in linked}
        yield path, initial | map_weights(path), expected


def _all_named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tied ones under each of their names."""
    return chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
