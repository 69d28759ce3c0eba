"""GRPO for TRL, extended: a drop-in ``GRPOTrainer`` and the pieces of it that also work alone.

The names below are the public ones. Each is imported when it is first used, so that
``import trl_grpo_ext`` loads neither torch nor trl.

Example:
    >>> import trl_grpo_ext
    >>> "ExtGRPOTrainer" in dir(trl_grpo_ext)
    True
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_grpo_ext.advantages import group_advantages
    from trl_grpo_ext.config import ExtGRPOConfig
    from trl_grpo_ext.errors import (
        ConfigurationError,
        ContractError,
        ExtGRPOError,
        ModelPreparationError,
        ReferenceModelError,
        RewardError,
        SharedPrefixError,
    )
    from trl_grpo_ext.functional import compute_rewards
    from trl_grpo_ext.losses import grpo_loss
    from trl_grpo_ext.reference import build_reference
    from trl_grpo_ext.sampling import group_sample
    from trl_grpo_ext.trainer import ExtGRPOTrainer

__all__ = [
    "ConfigurationError",
    "ContractError",
    "ExtGRPOConfig",
    "ExtGRPOError",
    "ExtGRPOTrainer",
    "ModelPreparationError",
    "ReferenceModelError",
    "RewardError",
    "SharedPrefixError",
    "build_reference",
    "compute_rewards",
    "group_advantages",
    "group_sample",
    "grpo_loss",
]

_MODULES = {
    "ConfigurationError": "errors",
    "ContractError": "errors",
    "ExtGRPOConfig": "config",
    "ExtGRPOError": "errors",
    "ExtGRPOTrainer": "trainer",
    "ModelPreparationError": "errors",
    "ReferenceModelError": "errors",
    "RewardError": "errors",
    "SharedPrefixError": "errors",
    "build_reference": "reference",
    "compute_rewards": "functional",
    "group_advantages": "advantages",
    "group_sample": "sampling",
    "grpo_loss": "losses",
}

try:
    __version__ = version("trl-grpo-ext")
except PackageNotFoundError:  # a checkout on sys.path that is not installed
    __version__ = "0+unknown"


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of these

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
