"""What a training run logs, as a table: name, unit, meaning, healthy range.

``docs/reference/metrics.md`` is written from it, and a line of the log is yellow where it says so.
An evaluation logs the metrics of a batch too, with ``eval_`` before their names.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

EVALUATION = "eval_"
HEALTHY_KL = 1.0  # [nats a token] at most; health.py warns where the median is above


@dataclass(frozen=True)
class Metric:
    """One metric, or several that differ in a name only.

    Attributes:
        name: As it is logged; ``<name>`` stands for what differs.
        unit: ``""`` if it has none.
        meaning: What it is a mean, a sum or a share of.
        healthy: What to expect of a healthy run, where numbers alone do not say it.
        low: Least healthy value; ``None`` for no limit.
        high: Greatest healthy value; ``None`` for no limit.
    """

    name: str
    unit: str
    meaning: str
    healthy: str = ""
    low: float | None = None
    high: float | None = None

    def matches(self, key: str) -> bool:
        """Return whether a metric is logged under ``key``.

        Example:
            >>> Metric("rewards/<name>/mean", "", "").matches("rewards/format/mean")
            True
        """
        return _pattern(self.name).fullmatch(key) is not None

    def is_healthy(self, value: float) -> bool:
        """Return whether a value is in the healthy range; NaN never is.

        Example:
            >>> Metric("kl", "nats", "", high=1.0).is_healthy(1.5)
            False
        """
        above = self.low is None or value >= self.low
        below = self.high is None or value <= self.high
        return above and below and not math.isnan(value)

    @property
    def healthy_range(self) -> str:
        """The healthy range, in words.

        Example:
            >>> Metric("entropy", "nats", "", low=0.01, healthy="falls slowly").healthy_range
            'at least 0.01; falls slowly'
        """
        return "; ".join(part for part in (self._limits(), self.healthy) if part)

    def _limits(self) -> str:
        if self.low is not None and self.low == self.high:
            return f"{self.low:g}"
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.high is not None:
            return f"at most {self.high:g}"
        return "" if self.low is None else f"at least {self.low:g}"


METRICS: dict[str, tuple[Metric, ...]] = {
    "Rewards": (
        Metric(
            "reward",
            "reward",
            "Weighted sum of the rewards, mean over the completions that at least one could score. "
            "null if none was scored.",
            "rises, with noise of about `reward_std` / sqrt(completions)",
        ),
        Metric(
            "reward_std",
            "reward",
            "Standard deviation of that sum over all completions of a generation, not within a "
            "group.",
            "above 0 until the task is solved",
        ),
        Metric(
            "frac_reward_zero_std",
            "share of groups",
            "Silent groups: every advantage is 0, because all rewards are equal or none is there. "
            "They cost time and teach nothing.",
            "rises when the task is nearly solved",
            low=0,
            high=0.8,
        ),
        Metric(
            "rewards/<name>/mean",
            "reward",
            "One reward function before its weight, mean over the completions that it scored.",
            "rises, or stays where it is if another reward matters more",
        ),
        Metric(
            "rewards/<name>/std",
            "reward",
            "Its standard deviation over these completions.",
        ),
        Metric(
            "rewards/<name>/non_finite",
            "completions",
            "Scores that were NaN or infinite, in a generation; they are left out.",
            low=0,
            high=0,
        ),
    ),
    "Completions": (
        Metric(
            "completions/mean_length",
            "tokens",
            "Mean length of the completions; with tools, of what the model wrote.",
            "no steady climb to `max_completion_length`",
        ),
        Metric("completions/min_length", "tokens", "The shortest one.", "above 1"),
        Metric("completions/max_length", "tokens", "The longest one."),
        Metric(
            "completions/clipped_ratio",
            "share of completions",
            "Truncated: cut off at `max_completion_length` without an end-of-sequence token.",
            "falls early in the run",
            low=0,
            high=0.25,
        ),
        Metric(
            "completions/num_truncated",
            "completions",
            "Completions of a generation that the loss leaves out, because they are truncated "
            "(`mask_truncated_completions`).",
        ),
        Metric(
            "completions/mean_terminated_length",
            "tokens",
            "Mean length of those that ended by themselves; 0 if none did.",
        ),
        Metric("completions/min_terminated_length", "tokens", "The shortest of these."),
        Metric("completions/max_terminated_length", "tokens", "The longest of these."),
        Metric(
            "num_tokens",
            "tokens",
            "Sampled so far, prompts (once a completion) and completions, all processes, earlier "
            "parts of a resumed run included.",
        ),
    ),
    "Policy": (
        Metric(
            "loss",
            "",
            "What is minimised, KL penalty and entropy bonus included; mean over the steps since "
            "the last log. The advantages of a group sum to 0, so it is near 0 whether the model "
            "learns or not.",
            "finite; do not read progress from it",
        ),
        Metric(
            "grad_norm",
            "",
            "L2 norm of the gradient before clipping, at the logged step.",
            "steady within a factor of 10; near 0 at silent steps",
        ),
        Metric(
            "entropy",
            "nats a token",
            "Entropy of the policy's next-token distribution at the training temperature, mean "
            "over completion tokens.",
            "falls slowly; a sudden drop while the reward stands still is a collapse",
            low=0.01,
        ),
        Metric(
            "kl",
            "nats a token",
            "KL to the reference by `kl_estimator` (if `beta` is not 0), mean over completion "
            "tokens. Single tokens make it jump.",
            "0.001 to 0.05 on large models, tenths on models as small as 135M",
            high=HEALTHY_KL,
        ),
        Metric(
            "clip_ratio/region_mean",
            "share of tokens",
            "Tokens that the clipped surrogate leaves out, since the ratio to the policy that "
            "sampled is outside of `epsilon`. Completions, for `importance_sampling_level: "
            "sequence`. Always 0 where each generation is used for one update.",
            low=0,
            high=0.2,
        ),
        Metric(
            "clip_ratio/low_mean",
            "share of tokens",
            "Of these, with a ratio below 1 - `epsilon` and a negative advantage.",
        ),
        Metric(
            "clip_ratio/high_mean",
            "share of tokens",
            "Of these, with a ratio above 1 + `epsilon_high` and a positive advantage.",
        ),
        Metric(
            "clip_ratio/low_min",
            "share of tokens",
            "`low_mean` of the completion where it is least.",
        ),
        Metric(
            "clip_ratio/high_max",
            "share of tokens",
            "`high_mean` of the completion where it is greatest.",
        ),
        Metric(
            "cispo_clip_ratio",
            "share of tokens",
            "Tokens whose weight `loss_type: cispo` cuts at `epsilon_high`, of positive advantage.",
        ),
        Metric(
            "vespo/phi_seq_mean",
            "",
            "Weight that `loss_type: vespo` gives a completion, mean; 1 where the policy is the "
            "one that sampled.",
            "near 1",
        ),
        Metric(
            "policy_loss",
            "",
            "The loss without the entropy bonus (logged if there is one). It includes TRL's own KL "
            "penalty, not that of `kl_estimator` or `kl_clamp`.",
        ),
        Metric("entropy_coef", "", "Weight of the entropy bonus, as adapted."),
        Metric(
            "aux_loss",
            "",
            "Load-balancing loss of a mixture of experts, before its coefficient.",
        ),
    ),
    "Reference": (
        Metric(
            "reference/kl_floor",
            "nats a token",
            "KL (k3) that a quantized reference shows before training, where the truth is 0. This "
            "and the next ones stand in the first log.",
            "at most half of `reference_kl_target`",
        ),
        Metric("reference/kl_floor_k1", "nats a token", "The same by k1; can be negative."),
        Metric("reference/kl_floor_full", "nats a token", "The same over the whole vocabulary."),
        Metric(
            "reference/top_token_agreement",
            "share of tokens",
            "Where the reference holds the same token to be likeliest as the initial policy.",
            "near 1",
        ),
        Metric(
            "reference/gradient_cosine",
            "",
            "Between the gradients of the KL penalty with this reference and with the exact one.",
            "near 1",
        ),
    ),
    "Time": (
        Metric(
            "step_time",
            "s",
            "An optimizer step without the optimizer itself: generation, rewards, forward and "
            "backward passes, on the main process.",
        ),
        Metric("time/generation", "s", "Of it, sampling completions."),
        Metric(
            "time/rewards",
            "s",
            "Of it, the reward functions.",
            "small beside generation; slow ones can be asynchronous",
        ),
        Metric("time/logprobs", "s", "Of it, log-probabilities of reference and old policy."),
        Metric("time/update", "s", "Of it, forward and backward passes of the policy."),
    ),
    "Dynamic sampling": (
        Metric(
            "dynamic_sampling/rounds",
            "",
            "Rounds of generation for one batch, until enough groups were informative. With "
            "`dynamic_sampling`, rewards and completions above are those of all rounds.",
            "1 to 3; always `dynamic_sampling_max_rounds`, prompts are too easy or too hard",
        ),
        Metric(
            "dynamic_sampling/informative_fraction",
            "share of groups",
            "Groups drawn that were not silent.",
            "1 where all prompts are in reach",
            low=0.2,
            high=1,
        ),
        Metric(
            "dynamic_sampling/groups_drawn",
            "groups",
            "Groups sampled for one batch.",
            "at most 5 times those of a batch",
        ),
        Metric(
            "dynamic_sampling/cost",
            "",
            "Groups drawn for each group that the batch holds.",
            "prompts too easy or too hard make it rise",
            low=1,
            high=5,
        ),
        Metric(
            "dynamic_sampling/unfilled",
            "groups",
            "Silent groups that stayed in the batch, because the rounds were used up.",
            low=0,
            high=0,
        ),
    ),
    "Robustness": (
        Metric(
            "advantages/clipped_fraction",
            "share of completions",
            "Of a batch, all processes: with an advantage that `advantage_clip` cut (logged if it "
            "is set), or that is exactly as large.",
            "small: the clip is for outliers",
            low=0,
            high=0.1,
        ),
        Metric(
            "skipped_steps",
            "steps",
            "Optimizer steps left out since the run was started or resumed, because the gradient "
            "was NaN or infinite.",
            low=0,
            high=0,
        ),
    ),
    "What counts of rewards": (
        Metric(
            "rewards/gated_fraction",
            "share of completions",
            "Of a batch, all processes: below a gate of `reward_gates` (logged if it is set), so "
            "that nothing that other rewards give counts.",
            "falls early in the run",
            low=0,
            high=0.5,
        ),
        Metric(
            "rewards/<name>/clipped_fraction",
            "share of completions",
            "Of a batch, all processes: with a score of this reward beyond its limits in "
            "`reward_clip`.",
            "small: limits are for outliers",
            low=0,
            high=0.1,
        ),
    ),
    "Reward models": (
        Metric(
            "rewards/<name>/too_long_fraction",
            "share of completions",
            "Replies that are longer than the outcome model takes, and have no score.",
            low=0,
            high=0,
        ),
        Metric(
            "rewards/<name>/cut_prompts_fraction",
            "share of completions",
            "Replies whose prompt was cut from its left, for want of room in the model.",
            low=0,
            high=0,
        ),
        Metric(
            "rewards/<name>/steps_mean",
            "steps",
            "Steps a completion, as the process model splits it.",
            "neither 1 throughout nor growing without end",
        ),
        Metric(
            "rewards/<name>/running_mean",
            "reward units",
            "Of all scores that the outcome model gave so far, all processes (`normalize`).",
        ),
        Metric(
            "rewards/<name>/running_std",
            "reward units",
            "Their standard deviation.",
        ),
    ),
    "Reward services": (
        Metric(
            "rewards/excluded_fraction",
            "share of completions",
            "Left out of a batch, all processes, because a reward that is a service could not "
            "score them.",
            "0 but in an outage",
            low=0,
            high=0.1,
        ),
        Metric(
            "rewards/<name>/unscored_fraction",
            "share of completions",
            "Those that one service, or a process model, did not score; this and the next ones are "
            "of one process's call.",
            "0 but in an outage",
            low=0,
            high=0.1,
        ),
        Metric(
            "rewards/<name>/latency_p50_s",
            "s",
            "Median time of an answered request, without the waits for limits and retries.",
            "steady",
        ),
        Metric("rewards/<name>/latency_p95_s", "s", "95th percentile of it."),
        Metric("rewards/<name>/retries", "requests", "Requests sent again.", "mostly 0"),
        Metric("rewards/<name>/cache_hits", "requests", "Answered from the disk."),
        Metric("rewards/<name>/requests", "requests", "Sent."),
        Metric("rewards/<name>/tokens", "tokens", "As the service counted them."),
        Metric("rewards/<name>/cost", "", "Of these tokens, at the price that was given."),
        Metric(
            "rewards/<name>/unparsable_gold_fraction",
            "share of completions",
            "`math`: those whose gold answer cannot be read, so that they have no score.",
            "0",
        ),
        Metric(
            "rewards/<name>/timeouts_fraction",
            "share of completions",
            "`math`, `reasoning_gym`: replies that took too long to compare; they score 0.",
            "near 0",
        ),
        Metric(
            "rewards/<name>/crashes_fraction",
            "share of completions",
            "`math`, `reasoning_gym`: replies that ended their worker process; they score 0.",
            "0",
        ),
        Metric(
            "rewards/<name>/broken_rows_fraction",
            "share of completions",
            "`reasoning_gym`: those whose row cannot be scored, so that they have no score.",
            "0",
        ),
        Metric(
            "rewards/<name>/refused_answers_fraction",
            "share of completions",
            "`reasoning_gym`: answers that the task's scorer raises an error on; they score 0.",
            "falls",
        ),
        Metric(
            "rewards/<name>/time_fraction",
            "share of completions",
            "`code`: programs that took too long.",
            "falls",
        ),
        Metric(
            "rewards/<name>/program_fraction",
            "share of completions",
            "`code`: programs that ended before their tests did.",
            "falls",
        ),
        Metric(
            "rewards/<name>/no_program_fraction",
            "share of completions",
            "`code`: replies without a program.",
            "falls",
        ),
        Metric(
            "rewards/<name>/skipped_fraction",
            "share of completions",
            "`code`: of rows without tests, which it does not apply to.",
            "the share of other rows in a mixed data set",
        ),
        Metric(
            "rewards/<name>/no_tests_fraction",
            "share of completions",
            "`code`: rows whose tests cannot be read, so that they have no score.",
            "0",
        ),
        Metric(
            "rewards/<name>/unjudgeable_fraction",
            "share of completions",
            "`code`: rows whose tests hand the program a function, or need a name that nobody "
            "defines, so that they have no score.",
            "0",
        ),
        Metric(
            "rewards/<name>/sandbox_fraction",
            "share of completions",
            "`code`: programs that the sandbox could not run, so that they have no score.",
            "0",
        ),
    ),
    "Tools": (
        Metric("tools/call_frequency", "calls a completion", "Tool calls."),
        Metric(
            "tools/failure_frequency",
            "share of calls",
            "Calls that failed; 0 if there were none.",
            "falls",
        ),
    ),
    "vLLM": (
        Metric(
            "sampling/sampling_logp_difference/mean",
            "nats a token",
            "How far vLLM's log-probabilities are from the trainer's, mean of the absolute values.",
            "small and steady; growth means that weights or precisions differ",
        ),
        Metric("sampling/sampling_logp_difference/max", "nats", "The greatest of them."),
        Metric(
            "sampling/importance_sampling_ratio/mean",
            "",
            "Weight that corrects for it, as capped, mean over tokens or completions.",
            "near 1",
        ),
        Metric("sampling/importance_sampling_ratio/min", "", "The least of them."),
        Metric("sampling/importance_sampling_ratio/max", "", "The greatest of them."),
    ),
    "Trainer": (
        Metric("learning_rate", "", "At the logged step."),
        Metric("epoch", "epochs", "Passes over the training prompts so far."),
        Metric(
            "num_input_tokens_seen",
            "tokens",
            "As `num_tokens` (with `include_num_input_tokens_seen`).",
        ),
        Metric(
            "train_loss",
            "",
            "`loss` over the steps of this session; this and the next in the last log.",
        ),
        Metric("train_runtime", "s", "Of `train()`, evaluations and checkpoints included."),
        Metric(
            "train_samples_per_second",
            "1/s",
            "Completions trained on; prompts, for `num_train_epochs`. Those of the whole run, a "
            "second of this session.",
        ),
        Metric(
            "train_steps_per_second",
            "1/s",
            "`max_steps` a second of this session: too many if it was resumed.",
        ),
        Metric(
            "train_tokens_per_second",
            "1/s",
            "Tokens of this session (with `include_num_input_tokens_seen`).",
        ),
        Metric("total_flos", "FLOP", "Always 0 with GRPO: transformers cannot count here."),
        Metric(
            "<stage>_mem_<what>",
            "bytes",
            "Memory at a stage of the run (with `skip_memory_metrics: false`).",
        ),
    ),
}


def find_metric(key: str) -> Metric | None:
    """Return the row of what is logged under ``key``; ``None`` if there is none.

    Of an evaluation's metric, the row of the same in training.

    Example:
        >>> find_metric("eval_completions/mean_length").unit
        'tokens'
    """
    name = key.removeprefix(EVALUATION)
    return next((m for part in METRICS.values() for m in part if m.matches(name)), None)


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"<\w+>", ".+", name))
