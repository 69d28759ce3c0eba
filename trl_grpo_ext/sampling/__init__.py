"""From prompts to groups of completions with their log-probabilities."""

from trl_grpo_ext.sampling.group_sampler import GroupSamples, group_sample, token_logprobs

__all__ = ["GroupSamples", "group_sample", "token_logprobs"]
