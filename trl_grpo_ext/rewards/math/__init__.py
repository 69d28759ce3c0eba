"""Is the final answer of a reply equal to the gold answer? ``docs/math_reward.md`` is the guide."""

from trl_grpo_ext.rewards.math.reward import MathReward

__all__ = ["MathReward"]
