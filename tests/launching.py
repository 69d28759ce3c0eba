"""Scripts in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def launch(script: str, folder: Path, *arguments: object, processes: int) -> Any:
    """Run the script in some processes; return what they saved to ``<second argument>.pt``."""
    path = folder / "script.py"
    path.write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", str(processes), str(path), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(f"{arguments[1]}.pt", weights_only=False)
