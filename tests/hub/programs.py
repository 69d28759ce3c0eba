"""Programs of the tests of the Hub, each in a process that knows the loopback server only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TOKEN = "hf_madeUpTokenOfTheTests0123456789"
_RUN = Path(__file__).parent / "run.py"


def environment(url: str, home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    hub = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    one = {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "warning"}
    return kept | hub | one | more


def train(
    url: str,
    model: Path,
    output_dir: Path,
    *,
    limit_s: float = 240,
    variables: dict[str, str] | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Train, and return what was printed; the process must end by itself."""
    words = [sys.executable, str(_RUN), str(model), str(output_dir), json.dumps(options)]
    env = environment(url, output_dir.parent / "home", **variables or {})
    return run_program(words, env, limit_s=limit_s)


def push(url: str, folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``trl-grpo-ext push``."""
    command = [sys.executable, "-m", "trl_grpo_ext.cli", "push", str(folder), *words]
    env = environment(url, folder.parent / "home", **variables)
    return run_program(command, {name: value for name, value in env.items() if value}, limit_s=120)


def run_program(
    words: list[str], env: dict[str, str], *, limit_s: float
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=env, capture_output=True, text=True, timeout=limit_s, check=False
    )
