"""TRL's trainer with rewards that may come from elsewhere: early, late, or not at all.

A finished completion is handed to its rewards at once, so that services score while others are
sampled and the reference runs; the call that TRL makes later collects. What could not be scored is
asked for again or left out, and a batch with too much of it is not trained on.
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
from trl.data_utils import is_conversational
from trl.trainer import grpo_trainer

from trl_grpo_ext._trl.own_reference import OwnReference
from trl_grpo_ext.errors import RewardOutageError, RewardRefusedError
from trl_grpo_ext.rewards.missing import ask_for_missing, excludes, with_stop, without_excluded
from trl_grpo_ext.rewards.scores import Score, is_asynchronous
from trl_grpo_ext.rewards.whole_groups import ask_for_whole_groups
from trl_grpo_ext.sampling import Completion

logger = logging.get_logger(__name__)

_PAUSE_S = 10.0  # before a service in an outage is asked again
_LOOK_S = 0.2  # between two looks at whether to stop meanwhile


class RewardSeams(OwnReference):
    """``trl.GRPOTrainer`` with checked rewards, early submission and a way out of an outage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._num_non_finite: list[int] = []
        self._refusal = ""  # what a service of this process said to a request as such
        self._rows_in_work: list[dict[str, Any]] = []  # of this generation; none: submit nothing
        self._rows_a_group = 1  # of this generation; while it samples, TRL's mode says "eval"
        self._prompts_in_work: list[list[int]] = []
        self._finished: dict[int, Any] = {}  # completions of this generation
        self._submitted_groups: set[int] = set()  # of this generation, by their first completion
        self._known: list[list[Score] | None] = []  # their scores: of an interrupted run
        super().__init__(*args, **kwargs)

    # Hooks ----------------------------------------------------------------------------------------

    def checked_reward(
        self, reward_func: Callable[..., Any], name: str, count_non_finite: Callable[[int], None]
    ) -> Callable[..., Any]:
        """Return the reward function that TRL calls in the place of ``reward_func``.

        It reports to ``count_non_finite`` how many of its scores were not finite.
        """
        return reward_func

    def known_scores(self) -> list[list[Score] | None]:
        """Return the scores that an interrupted run had of this batch, a list a reward.

        ``None`` stands for a reward that is called as if nothing was known.
        """
        return [None] * len(self.reward_funcs)

    def keep_scores(self, scores: list[list[Score] | None]) -> None:
        """Note the scores of this batch, as :meth:`known_scores` returns them."""

    # Early ----------------------------------------------------------------------------------------

    @property
    def _group_size_in_mode(self) -> int:
        train = self._mode == "train"
        return cast(int, self.num_generations if train else self.num_generations_eval)

    @property
    def _submits(self) -> bool:
        """Whether rewards are told of completions before TRL calls them."""
        changes_completions = (
            self.tools or self.environment_factories is not None or self.rollout_func is not None
        )
        return self.extended and self.options.overlap_rewards and not changes_completions

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows_in_work = inputs if self._submits else []
        self._submitted_groups = set()
        self._rows_a_group = self._group_size_in_mode
        self._known = self.known_scores() if self.extended else []
        try:
            return cast(dict[str, Any], super()._generate_and_score_completions(inputs))
        finally:
            self._rows_in_work = []

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self._finished = {}
        output = super()._generate(*args, **kwargs)
        if self._rows_in_work:
            for index, (ids, completion) in enumerate(zip(output[1], output[3], strict=True)):
                self._submit(index, completion, ids)
        return output

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        self._prompts_in_work = prompt_ids
        return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def completion_finished(self, index: int, completion: Completion) -> None:
        """Submit a completion of the batch, while others are still sampled."""
        takers = ("submit", "submit_group")
        if self._rows_in_work and any(
            hasattr(func, name) for func in self.reward_funcs for name in takers
        ):
            self._submit(index, self._parsed(index, completion.ids), completion.ids)

    def _parsed(self, index: int, ids: list[int]) -> Any:
        """The completion, as TRL hands it to rewards."""
        tokenizer: Any = self._tokenizer
        if not is_conversational({"prompt": self._rows_in_work[index]["prompt"]}):
            return tokenizer.decode(ids, skip_special_tokens=True)
        if any(getattr(tokenizer, f"response_{kind}", None) for kind in ("template", "schema")):
            prefix = self._prompts_in_work[index]
            return [grpo_trainer.parse_response(tokenizer, ids, prefix=prefix, tools=None)]
        content = tokenizer.decode(ids, skip_special_tokens=True)
        return [{"role": "assistant", "content": content}]

    def _submit(self, index: int, completion: Any, ids: list[int]) -> None:
        """Hand a completion to each reward that takes it early; once more changes nothing."""
        row, place = self._rows_in_work[index], self._place_in_group(index)
        self._finished[index] = completion
        group = range(index - place, index - place + self._rows_a_group)
        is_whole = all(member in self._finished for member in group)
        hands_over = is_whole and group.start not in self._submitted_groups
        for reward, known in zip(cast(list[Any], self.reward_funcs), self._known, strict=True):
            if known is not None and known[index] is not None:
                continue
            if not getattr(reward, "needs_group", False):
                if hasattr(reward, "submit"):
                    reward.submit(
                        row=row, completion=completion, completion_ids=ids, group_index=place
                    )
            elif hands_over and hasattr(reward, "submit_group"):
                completions = [self._finished[member] for member in group]
                reward.submit_group(row=row, completions=completions)
        if is_whole:
            self._submitted_groups.add(group.start)

    def _place_in_group(self, index: int) -> int:
        first = self.accelerator.process_index * len(self._rows_in_work)
        return int((first + index) % self._rows_a_group)

    # Scores ---------------------------------------------------------------------------------------

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.extended:
            return cast(Tensor, super()._calculate_rewards(*args, **kwargs))
        with self._phase("rewards"):
            rewards_BR = self._asked_until_enough(*args, **kwargs)
        self._log_non_finite(rewards_BR)
        rewards_BR, excluded_B = without_excluded(
            rewards_BR.masked_fill(rewards_BR.isinf(), torch.nan), excluding=self._excluding
        )
        if any(self._excluding):
            fraction = excluded_B.float().mean().item()
            self._metrics[self._mode]["rewards/excluded_fraction"].append(fraction)
        return rewards_BR

    def _asked_until_enough(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the rewards of all processes, unless there is an outage that ends the run."""
        known, again = self._known, False
        self._num_non_finite = [0] * len(self.reward_funcs)
        while True:
            self._refusal = ""
            with self._rewards_that_ask(known, again=again):
                rewards_BR: Tensor = super()._calculate_rewards(*args, **kwargs)
            known = self._local_scores(rewards_BR)
            self.keep_scores(
                [s if out else None for s, out in zip(known, self._excluding, strict=True)]
            )
            self.stop_if_asked()
            asks_services = any(hasattr(func, "on_missing") for func in self.reward_funcs)
            if not asks_services or not self._waits_for_service(rewards_BR):
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
                self._asking(func, scores, again=again), name, functools.partial(self._count, i)
            )
            for i, (func, name, scores) in enumerate(
                zip(given, self.reward_func_names, known, strict=True)
            )
        ]
        try:
            yield
        finally:
            self.reward_funcs = given

    def _asking(self, func: Any, known: list[Score] | None, *, again: bool) -> Callable[..., Any]:
        if again and not excludes(func):
            return lambda **_: known
        if is_asynchronous(func):
            return cast(Callable[..., Any], func)
        reward = with_stop(func, self.is_asked_to_stop)
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

    def _waits_for_service(self, rewards_BR: Tensor) -> bool:
        """Return whether to ask again, after a pause; every process must call it.

        Raises:
            RewardOutageError: the run is to end, on all processes alike.
        """
        refusals = [refusal for refusal in gather_object([self._refusal]) if refusal]
        if refusals:
            raise RewardOutageError(refusals[0])
        failed = self._num_failed(rewards_BR)
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

    def _num_failed(self, rewards_BR: Tensor) -> list[int]:
        """How many completions each reward could not score, though it was to, on all processes.

        A reward without ``num_failed`` was to score each.
        """
        missing = rewards_BR.isnan().sum(dim=0).tolist()
        local = [getattr(func, "num_failed", None) for func in self.reward_funcs]
        by_process = gather_object([local])
        return [
            int(excludes(func)) * (num_missing if None in counts else min(sum(counts), num_missing))
            for func, num_missing, counts in zip(
                self.reward_funcs, missing, zip(*by_process, strict=True), strict=True
            )
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
