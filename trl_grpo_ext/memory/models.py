"""The configuration of a model by name: from a folder, from those we know, or from the Hub."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trl_grpo_ext.errors import ModelPreparationError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Words of a name that say how a model was trained, or who names it, not how large it is.
_IGNORED = {"base", "chat", "hf", "instruct", "it", "meta"}


@dataclass(frozen=True)
class KnownModel:
    """A well-known model.

    Attributes:
        name: On the Hub.
        aliases: Other names of models of the same shape.
        released: Year and month.
        parameters: As published.
        config: Fields of its configuration, ``model_type`` among them.
    """

    name: str
    aliases: tuple[str, ...]
    released: str
    parameters: int
    config: dict[str, Any]


@functools.cache
def known_models() -> tuple[KnownModel, ...]:
    """Return the models that a plan needs no network for.

    Example:
        >>> [model.name for model in known_models() if "70B" in model.name]
        ['meta-llama/Meta-Llama-3-70B']
    """
    text = (files("trl_grpo_ext.memory") / "models.yaml").read_text(encoding="utf-8")
    return tuple(
        KnownModel(name, aliases=tuple(fields.pop("aliases", ())), **fields)
        for name, fields in yaml.safe_load(text).items()
    )


def find_known(name: str) -> KnownModel | None:
    """Return the model of this name; the owner, and ``-Instruct`` and its like, do not matter.

    Example:
        >>> find_known("meta-llama/Llama-3.3-70B-Instruct").parameters
        70553706496
        >>> find_known("Qwen2.5-8B") is None
        True
    """
    return _by_key().get(_key(name))


def planned_config(name_or_path: str) -> PreTrainedConfig:
    """Return the configuration of a model; its weights are neither read nor fetched.

    Args:
        name_or_path: A folder, a ``config.json``, the name of a known model, or owner/name on the
            Hub. The Hub is not asked for a name without an owner.

    Raises:
        ModelPreparationError: there is no such model, or its configuration cannot be read.
    """
    from transformers import AutoConfig

    path = Path(name_or_path).expanduser()
    known = None if path.exists() else find_known(name_or_path)
    if known is not None:
        config: PreTrainedConfig = AutoConfig.for_model(**known.config)
        return config
    if not path.exists() and "/" not in name_or_path:
        raise ModelPreparationError(_not_found(name_or_path, "no owner, so it is not on the Hub"))
    try:
        config = AutoConfig.from_pretrained(path if path.exists() else name_or_path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        why = f"no configuration: {type(error).__name__}: {reason}"
        raise ModelPreparationError(_not_found(name_or_path, why)) from error
    return config


def hub_name(name_or_path: str) -> str:
    """Return the name with its owner, if it is that of a known model; else as it is.

    A configuration's file stands for its folder.

    Example:
        >>> hub_name("Llama-3-70B"), hub_name("Llama-3-70B-Instruct")
        ('meta-llama/Meta-Llama-3-70B', 'Llama-3-70B-Instruct')
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return str(path.parent)
    known = find_known(name_or_path)
    if known is None or "/" in name_or_path:
        return name_or_path
    plain = known.name.rpartition("/")[2].lower().removeprefix("meta-")
    return known.name if name_or_path.lower().removeprefix("meta-") == plain else name_or_path


def num_parameters(name_or_size: str) -> int:
    """Return the parameters of a model by its name, or of a size such as ``7B`` or ``350M``.

    Raises:
        ModelPreparationError: it is neither.

    Example:
        >>> num_parameters("7B"), num_parameters("Qwen2.5-7B")
        (7000000000, 7615616512)
    """
    from trl_grpo_ext.memory.shape import model_shape

    if size := re.fullmatch(r"(\d+(?:\.\d+)?)([BM])", name_or_size, re.IGNORECASE):
        return round(float(size[1]) * _UNITS[size[2].upper()])
    return model_shape(planned_config(name_or_size)).num_parameters


def nominal_parameters(name: str, *, counted: int) -> int:
    """Return the round number that a name says, where it is within a tenth of the count.

    Example:
        >>> nominal_parameters("Llama-3-70B", counted=70_553_706_496)
        70000000000
        >>> nominal_parameters("Mixtral-8x7B", counted=46_702_792_704)
        46702792704
    """
    for size, unit in re.findall(r"(\d+(?:\.\d+)?)([BM])\b", name, re.IGNORECASE):
        nominal = round(float(size) * _UNITS[unit.upper()])
        if abs(nominal - counted) < counted / 10:
            return nominal
    return counted


_UNITS = {"B": 10**9, "M": 10**6}


@functools.cache
def _by_key() -> dict[str, KnownModel]:
    return {_key(name): model for model in known_models() for name in (model.name, *model.aliases)}


def _key(name: str) -> str:
    words = name.rstrip("/").rpartition("/")[2].lower().split("-")
    return "-".join(word for word in words if word not in _IGNORED)


def _names() -> Iterator[str]:
    for model in known_models():
        yield model.name.rpartition("/")[2]
        yield from model.aliases


def _not_found(name: str, why: str) -> str:
    names = {_key(known): known for known in _names()}
    near = difflib.get_close_matches(_key(name), names, n=4, cutoff=0.5)
    meant = f"Did you mean {', '.join(names[key] for key in near)}? " if near else ""
    return (
        f"`model`={name!r} is none of the {len(known_models())} models that are built in, and no "
        f"folder or file with a configuration ({why}), so there is nothing to plan for. {meant}"
        "Or give a folder with a config.json, or owner/name where the Hub can be reached."
    )
