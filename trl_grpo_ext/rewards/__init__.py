"""Rewards: plain TRL reward functions, chosen by name or import path."""

from trl_grpo_ext.rewards.api.reward import APIReward
from trl_grpo_ext.rewards.code.reward import CodeReward
from trl_grpo_ext.rewards.completion import completion_text
from trl_grpo_ext.rewards.format import FormatReward
from trl_grpo_ext.rewards.language import LanguageReward
from trl_grpo_ext.rewards.length import LengthReward
from trl_grpo_ext.rewards.math.reward import MathReward
from trl_grpo_ext.rewards.number import LastNumberReward, NumberDistanceReward, last_number
from trl_grpo_ext.rewards.reasoning_gym import ReasoningGymReward
from trl_grpo_ext.rewards.registry import (
    BUILT_IN_REWARDS,
    RewardSpec,
    build_rewards,
    required_columns,
    resolve_reward,
    reward_problems,
)
from trl_grpo_ext.rewards.repetition import RepetitionReward

__all__ = [
    "BUILT_IN_REWARDS",
    "APIReward",
    "CodeReward",
    "FormatReward",
    "LanguageReward",
    "LastNumberReward",
    "LengthReward",
    "MathReward",
    "NumberDistanceReward",
    "ReasoningGymReward",
    "RepetitionReward",
    "RewardSpec",
    "build_rewards",
    "completion_text",
    "last_number",
    "required_columns",
    "resolve_reward",
    "reward_problems",
]
