"""Stages as programs: one a process of the launcher, which find each other as they would alone.

A stage that trains leaves nothing behind in memory, and can be run by itself with its
``stage.yaml``. The processes that `accelerate launch` started stay, and each starts its own part of
every stage. What they agree on, stage by stage, is a port where the parts meet: the launcher's own
is taken by the launcher.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from transformers.trainer_utils import get_last_checkpoint

from trl_grpo_ext.checkpointing import LAST_GOOD
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.pipeline.stages import SETTINGS_FILE, Stage

_PATIENCE = timedelta(days=30)  # that a process waits for the first one to say what comes next
_SKIP = b"skip"
_PR_SET_PDEATHSIG = 1
_SHARDING = ("FSDP_", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED")
TRAINING = ("sft", "grpo")  # recipes that train, and go on from checkpoints


class Peers:
    """The processes that were launched together, before any of them trains.

    Attributes:
        rank: Of this one.
        num_processes: How many there are.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.num_processes = int(os.environ.get("WORLD_SIZE", "1"))
        self._store = self._joined() if self.num_processes > 1 else None

    @property
    def is_first(self) -> bool:
        """Whether this process decides."""
        return self.rank == 0

    def _joined(self) -> Any:
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        return dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            self.num_processes,
            is_master=not hosted and self.is_first,
            timeout=_PATIENCE,
        )

    def agreed_port(self, what: str, *, needed: bool) -> int | None:
        """Return where the parts of a program meet, as the first process says; None to skip it.

        Args:
            what: Is next; asked for once.
            needed: Whether it is to run; what the first process says counts.
        """
        if self._store is None:
            return 0 if needed else None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        key = f"r1/{attempt}/{what}"
        if self.is_first:
            self._store.set(key, str(_free_port()) if needed else _SKIP.decode())
        said = self._store.get(key)
        return None if said == _SKIP else int(said)


def check_stage(stage: Stage, recipes: Path, *, port: int) -> str:
    """Return what the dry run of a stage prints; outputs of earlier stages may be missing.

    Every process runs its part, so that what depends on their number is judged as it will be.

    Args:
        stage: To be checked.
        recipes: The folder of the programs.
        port: Where the parts meet; 0 for one process.

    Raises:
        ConfigurationError: The recipe refuses the settings.
    """
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "stage.yaml"
        config.write_text(stage.to_yaml(checkable=True), encoding="utf-8")
        ran = subprocess.run(
            [*_command(stage, recipes, config), "--dry_run"],
            env=_environment(stage, port),
            capture_output=True,
            text=True,
            check=False,
        )
    if ran.returncode and int(os.environ.get("RANK", "0")):
        sys.exit(1)  # the first process says why
    if ran.returncode:
        raise ConfigurationError([_refused(stage, ran.stderr)])
    return ran.stdout


def run_stage(stage: Stage, recipes: Path, *, port: int) -> int:
    """Run this process's part of a stage; return the exit code.

    SIGTERM and Ctrl-C are passed on, and the part ends when this process does.

    Args:
        stage: Its ``stage.yaml`` is there.
        recipes: The folder of the programs.
        port: Where the parts meet; 0 for one process.
    """
    environment = _environment(stage, port)
    command = [*_command(stage, recipes, stage.folder / SETTINGS_FILE), *_resuming(stage)]
    part = subprocess.Popen(command, env=environment, process_group=0, preexec_fn=_end_with_parent)

    def pass_on(number: int, _: FrameType | None) -> None:
        part.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = part.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _environment(stage: Stage, port: int) -> dict[str, str]:
    """Return the environment of a part; what does not train holds whole models, unsharded."""
    environment = dict(os.environ)
    if port:
        environment |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": str(False)}
    if stage.recipe in TRAINING:
        return environment
    return {key: value for key, value in environment.items() if not key.startswith(_SHARDING)}


def _command(stage: Stage, recipes: Path, config: Path) -> list[str]:
    return [sys.executable, str(recipes / f"{stage.recipe}.py"), "--config", str(config)]


def _resuming(stage: Stage) -> Sequence[str]:
    """Return what makes a training recipe go on from the checkpoints that it left."""
    if stage.recipe not in TRAINING or get_last_checkpoint(str(stage.folder)) is None:
        return []
    return ["--resume_from_checkpoint", LAST_GOOD]


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def _refused(stage: Stage, said: str) -> str:
    return (
        f"the stage {stage.name} cannot run with these settings, so nothing was started. "
        f"recipes/{stage.recipe}.py says:\n{said.strip()}"
    )
