"""A log for the tests: ``from report.logs import make_log``."""

from __future__ import annotations


def make_log(num_steps: int = 4) -> list[dict[str, object]]:
    """A log as transformers and TRL leave it, with its closing line."""
    entries: list[dict[str, object]] = [
        {
            "step": step,
            "reward": 0.1 * step,
            "reward_std": 0.2,
            "rewards/right_answer/mean": 0.3 * step,
            "rewards/right_answer/std": 0.1,
            "kl": 0.01,
            "completions/mean_length": 20.0,
            "completions/min_length": 10.0,
            "completions/max_length": 30.0,
            "grad_norm": 1.5,
            "step_time": 10.0,
            "time/generation": 4.0,
            "time/rewards": 1.0,
            "time/logprobs": 2.0,
            "time/update": 2.0,
        }
        for step in range(1, num_steps + 1)
    ]
    return [*entries, {"step": num_steps, "train_runtime": 40.0}]


def without(log: list[dict[str, object]], prefix: str) -> list[dict[str, object]]:
    return [{k: v for k, v in entry.items() if not k.startswith(prefix)} for entry in log]
