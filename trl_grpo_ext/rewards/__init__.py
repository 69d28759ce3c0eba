"""Rewards: plain TRL reward functions, chosen by name or import path."""

from trl_grpo_ext.rewards.api.reward import APIReward
from trl_grpo_ext.rewards.code.reward import CodeReward
from trl_grpo_ext.rewards.completion import completion_text
from trl_grpo_ext.rewards.format import FormatReward
from trl_grpo_ext.rewards.math.reward import MathReward
from trl_grpo_ext.rewards.number import LastNumberReward, NumberDistanceReward, last_number
from trl_grpo_ext.rewards.registry import (
    BUILT_IN_REWARDS,
    RewardSpec,
    build_rewards,
    required_columns,
    resolve_reward,
    reward_problems,
)

__all__ = [
    "BUILT_IN_REWARDS",
    "APIReward",
    "CodeReward",
    "FormatReward",
    "LastNumberReward",
    "MathReward",
    "NumberDistanceReward",
    "RewardSpec",
    "build_rewards",
    "completion_text",
    "last_number",
    "required_columns",
    "resolve_reward",
    "reward_problems",
]
