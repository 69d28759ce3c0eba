"""What this machine can run: versions, devices, and each feature with the reason why or why not."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

PACKAGES = (
    "trl-grpo-ext",
    "torch",
    "trl",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "reasoning-gym",
    "gguf",
    "vllm",
    "deepspeed",
)
QUICKSTART_MODULES = ("reasoning_gym", "gguf")
NF4_MAX_ERROR = 0.16  # half the widest gap between two NF4 levels is 0.152 of the block's largest


@dataclass(frozen=True)
class Device:
    """A processor that torch can use.

    Attributes:
        name: ``"cpu"`` or ``"cuda:0"``, as torch calls it.
        description: The model, and its cores, or its memory and compute capability.
        bf16: Whether it computes in bfloat16 itself; ``None`` if torch cannot tell.
    """

    name: str
    description: str
    bf16: bool | None


@dataclass(frozen=True)
class Feature:
    """Something that this package can do, and whether it can do it here.

    Attributes:
        name: What the user calls it.
        usable: Whether it works on this machine.
        detail: Why, or why not and what to do.
    """

    name: str
    usable: bool
    detail: str


@dataclass(frozen=True)
class Environment:
    """This machine, as far as training is concerned.

    Attributes:
        versions: Installed version of Python and of each package of interest; ``None`` if absent.
        devices: The CPU first, then each CUDA device.
        features: The trainer first: without it nothing else helps.
    """

    versions: dict[str, str | None]
    devices: list[Device]
    features: list[Feature]

    @property
    def trainer_usable(self) -> bool:
        """Whether ``ExtGRPOTrainer`` works with the installed TRL."""
        return self.features[0].usable


def inspect_environment() -> Environment:
    """Return what is installed here, on which devices, and what of it works.

    Nothing is downloaded and no secret is read out: of ``HF_TOKEN`` only whether there is one.

    Example:
        >>> inspect_environment().devices[0].name
        'cpu'
    """
    return Environment(
        versions={
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        devices=[_cpu(), *(_cuda(index) for index in range(torch.cuda.device_count()))],
        features=[_probed(name, probe) for name, probe in _PROBES.items()],
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> Device:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capabilities = _cpu_capabilities()
    model = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    bf16 = any("bf16" in name and present for name, present in capabilities.items())
    return Device("cpu", f"{model}, {cores} cores", bf16 if capabilities else None)


def _cpu_capabilities() -> dict[str, object]:
    read = getattr(torch.cpu, "get_capabilities", None)  # older versions of torch lack it
    return dict(read()) if read else {}


def _cuda(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    memory = f"{properties.total_memory / 2**30:.1f} GiB"
    capability = f"compute capability {properties.major}.{properties.minor}"
    return Device(
        f"cuda:{index}", f"{properties.name}, {memory}, {capability}", properties.major >= 8
    )


def _probed(name: str, probe: Callable[[], str]) -> Feature:
    """Run a probe: what it returns says why the feature works, what it raises why not."""
    try:
        return Feature(name, True, probe())
    except Exception as error:  # noqa: BLE001 - a broken dependency fails in any way; we report it
        return Feature(name, False, str(error) or type(error).__name__)


def _trainer() -> str:
    from trl_grpo_ext._trl.contract import contract_problems, is_tested_version

    if problems := contract_problems():
        raise RuntimeError(
            f"trl {_version('trl')} changed what this package relies on: {'; '.join(problems)}. "
            "Install 'trl>=1.16,<1.17'."
        )
    importlib.import_module("trl_grpo_ext.trainer")
    tested = "the tested version" if is_tested_version() else "untested, but with all that we need"
    return f"trl {_version('trl')}, {tested}"


def _quantized_reference() -> str:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.linspace(-1, 1, 64, device=device).repeat(64, 1)  # each row is one block
    packed, state = quantize_4bit(weight, quant_type="nf4")
    error = (dequantize_4bit(packed, state) - weight).abs().max().item()
    if not error < NF4_MAX_ERROR:
        raise RuntimeError(
            f"bitsandbytes on {device} gives NF4 weights back with an error of {error:.2f}, so a "
            "reference would be wrong. Reinstall bitsandbytes, or set `reference: resident`."
        )
    return f"NF4 on {device}"


def _quickstart() -> str:
    if missing := [name for name in QUICKSTART_MODULES if find_spec(name) is None]:
        raise RuntimeError(
            f"{' and '.join(missing)} not installed. Run pip install reasoning-gym gguf."
        )
    return "task and model format can be read"


def _hub() -> str:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise RuntimeError("HF_HUB_OFFLINE is set. Unset it to push.")
    if get_token() is None:
        raise RuntimeError("no token. Run `hf auth login`, or set HF_TOKEN.")
    return "a token is set (not checked with the Hub)"


def _vllm() -> str:
    _need_cuda()
    _need_package("vllm")
    return "for `use_vllm: true`"


def _deepspeed() -> str:
    _need_cuda()
    _need_package("deepspeed")
    return "for the ZeRO configuration of accelerate"


def _flex_attention() -> str:
    _need_cuda()
    _need_package("triton")
    return "compiled"


def _need_cuda() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device.")


def _need_package(name: str) -> None:
    if find_spec(name) is None:
        raise RuntimeError(f"{name} is not installed. Run pip install {name}.")


_PROBES: dict[str, Callable[[], str]] = {
    "trainer": _trainer,
    "4-bit reference": _quantized_reference,
    "quickstart": _quickstart,
    "push to Hub": _hub,
    "vLLM": _vllm,
    "DeepSpeed": _deepspeed,
    "FlexAttention": _flex_attention,
}
