"""The streamed reference: exact weights in host memory or on disk, two layers on the device."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference.frozen import check_policy, frozen_copy
from trl_grpo_ext.reference.initial_files import bytes_beside, link_initial, map_weights
from trl_grpo_ext.reference.layer_files import (
    OUTSIDE_LAYERS,
    check_disk,
    folder_holds,
    layers_by_prefix,
    map_model,
    save_weights,
    weights_by_file,
)
from trl_grpo_ext.reference.layer_stream import (
    LayerStream,
    StreamedLayer,
    Weights,
    host_pages,
    memory_bytes,
    named_tensors,
    streamed_layers,
    views_of,
)
from trl_grpo_ext.reference.whole import aligned, split_again

_MIXED_FOLDER = "mixed-"  # within that of a reference: what its files were mixed to
_FOLDER = "_streamed_from"  # attribute of a reference that lies in files: their folder
_MIXED = "_streamed_mixed"  # attribute of one that was mixed: removes the files of that


def build_streamed_reference(
    policy: PreTrainedModel, *, folder: Path | None = None, pin: bool | None = None
) -> PreTrainedModel:
    """Return a frozen copy of the policy whose decoder layers come to the device when they run.

    What is outside the layers lies on the policy's device. The device gets no copy of the layers
    but two slots, each as large as the largest layer, with the first forward pass. Outputs are bit
    for bit those of a whole copy on the device. The policy is not changed.

    Args:
        policy: A causal language model, not a PEFT model.
        folder: Where to keep the weights, to read them from there instead of from host memory:
            written, or linked from the safetensors that the policy was loaded from. Files that hold
            exactly these weights already are used as they are.
        pin: Whether host memory is page-locked, so that copies to a GPU overlap with its work; if
            ``None``, where there is CUDA. Files are not.

    Returns:
        A model of the policy's class. ``parameters`` and ``state_dict`` leave the layers out, and
        what transformers records within them is missing: it has no ``hidden_states``, and no
        auxiliary loss.

    Raises:
        ReferenceModelError: host memory or disk are too small, or the policy cannot be copied.
        LayerOrderError: the model has no list of ``num_hidden_layers`` layers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=16,
        ...     hidden_size=8,
        ...     intermediate_size=16,
        ...     num_hidden_layers=3,
        ...     num_attention_heads=2,
        ... )
        >>> policy = LlamaForCausalLM(config).eval()
        >>> reference = build_streamed_reference(policy)
        >>> ids = torch.arange(8)[None]
        >>> torch.equal(reference(ids).logits, policy(ids).logits)
        True
        >>> policy.num_parameters(), reference.num_parameters()
        (2232, 264)
    """
    check_policy(policy)
    if folder is None:
        return _in_host_memory(policy, pin=torch.cuda.is_available() if pin is None else pin)
    if not folder_holds(folder, policy):
        save_streamed(policy, folder)
    return open_streamed(policy, folder)


def save_streamed(policy: PreTrainedModel, folder: Path) -> None:
    """Write the policy's weights into a folder, for :func:`open_streamed`.

    One safetensors file a layer, and one of all the rest; tensors have the names that they have in
    the policy, buffers included. What the safetensors that the policy was loaded from hold, bit for
    bit, is linked from there instead. Files of the same names are replaced.

    Raises:
        ReferenceModelError: the disk is too small, or the policy cannot be copied.
    """
    check_policy(policy)
    files = weights_by_file(policy)
    folder.mkdir(parents=True, exist_ok=True)
    linked = link_initial(policy, folder, {n: t for of in files.values() for n, t in of.items()})
    rest = {
        folder / f"{stem}.safetensors": {n: t for n, t in weights.items() if n not in linked}
        for stem, weights in files.items()
    }
    check_disk(folder, sum(memory_bytes(weights) for weights in rest.values()))
    for path, weights in rest.items():
        if weights:
            save_weights(weights, path)
        else:
            path.unlink(missing_ok=True)


def disk_bytes(policy: PreTrainedModel) -> int:
    """Return the bytes that :func:`save_streamed` writes, if initial files still hold the rest."""
    files = weights_by_file(policy)
    return bytes_beside(policy, {n: t for of in files.values() for n, t in of.items()})


def remove_mixed(folder: Path) -> None:
    """Remove what runs that were killed have left of mixing a reference of this folder."""
    for left in folder.glob(f"{_MIXED_FOLDER}*"):
        shutil.rmtree(left, ignore_errors=True)


def open_streamed(policy: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return the reference whose weights :func:`save_streamed` wrote into a folder.

    Args:
        policy: A model like the one that was saved: structure and device count, weights do not.
        folder: Its files are memory-mapped for as long as the reference lives, and never changed;
            so are those that it links to.

    Raises:
        ReferenceModelError: the folder holds no such model, or the policy cannot be copied.
    """
    check_policy(policy)
    weights = map_model(folder, policy)
    reference = _streamed_copy(policy, weights)
    with torch.no_grad():
        for name, tensor in named_tensors(reference):
            tensor.copy_(weights[name])
    vars(reference)[_FOLDER] = folder
    return reference


def describe_streamed(reference: PreTrainedModel) -> str:
    """Return in words what a streamed reference takes, and where."""
    stream = streamed_layers(reference)[0].stream
    outside = sum(tensor.nbytes for _, tensor in named_tensors(reference))
    place = "files" if _FOLDER in vars(reference) else "host memory"
    return (
        f"{stream.host_bytes / 1e6:.0f} MB of layers in {place}, "
        f"{(outside + stream.slot_bytes) / 1e6:.0f} MB on the device"
    )


@torch.no_grad()
def mix_streamed(reference: PreTrainedModel, policy: PreTrainedModel, *, alpha: float) -> None:
    r"""Move a streamed reference towards the policy, as ``sync_ref_model`` does.

    .. math:: \theta_{ref} \leftarrow (1 - \alpha) \theta_{ref} + \alpha \theta

    on the policy's device, tensor by tensor, so that the bits are those of a whole copy there. A
    reference from files leaves them as they are: what is mixed goes into a folder within theirs,
    which is removed with the reference.

    Args:
        reference: From this module.
        policy: What it is a copy of, not wrapped.
        alpha: TRL's ``ref_model_mixup_alpha``, between 0 and 1.

    Raises:
        ReferenceModelError: the disk is too small for the files; the reference is what it was.
    """
    layers = streamed_layers(reference)
    live = dict(policy.named_parameters(remove_duplicate=False))
    split_again(reference)
    layers[0].stream.forget()
    if _FOLDER in vars(reference):
        _mix_files(reference, live, alpha)
    else:
        for layer in layers:
            _mix(dict(layer.host.named_parameters(layer.prefix[:-1])), live, alpha)
    _mix(dict(reference.named_parameters()), live, alpha)


def _in_host_memory(policy: PreTrainedModel, *, pin: bool) -> PreTrainedModel:
    files = weights_by_file(policy)
    del files[OUTSIDE_LAYERS]
    _check_host_memory(sum(memory_bytes(weights) for weights in files.values()))
    copies: Weights = {}
    memories = []
    for weights in files.values():
        memories.append(host_pages(memory_bytes(weights)))
        views = views_of(memories[-1], weights)
        for name, tensor in weights.items():
            views[name].copy_(tensor.detach())
        copies |= views
    reference = _streamed_copy(policy, copies)
    if pin:
        streamed_layers(reference)[0].stream.pin(memories)
    return reference


def _streamed_copy(policy: PreTrainedModel, weights: Weights) -> PreTrainedModel:
    """A copy of the policy whose layers hold these weights, by name, without copying them."""
    # `deepcopy` takes what its memo holds for an object instead of copying it. One memo, so that
    # the layers share their configuration with the model.
    memo: dict[int, Any] = {}
    layers = layers_by_prefix(policy)
    hosts = [_host_layer(layer, prefix, weights, memo) for prefix, layer in layers.items()]
    stream = LayerStream(hosts)
    for index, (prefix, layer) in enumerate(layers.items()):
        memo[id(layer)] = StreamedLayer(hosts[index], stream, index=index, prefix=prefix)
    reference = frozen_copy(policy, memo)
    for config in (reference.config, reference.config.get_text_config()):
        if getattr(config, "output_router_logits", False):  # of layers that hooks do not reach
            config.output_router_logits = False
    return reference


def _host_layer(layer: nn.Module, prefix: str, weights: Weights, memo: dict[int, Any]) -> nn.Module:
    for name, tensor in named_tensors(layer):
        held = weights[prefix + name]
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(held, requires_grad=False) if parameter else held
    host: nn.Module = copy.deepcopy(layer, memo)
    return host.eval()


def _mix(parameters: Mapping[str, Tensor], live: Mapping[str, Tensor], alpha: float) -> None:
    for name, parameter in parameters.items():
        own, part = aligned(parameter, live[name])
        own.copy_(_mixed(own, part, alpha))


def _mixed(parameter: Tensor, live: Tensor, alpha: float) -> Tensor:
    return parameter.to(live.device, copy=True).mul_(1.0 - alpha).add_(live, alpha=alpha)


def _mix_files(reference: PreTrainedModel, live: Mapping[str, Tensor], alpha: float) -> None:
    layers = streamed_layers(reference)
    initial: Path = vars(reference)[_FOLDER]
    writers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each has files of its own
    check_disk(initial, writers * layers[0].stream.host_bytes)
    folder = Path(tempfile.mkdtemp(prefix=_MIXED_FOLDER, dir=initial))
    remove = weakref.finalize(reference, shutil.rmtree, folder, ignore_errors=True)
    by_file = {
        folder / f"{layer.index}.safetensors": dict(layer.host.named_parameters(layer.prefix[:-1]))
        for layer in layers
    }
    try:
        for path, weights in by_file.items():
            save_weights({n: _mixed(t, live[n], alpha) for n, t in weights.items()}, path)
    except BaseException:
        remove()
        raise
    for path, weights in by_file.items():
        for name, tensor in map_weights(path).items():
            weights[name].data = tensor
    if _MIXED in vars(reference):
        vars(reference)[_MIXED]()
    vars(reference)[_MIXED] = remove


def _check_host_memory(num_bytes: int) -> None:
    from trl_grpo_ext.memory import available_host_bytes

    # The main process builds first; those beside it take as much each, all at once.
    is_first = os.environ.get("RANK", "0") == "0"
    num_copies = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_first else 1
    free = available_host_bytes() // num_copies
    if num_bytes > free:
        raise ReferenceModelError(
            f"The streamed reference keeps {num_bytes / 1e9:.2f} GB of layers in host memory, "
            f"where {free / 1e9:.2f} GB are free for it, so that the system would end the run. Use "
            "`reference: quantized`, or give the reference a folder on a disk with that much room."
        )
