"""The exceptions of the package: each also is the standard exception that it stands for."""

from __future__ import annotations

from collections.abc import Sequence


class ExtGRPOError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigurationError(ExtGRPOError, ValueError):
    """Settings that cannot work, all of them at once.

    Args:
        problems: One message a problem: what was found, why it matters, what to do.

    Example:
        >>> error = ConfigurationError(["`beta` is negative.", "`top_p` is above 1."])
        >>> error.problems
        ['`beta` is negative.', '`top_p` is above 1.']
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(_enumerated(self.problems))


class RewardError(ExtGRPOError, ValueError):
    """A reward function returned something else than one number or ``None`` a completion."""


class RewardRefusedError(RewardError):
    """A service refuses what a reward asks, so that asking again would not help."""


class RewardOutageError(RewardError):
    """Too much of a batch has no score, so that it cannot be trained on."""


class ContractError(ExtGRPOError, ImportError):
    """The installed TRL changed a member that this package relies on."""


class ModelPreparationError(ExtGRPOError, RuntimeError):
    """A model could not be fetched or converted into the cache folder."""


class ReferenceModelError(ExtGRPOError, ValueError):
    """A reference model of the requested kind cannot be built for this policy."""


class CheckpointError(ExtGRPOError, OSError):
    """A checkpoint could not be written, or cannot be resumed from."""


class HubError(ExtGRPOError, OSError):
    """Something could not be uploaded to the Hub."""


class LayerOrderError(ExtGRPOError, ValueError):
    """A model does not run its decoder layers once each, in order."""


class SharedPrefixError(ExtGRPOError, ValueError):
    """The model cannot compute a shared prefix exactly."""


def _enumerated(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems, start=1)]
    return f"{len(problems)} problems with this run:\n" + "\n".join(lines)
