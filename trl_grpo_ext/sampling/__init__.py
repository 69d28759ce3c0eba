"""From prompts to groups of completions with their log-probabilities."""

from trl_grpo_ext.sampling.decoding import Completion, SamplingStopped, sample_completions
from trl_grpo_ext.sampling.engines import Engine, SamplingNeeds, choose_engine
from trl_grpo_ext.sampling.group_sampler import GroupSamples, group_sample, token_logprobs
from trl_grpo_ext.sampling.settings import SamplingSettings, unsupported_generation_keys
from trl_grpo_ext.sampling.streams import CompletionKey, uniforms

__all__ = [
    "Completion",
    "CompletionKey",
    "Engine",
    "GroupSamples",
    "SamplingNeeds",
    "SamplingSettings",
    "SamplingStopped",
    "choose_engine",
    "group_sample",
    "sample_completions",
    "token_logprobs",
    "uniforms",
    "unsupported_generation_keys",
]
