"""What of this machine a sandboxed program sees: Python without its packages, and nothing else."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_grpo_ext.rewards.code import inside
from trl_grpo_ext.rewards.code.inside.job import SCRATCH
from trl_grpo_ext.rewards.code.jail import SandboxError

INSIDE = Path(inside.__file__).parent

# -I: no environment variables, no user folder, no current folder; -S: no installed packages.
FLAGS = ("-I", "-S", "-X", "utf8")

# All that a program finds in its environment.
ENVIRONMENT = {"HOME": SCRATCH, "LANG": "C.UTF-8", "TMPDIR": SCRATCH}

# Loads what the standard library may load, and says from where.
_PROBE = r"""
import ctypes, importlib, json, os, sys

class Loaded(ctypes.Structure):
    _fields_ = [("address", ctypes.c_size_t), ("name", ctypes.c_char_p)]

for folder in list(sys.path):
    for file in os.listdir(folder) if folder.endswith("lib-dynload") else []:
        name = file.partition(".")[0]
        if not name.startswith(("_test", "_xxtest", "xx", "_tkinter")):
            try:
                importlib.import_module(name)
            except ImportError:
                pass
names = []
visitor = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Loaded), ctypes.c_size_t, ctypes.c_void_p)
@visitor
def visit(info, size, data):
    names.append(os.fsdecode(info.contents.name or b""))
    return 0
ctypes.CDLL(None).dl_iterate_phdr(visit, None)
print(json.dumps({"path": sys.path, "stdlib": os.path.dirname(os.__file__),
                  "libraries": [os.path.normpath(name) for name in names if "/" in name]}))
"""

# Read by the dynamic linker and by `zoneinfo`; `/dev/null` by the jail itself.
_OTHERS = ("/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/urandom")


@dataclass(frozen=True)
class Visible:
    """Files and folders of this machine, under the same names inside.

    Args:
        python: The interpreter.
        paths: What can be read.
        hidden: Folders below these that are empty inside: installed packages, among which may be
            solutions.
        packages: Folders to import from, as the user asked.
    """

    python: str
    paths: tuple[str, ...]
    hidden: tuple[str, ...]
    packages: tuple[str, ...] = ()


@functools.cache
def visible_files(packages: tuple[str, ...] = ()) -> Visible:
    """Return what Python needs to run, found by running it.

    Args:
        packages: Folders of packages that programs may import, such as a ``site-packages``.

    Raises:
        SandboxError: This Python cannot be run without its environment, or what it needs would not
            be seen.
    """
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    found = _probed(python)
    stdlib = [path for path in (found["stdlib"], *found["path"]) if os.path.isdir(path)]
    files = [python, *found["libraries"], *_OTHERS, *packages]
    outside = [path for path in files if not path.startswith(tuple(f"{top}/" for top in stdlib))]
    paths = [path for path in dict.fromkeys([*stdlib, *outside]) if os.path.exists(path)]
    tops = _outermost(paths)
    if covered := [path for path in tops if path.startswith(f"{SCRATCH}/")]:
        raise SandboxError(f"{covered[0]} lies below {SCRATCH}, which programs have for themselves")
    installed = (f"{top}/{name}" for top in tops for name in ("site-packages", "dist-packages"))
    hidden = tuple(path for path in installed if os.path.isdir(path))
    return Visible(python, tuple(tops), hidden, packages)


def boot_command(python: str, *, folder: str, packages: Sequence[str], call: str) -> list[str]:
    """Return the command of a Python that imports nothing of this package but ``code.inside``.

    Args:
        python: The interpreter.
        folder: Where the modules of ``inside`` lie.
        packages: Folders to import from, beside the standard library.
        call: ``module.function(arguments)``, of a module of ``inside``.
    """
    module = call.partition(".")[0]
    code = (
        f"import sys; sys.path += {list(packages)!r}\n"
        f"name = ''\n"
        f"for part in {inside.__name__!r}.split('.'):\n"
        f"    name += '.' * bool(name) + part\n"
        f"    sys.modules[name] = type(sys)(name)\n"
        f"    sys.modules[name].__path__ = []\n"
        f"sys.modules[name].__path__ = [{folder!r}]\n"
        f"from {inside.__name__} import {module}\n"
        f"{call}"
    )
    return [python, *FLAGS, "-c", code]


def _probed(python: str) -> dict[str, Any]:
    ran = subprocess.run(
        [python, *FLAGS, "-c", _PROBE], capture_output=True, text=True, env={}, check=False
    )
    if ran.returncode:
        reason = ran.stderr.strip().rpartition("\n")[2]
        raise SandboxError(f"{python} does not run without its environment ({reason})")
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def _outermost(paths: Sequence[str]) -> list[str]:
    """Return the paths that lie in none of the others."""
    return [path for path in paths if not any(path.startswith(f"{top}/") for top in paths)]
