"""TRL's trainer that notes what an evaluation sampled, completion by completion.

Where an eval set does not divide, accelerate fills up the last batch with prompts that were there
before. They are generated, because every process must, and counted nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor

from trl_grpo_ext._trl.greedy import GreedySeams
from trl_grpo_ext.evaluation.collect import EvalPass
from trl_grpo_ext.evaluation.groups import EvalGroups, build_groups, find_answers
from trl_grpo_ext.losses import LOSS_TYPE_REDUCTIONS

# Metrics of TRL that are means over the tokens of a batch.
_TOKEN_MEANS = ("kl", "entropy", "clip_ratio/", "cispo_clip_ratio", "vespo/", "sampling/")


class EvalRowSeams(GreedySeams):
    """``trl.GRPOTrainer`` that collects the completions of an evaluation, and their losses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pass: EvalPass | None = None
        self._loss_weight = 0.0
        super().__init__(*args, **kwargs)

    @contextmanager
    def _collecting(self, num_prompts: int) -> Iterator[EvalPass]:
        """Note what is sampled and scored meanwhile."""
        self._pass = EvalPass(
            num_prompts=num_prompts,
            group_size=cast(int, self.num_generations_eval),
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        try:
            yield self._pass
        finally:
            self._pass = None

    # On the way -----------------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._generate(*args, **kwargs)
        if self._pass is not None:
            # TRL 1.16 leaves the model in training mode after `generate_batch`, so that the rest
            # of the evaluation would count as training. Remove when it no longer does.
            self.model.eval()
            completion_ids, tool_mask = output[1], output[2]
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            self._pass.set_lengths(
                [len(ids) for ids in completion_ids]
                if tool_mask is None
                else [sum(mask) for mask in tool_mask],
                [ids[-1] not in ends for ids in completion_ids],
            )
        return output

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        rewards_BR = super()._calculate_rewards(inputs, prompts, completions, *args, **kwargs)
        if self._pass is not None:
            start = self.accelerator.process_index * len(inputs)
            scores = rewards_BR[start : start + len(inputs)].tolist()
            answers = [
                find_answers(func, name, completions)
                for func, name in zip(self.reward_funcs, self.reward_func_names, strict=True)
            ]
            self._pass.add_scored(inputs, completions, scores, list(zip(*answers, strict=True)))
        return rewards_BR

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self._pass is None:
            return super()._generate_and_score_completions(inputs)
        self._pass.begin_batch(len(inputs))
        output = super()._generate_and_score_completions(inputs)
        self._leave_out_what_fills_up(output, self._pass)
        return output

    def _leave_out_what_fills_up(self, output: dict[str, Any], collected: EvalPass) -> None:
        """Mask it in the loss and in TRL's means over tokens; its tokens still are attended to."""
        mask_BT = output["completion_mask"]
        if not all(collected.counts):
            counts_B1 = torch.tensor(collected.counts, device=mask_BT.device)[:, None]
            output["tool_mask"] = output.get("tool_mask", torch.ones_like(mask_BT)) * counts_B1
        num_local = (mask_BT * output.get("tool_mask", 1)).sum()
        output["num_items_in_batch"] = self.accelerator.gather(num_local).sum()
        collected.num_tokens.append(float(output["num_items_in_batch"]))
        # What TRL divided the loss of this process by.
        self._loss_weight = {
            "dapo": collected.num_tokens[-1] / self.accelerator.num_processes,
            "bnpo": float(num_local),
        }.get(LOSS_TYPE_REDUCTIONS[self.loss_type], float(len(mask_BT)))

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run TRL's step, and add its loss to the sum over all prompts."""
        result = super().prediction_step(*args, **kwargs)
        if self._pass is not None:
            self._pass.loss_sum += float(result[0]) * self._loss_weight
        return result

    # At the end -----------------------------------------------------------------------------------

    def _gathered(self, collected: EvalPass) -> EvalGroups:
        """Return the groups of all processes."""
        return build_groups(
            gather_object(collected.rows),
            group_size=collected.group_size,
            num_prompts=collected.num_prompts,
            reward_names=self.reward_func_names,
            weights=self.reward_weights.tolist(),
            counting=self.counting_rewards,
            have_answers=[callable(getattr(func, "answer", None)) for func in self.reward_funcs],
        )

    def _batch_metrics(self, collected: EvalPass) -> dict[str, float]:
        """Return one number for what TRL logged a batch, taken out of its log, and the loss."""
        logged = self._metrics["eval"]
        metrics = {
            name: _over_batches(name, values, collected.num_tokens)
            for name, values in logged.items()
        }
        logged.clear()
        by_token = LOSS_TYPE_REDUCTIONS[self.loss_type] in ("dapo", "bnpo")
        count = sum(collected.num_tokens) if by_token else collected.num_completions
        loss_sum = torch.tensor(collected.loss_sum, device=self.accelerator.device)
        loss = float(self.accelerator.reduce(loss_sum, reduction="sum")) / max(count, 1)
        return metrics | {"loss": loss}


def _over_batches(name: str, values: list[float], num_tokens: list[float]) -> float:
    """Return one number from those of the batches: the extreme of extremes, else a mean.

    Means over tokens are weighed with the tokens of their batch.
    """
    if name.endswith(("min", "max")):
        known = [value for value in values if not math.isnan(value)]
        return (min if name.endswith("min") else max)(known, default=math.nan)
    by_token = name.startswith(_TOKEN_MEANS) and len(values) == len(num_tokens)
    weights = num_tokens if by_token else [1.0] * len(values)
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if not math.isnan(v)]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else math.nan
