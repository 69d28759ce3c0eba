"""What runs in a worker process; started as a script by ``worker_process.py``.

It is given the file of a module and the bytes of address space. The module's ``prepare`` does what
takes a while, such as imports; its ``verdict`` is called with each job. A job is a line of JSON,
``[argument, ..., seconds]``, and so is the verdict. Neither this script nor the module imports
anything of this package, so that the process starts without torch.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType


def main() -> None:
    """Limit the memory, say that the module is ready, and answer until the input ends."""
    path, memory_bytes = sys.argv[1:]
    _limit_memory(int(memory_bytes))
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    replies, sys.stdout = sys.stdout, sys.stderr
    module = _loaded(path)
    module.prepare()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        *job, seconds = json.loads(line)
        _end_after(seconds + 1)  # also if the trainer, which ends this process, is gone
        print(json.dumps(module.verdict(*job)), file=replies, flush=True)
        _end_after(0)


def _loaded(path: str) -> ModuleType:
    spec = spec_from_file_location("work", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _limit_memory(memory_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_after(seconds: float) -> None:
    """Have the kernel end this process after that time; 0 calls it off."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    main()
