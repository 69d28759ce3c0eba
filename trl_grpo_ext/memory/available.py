"""The memory that is free on this machine."""

from __future__ import annotations

from pathlib import Path

import torch


def available_memory_bytes() -> int:
    """Return the free bytes of the current CUDA device, or of the host when there is none.

    What torch's allocator keeps there and does not use is free for this process. A limit that a
    container sets on the host's memory (cgroup v2) is honoured.
    """
    if torch.cuda.is_available():
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept
    return available_host_bytes()


def available_host_bytes() -> int:
    """Return the free bytes of the host, within the limit of the container (cgroup v2) if any."""
    import psutil

    host = int(psutil.virtual_memory().available)
    cgroup = _cgroup_available_bytes(Path("/sys/fs/cgroup"))
    return host if cgroup is None else min(host, cgroup)


def _cgroup_available_bytes(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    # File cache counts as used, but the kernel gives it back on demand.
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
