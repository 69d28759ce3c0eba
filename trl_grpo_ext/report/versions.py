"""What a run stands on: the versions of its libraries, and the device."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

PACKAGES = (
    "trl_grpo_ext",
    "torch",
    "trl",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
)


def library_versions() -> dict[str, str]:
    """Return the versions of python and of the libraries a run stands on, and the device's name."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {**versions, "device": _device_name()}


def _device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name(0)} (one of {torch.cuda.device_count()})"
    if torch.backends.mps.is_available():
        return "Apple GPU (MPS)"
    return f"CPU: {_cpu_name()} ({os.cpu_count()} cores)"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1) if found else platform.processor() or platform.machine()
