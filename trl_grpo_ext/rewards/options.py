"""The options for rewards: what counts of them, overlap, and what an outage does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from trl_grpo_ext.rewards.combine import combination_problems

OnOutage = Literal["stop", "wait", "continue"]


@dataclass
class RewardOptions:
    """What counts of the rewards, and how a run deals with those of services."""

    reward_gates: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Least score of a reward, by its name, with which the other rewards count, "
            "such as {format: 1.0}: below it, what they give (values above 0) does not count, and "
            "what they take does."
        },
    )
    reward_clip: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Lowest and highest value of a reward that count, by its name, such as "
            "{outcome_model: [-3, 3]}; beyond them it is cut. Logged is what the reward gave."
        },
    )
    overlap_rewards: bool = field(
        default=True,
        metadata={
            "help": "Whether a reward that has a `submit` method, such as a service, is given each "
            "completion as soon as it is finished, so that it scores while others are sampled and "
            "the reference runs."
        },
    )
    max_unscored_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Largest share of a generation batch that may be without a score of a reward "
            "with `on_missing: exclude`, such as a service; a batch with more is an outage."
        },
    )
    on_outage: OnOutage = field(
        default="stop",
        metadata={
            "help": "What to do in an outage of a reward: 'stop' (save the run with what was "
            "sampled and scored, and end with an error), 'wait' (ask until the service answers), "
            "or 'continue' (train on the completions that were scored)."
        },
    )


def reward_option_problems(options: RewardOptions) -> Iterator[str]:
    """Yield what cannot work in these options.

    Example:
        >>> next(reward_option_problems(RewardOptions(max_unscored_fraction=10)))
        '`max_unscored_fraction` is 10, which is no share. Use 0 to 1, such as 0.1 for a tenth.'
    """
    yield from combination_problems(options.reward_gates, options.reward_clip)
    fraction = options.max_unscored_fraction
    if not 0 <= fraction <= 1:
        yield (
            f"`max_unscored_fraction` is {fraction}, which is no share. Use 0 to 1, such as 0.1 "
            "for a tenth."
        )
