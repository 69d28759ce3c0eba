"""TRL's trainer with rewards that may come from elsewhere: late, or not at all.

What could not be scored is asked for again or left out, and a batch with too much of it is not
trained on.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.utils import logging

from trl_grpo_ext._trl.early import EarlyRewardSeams
from trl_grpo_ext.dynamic_sampling import reward_metrics
from trl_grpo_ext.errors import ConfigurationError, RewardOutageError, RewardRefusedError
from trl_grpo_ext.rewards.combine import (
    Gates,
    Limits,
    counting_rewards,
    shut_gates,
    unknown_reward_problems,
)
from trl_grpo_ext.rewards.missing import (
    ask_for_missing,
    excludes,
    excludes_without,
    with_stop,
    without_excluded,
)
from trl_grpo_ext.rewards.process_advantages import has_process_advantages
from trl_grpo_ext.rewards.remembering import plain_state, remembers
from trl_grpo_ext.rewards.scores import Score, is_asynchronous
from trl_grpo_ext.rewards.whole_groups import ask_for_whole_groups

logger = logging.get_logger(__name__)

_PAUSE_S = 10.0  # before a service in an outage is asked again
_LOOK_S = 0.2  # between two looks at whether to stop meanwhile


class RewardSeams(EarlyRewardSeams):
    """``trl.GRPOTrainer`` with checked rewards and a way out of an outage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._num_non_finite: list[int] = []
        self._refusal = ""  # what a service of this process said to a request as such
        super().__init__(*args, **kwargs)
        if not self.extended:
            return
        options, names = self.options, self.reward_func_names  # those of environments too
        gates, limits = options.reward_gates, options.reward_clip
        if problems := list(unknown_reward_problems(gates, limits, names=names)):
            raise ConfigurationError(problems)
        for func in cast("list[Any]", self.reward_funcs):
            if hasattr(func, "prepare"):
                func.prepare()

    # Hooks ----------------------------------------------------------------------------------------

    def checked_reward(
        self, reward_func: Callable[..., Any], name: str, count_non_finite: Callable[[int], None]
    ) -> Callable[..., Any]:
        """Return the reward function that TRL calls in the place of ``reward_func``.

        It reports to ``count_non_finite`` how many of its scores were not finite.
        """
        return reward_func

    def keep_scores(self, scores: list[list[Score] | None]) -> None:
        """Note the scores of this batch, as :meth:`known_scores` returns them."""

    def log_again(
        self, told: list[list[tuple[str, float]]], known: list[list[Score] | None]
    ) -> None:
        """Log what rewards had said of a batch whose scores are all known: none is asked again."""
        for i, (metrics, scores) in enumerate(zip(told, known, strict=True)):
            if scores is None or None in scores:
                continue
            self._told[i] = metrics
            for name, value in metrics:
                self._log_metric(name, value)

    # What counts, and what rewards remember -------------------------------------------------------

    def counting_rewards(self, rewards_BR: Tensor) -> Tensor:
        """Return what counts of each reward (``reward_gates``, ``reward_clip``)."""
        gates, limits = self._gates_and_limits
        return counting_rewards(
            rewards_BR, names=self.reward_func_names, gates=gates, limits=limits
        )

    def combination_metrics(self, rewards_BR: Tensor) -> dict[str, float]:
        """Return how much gates and limits cut off; nothing without them."""
        gates, limits = self._gates_and_limits
        if not gates and not limits:
            return {}
        names, weights_R = self.reward_func_names, self.reward_weights
        counting_BR = self.counting_rewards(rewards_BR)
        found = reward_metrics(counting_BR, weights_R=weights_R, names=names)
        metrics = {name: found[name] for name in ("reward", "reward_std")}
        if gates:
            shut_B = shut_gates(rewards_BR, names=names, gates=gates)
            metrics["rewards/gated_fraction"] = shut_B.float().mean().item()
        for name, (lowest, highest) in limits.items():
            scores_B = rewards_BR[:, names.index(name)]
            is_cut_B = (scores_B < lowest) | (scores_B > highest)
            metrics[f"rewards/{name}/clipped_fraction"] = is_cut_B.float().mean().item()
        return metrics

    @property
    def _gates_and_limits(self) -> tuple[Gates, Limits]:
        options = self.options
        return cast(Gates, options.reward_gates or {}), cast(Limits, options.reward_clip or {})

    def reward_states(self) -> dict[str, Any]:
        """Return what the rewards remember of the run, by their names."""
        return {
            name: plain_state(func.state_dict(), name=name) for name, func in self._remembering()
        }

    def restore_rewards(self, states: dict[str, Any]) -> None:
        """Give the rewards back what they remembered."""
        for name, func in self._remembering():
            if name in states:
                func.load_state_dict(states[name])

    def _remembering(self) -> list[tuple[str, Any]]:
        pairs = zip(self.reward_func_names, self.reward_funcs, strict=True)
        return [(name, func) for name, func in pairs if remembers(func)]

    # Scores ---------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not self.extended:
            return cast(Tensor, super()._calculate_rewards(inputs, *args, **kwargs))
        for _, func in self._remembering():
            func.frozen = self._mode != "train"
        with self._phase("rewards"):
            excluding_BR = self._excluding_rows(inputs)
            rewards_BR = self._asked_until_enough(
                inputs, *args, excluding_BR=excluding_BR, **kwargs
            )
        self._log_non_finite(rewards_BR)
        rewards_BR, excluded_B = without_excluded(
            rewards_BR.masked_fill(rewards_BR.isinf(), torch.nan), excluding_BR=excluding_BR
        )
        if any(self._excluding):
            fraction = excluded_B.float().mean().item()
            self._metrics[self._mode]["rewards/excluded_fraction"].append(fraction)
        return rewards_BR

    def _excluding_rows(self, inputs: list[dict[str, Any]]) -> Tensor:
        """Where a missing score leaves the completion out, shape ``(B, R)`` of all processes."""
        local = [[excludes_without(func, row) for func in self.reward_funcs] for row in inputs]
        excluding_BR = torch.tensor(local, device=self.accelerator.device)
        return cast(Tensor, self.accelerator.gather(excluding_BR))

    def _asked_until_enough(self, *args: Any, excluding_BR: Tensor, **kwargs: Any) -> Tensor:
        """Return the rewards of all processes, unless there is an outage that ends the run."""
        known, again = self._known, False
        self._num_non_finite = [0] * len(self.reward_funcs)
        while True:
            self._refusal = ""
            with self._rewards_that_ask(known, again=again):
                rewards_BR: Tensor = super()._calculate_rewards(*args, **kwargs)
            known = self._local_scores(rewards_BR)
            self.keep_scores(
                [
                    scores if excludes(func) and not has_process_advantages(func) else None
                    for scores, func in zip(known, self.reward_funcs, strict=True)
                ]
            )
            self.stop_if_asked()
            asks_services = any(hasattr(func, "on_missing") for func in self.reward_funcs)
            if not asks_services or not self._waits_for_service(rewards_BR, excluding_BR):
                return rewards_BR
            again = True

    @property
    def _excluding(self) -> list[bool]:
        return [excludes(func) for func in self.reward_funcs]

    @contextmanager
    def _rewards_that_ask(self, known: list[list[Score] | None], *, again: bool) -> Iterator[None]:
        """Have TRL call rewards that ask for what is not known only.

        Args:
            known: Scores of this process, a list a reward.
            again: Whether plain functions, too, stay with what they said.
        """
        given = self.reward_funcs
        self.reward_funcs = [
            func
            if isinstance(func, nn.Module)
            else self.checked_reward(
                self._asking(func, scores, self._told[i], again=again),
                name,
                functools.partial(self._count, i),
            )
            for i, (func, name, scores) in enumerate(
                zip(given, self.reward_func_names, known, strict=True)
            )
        ]
        try:
            yield
        finally:
            self.reward_funcs = given

    def _asking(
        self,
        func: Any,
        known: list[Score] | None,
        told: list[tuple[str, float]],
        *,
        again: bool,
    ) -> Callable[..., Any]:
        if again and not excludes(func):
            return lambda **_: known
        if is_asynchronous(func):
            return cast(Callable[..., Any], func)
        reward = _telling(with_stop(func, self.is_asked_to_stop), told)
        if hasattr(func, "on_missing"):
            reward = self._refusable(reward)
        if not getattr(func, "needs_group", False):
            return lambda **columns: ask_for_missing(reward, known, columns)
        return lambda **columns: ask_for_whole_groups(
            reward,
            known,
            columns,
            group_size=self._rows_a_group,
            process_index=self.accelerator.process_index,
            gather=gather_object,
        )

    def _refusable(self, reward: Callable[..., Sequence[Score]]) -> Callable[..., Sequence[Score]]:
        """Have a service's refusal wait until all processes know of it."""

        def refusable(**columns: Any) -> Sequence[Score]:
            try:
                return reward(**columns)
            except RewardRefusedError as error:
                self._refusal = str(error)
                return [None] * len(columns["prompts"])

        return refusable

    def _local_scores(self, rewards_BR: Tensor) -> list[list[Score] | None]:
        num_local = len(rewards_BR) // self.accelerator.num_processes
        first = self.accelerator.process_index * num_local
        columns = rewards_BR[first : first + num_local].T.tolist()
        return [[None if score != score else score for score in column] for column in columns]

    def _count(self, reward: int, num_non_finite: int) -> None:
        self._num_non_finite[reward] = max(num_non_finite, self._num_non_finite[reward])

    def _log_non_finite(self, rewards_BR: Tensor) -> None:
        """Log how many scores of each reward were NaN or infinite, over all processes."""
        local = torch.tensor(self._num_non_finite, device=rewards_BR.device)
        by_function = self.accelerator.reduce(local, reduction="sum").tolist()
        by_model = (~rewards_BR.isfinite()).sum(dim=0).tolist()
        for i, (func, name) in enumerate(
            zip(self.reward_funcs, self.reward_func_names, strict=True)
        ):
            count = by_model[i] if isinstance(func, nn.Module) else by_function[i]
            self._metrics[self._mode][f"rewards/{name}/non_finite"].append(float(count))

    # Outages --------------------------------------------------------------------------------------

    def _waits_for_service(self, rewards_BR: Tensor, excluding_BR: Tensor) -> bool:
        """Return whether to ask again, after a pause; every process must call it.

        Raises:
            RewardOutageError: the run is to end, on all processes alike.
        """
        refusals = [refusal for refusal in gather_object([self._refusal]) if refusal]
        if refusals:
            raise RewardOutageError(refusals[0])
        failed = self._num_failed(rewards_BR, excluding_BR)
        fraction, most = (
            max(failed, default=0) / len(rewards_BR),
            self.options.max_unscored_fraction,
        )
        if fraction <= most:
            return False
        outage = RewardOutageError(self._outage(failed, len(rewards_BR), fraction))
        if self.options.on_outage == "stop":
            raise outage
        waits = self.options.on_outage == "wait"
        if self.is_world_process_zero():
            then = "Asking again until it answers" if waits else "Training on what has a score"
            logger.warning(f"{outage} {then} (`on_outage: {self.options.on_outage}`).")
        if waits:
            self._pause()
        return waits

    def _num_failed(self, rewards_BR: Tensor, excluding_BR: Tensor) -> list[int]:
        """How many completions each reward could not score, though it was to, on all processes.

        A reward without ``num_failed`` was to score each.
        """
        missing = (rewards_BR.isnan() & excluding_BR).sum(dim=0).tolist()
        local = [getattr(func, "num_failed", None) for func in self.reward_funcs]
        by_process = gather_object([local])
        return [
            num_missing if None in counts else min(sum(counts), num_missing)
            for num_missing, counts in zip(missing, zip(*by_process, strict=True), strict=True)
        ]

    def _outage(self, failed: list[int], num_completions: int, fraction: float) -> str:
        """What is missing, and what the services said; the same text on every process."""
        local = [getattr(func, "failure", "") for func in self.reward_funcs]
        said = list(zip(*gather_object([local]), strict=True))
        missing = [
            f"'{name}' {num}"
            + "".join(f" ({failure})" for failure in list(dict.fromkeys(filter(None, answers)))[:1])
            for name, num, answers in zip(self.reward_func_names, failed, said, strict=True)
            if num
        ]
        return (
            f"{fraction:.0%} of the {num_completions} completions of a batch have no score, more "
            f"than `max_unscored_fraction` ({self.options.max_unscored_fraction:g}). Missing: "
            f"{', '.join(missing)}. What was not scored says nothing about the policy."
        )

    def _pause(self) -> None:
        end = time.monotonic() + _PAUSE_S
        while time.monotonic() < end and not self.is_asked_to_stop():
            time.sleep(_LOOK_S)
        self.stop_if_asked()


def _telling(reward: Callable[..., Any], told: list[tuple[str, float]]) -> Callable[..., Any]:
    """Have the metrics that a reward logs noted, too."""

    def telling(*, log_metric: Callable[[str, float], None], **columns: Any) -> Any:
        def log(name: str, value: float) -> None:
            told.append((name, float(value)))
            log_metric(name, value)

        return reward(**columns, log_metric=log)

    return telling
