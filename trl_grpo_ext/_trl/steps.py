"""TRL's trainer with a reward for each step of a completion, on the last token of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.utils import logging

from trl_grpo_ext._trl.rewards import RewardSeams
from trl_grpo_ext.rewards.combine import counting_steps
from trl_grpo_ext.rewards.completion import completion_text
from trl_grpo_ext.rewards.missing import ask_for_missing, with_stop
from trl_grpo_ext.rewards.process_advantages import checked_steps, has_process_advantages
from trl_grpo_ext.rewards.registry import log_name
from trl_grpo_ext.rewards.scores import Score
from trl_grpo_ext.rewards.step_tokens import step_tokens

logger = logging.get_logger(__name__)

STEP_REWARDS = "step_rewards"  # in what `_generate_and_score_completions` returns


class StepRewardSeams(RewardSeams):
    """``trl.GRPOTrainer`` that asks a process reward for the score of each step.

    Attributes:
        process_reward: Which of ``reward_funcs`` has ``process_advantages``, if any.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._steps: list[Any] | None = None  # of each completion of the batch; None: not asked
        self._step_rewards: list[dict[int, float]] = []  # by token, of each completion
        self._told_unplaced = False
        super().__init__(*args, **kwargs)

    @property
    def process_reward(self) -> int | None:
        """See :class:`StepRewardSeams`."""
        found = [i for i, func in enumerate(self.reward_funcs) if has_process_advantages(func)]
        return found[0] if self.extended and found else None

    @property
    def whole_rewards(self) -> list[int]:
        """Which rewards score completions as a whole, so that each has one advantage by them."""
        return [r for r in range(len(self.reward_funcs)) if r != self.process_reward]

    def counting_steps(self, step_rewards_BT: Tensor, rewards_BR: Tensor) -> Tensor:
        """Return what counts of the rewards of steps (``reward_gates``, ``reward_clip``)."""
        assert self.process_reward is not None
        gates, limits = self._gates_and_limits
        names = self.reward_func_names
        return counting_steps(
            step_rewards_BT,
            rewards_BR,
            name=names[self.process_reward],
            names=names,
            gates=gates,
            limits=limits,
        )

    def _asking(self, func: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        if not has_process_advantages(func):
            return super()._asking(func, *args, **kwargs)
        index = cast(int, self.process_reward)  # while TRL calls, others stand in `reward_funcs`
        ask = with_stop(func.step_scores, self.is_asked_to_stop)
        if hasattr(func, "on_missing"):
            ask = self._refusable(ask)

        def asked(**columns: Any) -> list[Score]:
            found = ask_for_missing(ask, self._steps, columns)
            texts = [completion_text(completion) for completion in columns["completions"]]
            self._steps, num_bad = checked_steps(found, texts=texts, name=log_name(func))
            self._count(index, num_bad)
            return cast("list[Score]", func.aggregated(self._steps))

        return asked

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
    ) -> Tensor:
        self._steps = None
        rewards_BR = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if (process := self.process_reward) is not None:
            is_left_out_B = self._local(rewards_BR)[:, process].isnan().tolist()
            scored: list[Any] = self._steps or []
            rows = zip(scored, completions, completion_ids_list, is_left_out_B, strict=True)
            self._step_rewards = [
                {} if left_out or steps is None else self._on_tokens(steps, completion, ids)
                for steps, completion, ids, left_out in rows
            ]
        return rewards_BR

    def _local(self, values_B: Tensor) -> Tensor:
        """This process's share of what has a row a completion."""
        num_local = len(values_B) // self.accelerator.num_processes
        return values_B[self.accelerator.process_index * num_local :][:num_local]

    def _on_tokens(self, steps: Any, completion: Any, ids: list[int]) -> dict[int, float]:
        """Return the score of each step by the last token of the step."""
        tokens = step_tokens(
            lambda ids: cast(str, self._tokenizer.decode(ids, skip_special_tokens=True)),
            ids,
            text=completion_text(completion),
            ends=steps.ends,
        )
        if tokens is None:
            self._tell_unplaced()
            return {}
        return dict(zip(tokens, steps.scores, strict=True))

    def _tell_unplaced(self) -> None:
        if not self._told_unplaced:
            logger.warning(
                "`process_advantages`: the text of a completion is not what its tokens decode to "
                "(a chat template may take replies apart), or has more steps than tokens, so its "
                "steps teach nothing. Use a tokenizer without `response_schema`, or a longer "
                "`step_separator`. (Told once.)"
            )
        self._told_unplaced = True

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Run TRL's method; put the rewards of steps beside the tokens, NaN where none ends."""
        self._step_rewards = []
        output = super()._generate_and_score_completions(inputs)
        if self.process_reward is not None:
            step_rewards_BT = torch.full(
                output["completion_ids"].shape, torch.nan, device=output["completion_ids"].device
            )
            for row, by_token in enumerate(self._step_rewards):
                for token, score in by_token.items():
                    step_rewards_BT[row, token] = score
            output[STEP_REWARDS] = step_rewards_BT
        return output
