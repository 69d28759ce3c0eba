"""The options that keep a run learning: dynamic sampling, clipping, steps that are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from trl_grpo_ext.errors import ExtGRPOError

DEFAULT_MAX_ROUNDS = 8


class NonFiniteGradientError(ExtGRPOError, FloatingPointError):
    """The gradient was not finite for as many steps in a row as ``max_skipped_steps`` allows."""


@dataclass
class RobustnessOptions:
    """What a run does about batches that teach nothing, or too much."""

    dynamic_sampling: bool = field(
        default=False,
        metadata={
            "help": "Whether groups whose rewards are all equal are replaced by groups of further "
            "prompts, until the batch is full of groups that teach something (DAPO)."
        },
    )
    dynamic_sampling_max_rounds: int = field(
        default=DEFAULT_MAX_ROUNDS,
        metadata={
            "help": "Most rounds of generation for one batch under dynamic_sampling, the first "
            "included; silent groups that are left then stay in the batch."
        },
    )
    advantage_clip: float | None = field(
        default=None,
        metadata={
            "help": "Largest size of an advantage, after normalization; beyond it, it is cut to "
            "that; none if not set. Normalized by its own group of G, no advantage exceeds "
            "(G - 1) / sqrt(G), which is 2.5 for 8 and 7.9 for 64: only a limit below that cuts."
        },
    )
    max_skipped_steps: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps in a row that may be skipped because the gradient is not "
            "finite, until the run ends with an error; a single one only warns, unless this is 1."
        },
    )


def robustness_problems(options: RobustnessOptions) -> Iterator[str]:
    """Yield what cannot work in these options.

    Example:
        >>> next(robustness_problems(RobustnessOptions(max_skipped_steps=0)))
        '`max_skipped_steps` is 0, so no step could fail. Use at least 1; 10 is usual.'
    """
    rounds, clip = options.dynamic_sampling_max_rounds, options.advantage_clip
    if rounds < 2:
        yield (
            f"`dynamic_sampling_max_rounds` is {rounds}, and the first round is the batch itself, "
            "so no further prompt would be drawn. Use at least 2, or `dynamic_sampling: false`."
        )
    elif rounds != DEFAULT_MAX_ROUNDS and not options.dynamic_sampling:
        yield (
            f"`dynamic_sampling_max_rounds` is {rounds}, but `dynamic_sampling` is false, which "
            "draws no further rounds. Set `dynamic_sampling: true`, or remove what is set."
        )
    if clip is not None and not clip > 0:
        yield (
            f"`advantage_clip` is {clip}, which would leave no advantage. Use a positive number "
            "below (G - 1) / sqrt(G), the largest of a group of G (2.5 for 8), or leave it out."
        )
    if options.max_skipped_steps < 1:
        yield (
            f"`max_skipped_steps` is {options.max_skipped_steps}, so no step could fail. "
            "Use at least 1; 10 is usual."
        )
