"""TRL's trainer that samples on until a batch is full of groups that teach something.

A round is a whole pass through TRL's method, on rows of further prompts. All processes decide from
the same gathered rewards, so they draw as many rounds. The reference waits for the batch that comes
of them: what is thrown away is never run through it.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers.utils import logging
from trl.trainer import grpo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer

from trl_grpo_ext._trl.evaluation import EvaluationSeams
from trl_grpo_ext._trl.seams import mean_advantages
from trl_grpo_ext._trl.steps import STEP_REWARDS
from trl_grpo_ext.advantages import (
    RewardAggregation,
    informative_groups,
    informative_step_groups,
)
from trl_grpo_ext.config import ExtensionOptions
from trl_grpo_ext.dynamic_sampling import (
    PADDED_LEFT,
    FurtherPrompts,
    Rows,
    fill_slots,
    join_rows,
    merge_metrics,
    num_groups_to_draw,
    prompt_text,
    reward_metrics,
    rows_of_groups,
    take_rows,
    trim_padding,
)
from trl_grpo_ext.errors import ConfigurationError

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Round:
    """What one round sampled, over all processes.

    Shapes: ``B`` completions of the round, ``P`` groups of it, ``R`` reward functions.

    Attributes:
        rows: The batch that TRL returned.
        rewards_BR: NaN where a reward was not given.
        informative_P: Which groups teach something; on the CPU.
        metrics: What TRL logged.
        logs: What TRL put into the table of completions.
    """

    rows: Rows
    rewards_BR: Tensor
    informative_P: Tensor
    metrics: dict[str, list[float]]
    logs: dict[str, Any]


class DynamicSamplingSeams(EvaluationSeams):
    """``trl.GRPOTrainer`` with dynamic sampling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ours = {name: value for name, value in kwargs.items() if name != "compute_metrics"}
        given = inspect.signature(GRPOTrainer).bind_partial(*args, **ours).arguments
        if problems := list(_problems(given)):
            raise ConfigurationError(problems)
        self._in_round = False
        self._round_rewards: Tensor | None = None
        self._waiting: dict[str, nn.Module] = {}  # whose log-probabilities the batch lacks
        self._told_unfilled = False
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        options = self.options
        if not (options.extensions and options.dynamic_sampling and self._mode == "train"):
            output = super()._generate_and_score_completions(inputs)
            output.pop(STEP_REWARDS, None)
            return output
        rounds = self._sample_rounds(inputs)
        informative_D = torch.cat([found.informative_P for found in rounds])
        groups_P = fill_slots(informative_D, num_slots=len(rounds[0].informative_P))
        chosen_B = rows_of_groups(groups_P, group_size=self._group_size)
        batch = self._filled_batch(rounds, chosen_B)
        self._log_rounds(rounds)
        self._log_sampling(informative_D, groups_P, num_rounds=len(rounds))
        return batch

    @property
    def _group_size(self) -> int:
        return cast(int, self.num_generations)

    # Rounds ---------------------------------------------------------------------------------------

    def _sample_rounds(self, inputs: list[dict[str, Any]]) -> list[Round]:
        """Sample the batch, then further prompts, until enough groups are informative."""
        self._waiting = {}
        rounds = [self._sample_round(inputs)]
        num_slots = len(rounds[0].informative_P)
        prompts = self._further_prompts(inputs)
        while len(rounds) < self.options.dynamic_sampling_max_rounds:
            informative_D = torch.cat([found.informative_P for found in rounds])
            num_informative = int(informative_D.sum())
            num_groups = num_groups_to_draw(
                missing=num_slots - num_informative,
                num_informative=num_informative,
                num_drawn=len(informative_D),
                most=num_slots,
                multiple_of=self._num_even_groups,
            )
            if not num_groups:
                break
            rows = self._rows_of(prompts.draw(num_groups))
            rounds.append(self._sample_round(rows, num_drawn=len(informative_D)))
        return rounds

    @property
    def _num_even_groups(self) -> int:
        """The least number of groups that gives each process as many completions."""
        return math.lcm(self.accelerator.num_processes, self._group_size) // self._group_size

    def _further_prompts(self, inputs: list[dict[str, Any]]) -> FurtherPrompts:
        used = {prompt_text(row["prompt"]) for row in inputs}
        micro_step = self._step % self.args.gradient_accumulation_steps
        return FurtherPrompts(
            self._train_rows,
            used=gather_object(sorted(used)),
            key=(self.args.seed, self.state.global_step, micro_step),
        )

    @property
    def _train_rows(self) -> Any:
        """The dataset, as TRL's data loader reads it."""
        dataset = self.train_dataset
        return self._remove_unused_columns(dataset) if isinstance(dataset, Dataset) else dataset

    def _rows_of(self, prompts: list[int]) -> list[dict[str, Any]]:
        """This process's share of the rows: each prompt as often as it has completions."""
        places = [place for place in prompts for _ in range(self._group_size)]
        share = len(places) // self.accelerator.num_processes
        first, dataset = self.accelerator.process_index * share, self._train_rows
        rows = [dataset[place] for place in places[first : first + share]]
        return cast(list[dict[str, Any]], send_to_device(rows, self.accelerator.device))

    def _sample_round(self, inputs: list[dict[str, Any]], *, num_drawn: int = 0) -> Round:
        with self._aside(num_drawn) as (metrics, logs):
            output = super()._generate_and_score_completions(inputs)
        rewards_BR, self._round_rewards = self._round_rewards, None
        assert rewards_BR is not None
        rows = self._rows_of_all(output)
        return Round(rows, rewards_BR, self._informative(rewards_BR, rows), metrics, logs)

    @contextmanager
    def _aside(self, num_drawn: int) -> Iterator[tuple[dict[str, list[float]], dict[str, Any]]]:
        """Have TRL log into something else meanwhile."""
        metrics, logs = self._metrics["train"], self._logs
        table: dict[str, Any] = {name: [] for name in logs} | {
            name: defaultdict(list) for name in ("rewards", "extra")
        }
        self._metrics["train"], self._logs = defaultdict(list), table
        self._in_round, self._num_drawn = True, num_drawn
        try:
            yield self._metrics["train"], table
        finally:
            self._metrics["train"], self._logs = metrics, logs
            self._in_round, self._num_drawn = False, 0

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards_BR = super()._calculate_rewards(*args, **kwargs)
        if self._in_round:
            self._round_rewards = rewards_BR
        return rewards_BR

    def _informative(self, rewards_BR: Tensor, rows: Rows) -> Tensor:
        """Which groups have rewards that differ, and a completion that is not masked."""
        whole, size = self.whole_rewards, self._group_size
        informative_P = informative_groups(
            self.counting_rewards(rewards_BR)[:, whole].cpu(),
            group_size=size,
            weights_R=self.reward_weights[whole].cpu(),
            aggregation=cast(RewardAggregation, self.multi_objective_aggregation),
        )
        if STEP_REWARDS in rows and self.reward_weights[self.process_reward] != 0:
            counting_BT = self.counting_steps(rows[STEP_REWARDS], rewards_BR).cpu()
            informative_P = informative_P | informative_step_groups(
                counting_BT, group_size=size, baseline=self.options.step_baseline
            )
        counts_B = rows["completion_mask"].any(dim=1).cpu()
        return informative_P & counts_B.view(-1, self._group_size).any(dim=1)

    def _rows_of_all(self, output: dict[str, Any]) -> Rows:
        """The rows of all processes; every process must call it."""
        rows = {}
        for name, value in output.items():
            if value.ndim == 0:
                continue
            padded = self.accelerator.pad_across_processes(
                value, dim=1, pad_index=self._padding.get(name, 0), pad_first=name in PADDED_LEFT
            )
            rows[name] = self.accelerator.gather(padded)
        return rows

    @property
    def _padding(self) -> dict[str, float]:
        token = cast(int, self._tokenizer.pad_token_id)
        return {
            "prompt_ids": token,
            "completion_ids": token,
            "tool_mask": 1,
            STEP_REWARDS: math.nan,
        }

    # Log-probabilities wait -----------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        **kwargs: Any,
    ) -> Any:
        name = self._waits_as(model) if self._in_round else None
        if name is not None:
            self._waiting[name] = model
            return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, **kwargs
        )

    def _waits_as(self, model: nn.Module) -> str | None:
        """Name of what this forward pass is for, if it can wait for the finished batch."""
        if model is self.ref_model:
            return "ref_per_token_logps"
        is_reference_too = self.beta != 0.0 and self.ref_model is None  # with its adapter off
        kept = self._sampled is not None and self.can_reuse_logprobs(self._sampled)
        if self.use_vllm or is_reference_too or kept:
            return None
        return "old_per_token_logps"

    def _logprobs_of(self, model: nn.Module, rows: Rows) -> Tensor:
        checkpointing = grpo_trainer.disable_gradient_checkpointing(
            self.model, self._checkpointing_kwargs
        )
        with torch.no_grad(), checkpointing:
            found = self._get_per_token_logps_and_entropies(
                model,
                torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1),
                torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1),
                rows["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size,
            )
        return cast(Tensor, found[0])

    # The batch ------------------------------------------------------------------------------------

    def _filled_batch(self, rounds: Sequence[Round], chosen_B: Tensor) -> dict[str, Any]:
        """Return this process's share of the rows chosen, as TRL would return it."""
        rows = take_rows(join_rows([r.rows for r in rounds], padding=self._padding), chosen_B)
        rewards_BR = torch.cat([found.rewards_BR for found in rounds])
        steps = [rows.pop(STEP_REWARDS)] if STEP_REWARDS in rows else []
        advantages = self.compute_advantages(
            rewards_BR[chosen_B.to(rewards_BR.device)], self._group_size, *steps
        )
        if advantages is not None:
            rows["advantages"] = advantages.to(rows["advantages"])
        self._log_table(
            rounds, chosen_B, mean_advantages(rows["advantages"], rows["completion_mask"])
        )
        share = len(chosen_B) // self.accelerator.num_processes
        first = self.accelerator.process_index * share
        local = trim_padding(
            take_rows(rows, slice(first, first + share)),
            multiple_of=cast(int, self.pad_to_multiple_of or 1),
        )
        for name, model in self._waiting.items():
            local[name] = self._logprobs_of(model, local)
        num_items = (rows["completion_mask"] * rows.get("tool_mask", 1)).sum()
        return {**local, "num_items_in_batch": num_items}

    # Logs -----------------------------------------------------------------------------------------

    def _log_table(self, rounds: Sequence[Round], chosen_B: Tensor, advantages_B: Tensor) -> None:
        """Log the completions of the batch; what was thrown away counts in the metrics only."""
        chosen, sizes = chosen_B.tolist(), [len(found.rewards_BR) for found in rounds]
        parts = [found.logs for found in rounds]
        for name in ("prompt", "completion"):
            self._logs[name].extend(_chosen([part[name] for part in parts], sizes, chosen))
        for name in ("rewards", "extra"):
            for column in dict.fromkeys(chain.from_iterable(part[name] for part in parts)):
                values = [part[name].get(column, []) for part in parts]
                self._logs[name][column].extend(_chosen(values, sizes, chosen))
        self._logs["advantages"].extend(advantages_B.tolist())

    def _log_rounds(self, rounds: Sequence[Round]) -> None:
        """Log what TRL logs, over all that was sampled: what the policy does, not what was kept."""
        merged = merge_metrics(
            [found.metrics for found in rounds], [len(found.rewards_BR) for found in rounds]
        )
        rewards_BR = torch.cat([found.rewards_BR for found in rounds])
        names, weights_R = self.reward_func_names, self.reward_weights
        merged |= reward_metrics(rewards_BR, weights_R=weights_R, names=names)
        merged |= self.combination_metrics(rewards_BR)
        metrics = self._metrics["train"]
        for name, value in merged.items():
            metrics[name] = [value] if name == "num_tokens" else [*metrics[name], value]

    def _log_sampling(self, informative_D: Tensor, groups_P: Tensor, *, num_rounds: int) -> None:
        """Log the rate and the cost, and say once that a batch could not be filled."""
        num_drawn, num_slots = len(informative_D), len(groups_P)
        num_silent = int((~informative_D[groups_P]).sum())
        logged = {
            "rounds": num_rounds,
            "informative_fraction": int(informative_D.sum()) / num_drawn,
            "groups_drawn": num_drawn,
            "cost": num_drawn / num_slots,
            "unfilled": num_silent,
        }
        for name, value in logged.items():
            self._metrics["train"][f"dynamic_sampling/{name}"].append(float(value))
        if num_silent and not self._told_unfilled and self.is_world_process_zero():
            logger.warning(
                f"`dynamic_sampling` found {num_slots - num_silent} informative groups for the "
                f"{num_slots} places of a batch among {num_drawn} that it drew in {num_rounds} "
                "rounds; the other places hold groups of equal rewards, which teach nothing. Raise "
                "`dynamic_sampling_max_rounds`, or choose prompts that are neither too hard nor "
                "too easy, or a reward with more steps. (Told once: "
                "`dynamic_sampling/unfilled` counts on.)"
            )
        self._told_unfilled |= num_silent > 0


def _chosen(parts: Sequence[Sequence[Any]], sizes: Sequence[int], chosen: list[int]) -> list[Any]:
    """Return the chosen values of all rounds; ``None`` where a round has no such column."""
    values: list[Any] = []
    for part, size in zip(parts, sizes, strict=True):
        values += part if len(part) == size else [None] * size
    return [values[row] for row in chosen]


def _problems(given: Mapping[str, Any]) -> Iterator[str]:
    """Yield what cannot work in the arguments of the constructor, before a model loads."""
    args, dataset = given.get("args"), given.get("train_dataset")
    options = ExtensionOptions() if args is None else ExtensionOptions.of(args)
    if not (options.extensions and options.dynamic_sampling):
        return
    for name in ("rollout_func", "environment_factory"):
        if given.get(name) is not None:
            yield (
                f"`dynamic_sampling` is true, but a `{name}` is given, which may have prompts of "
                "its own, so further ones cannot be drawn. Set `dynamic_sampling: false`, or leave "
                f"`{name}` out."
            )
    if isinstance(dataset, IterableDataset):
        yield (
            "`dynamic_sampling` is true, but `train_dataset` is a stream, in which no further "
            "prompt can be looked up. Pass a `datasets.Dataset`, or set `dynamic_sampling: false`."
        )
    columns = getattr(dataset, "column_names", None) or []
    if images := sorted({"image", "images"} & set(columns)):
        yield (
            f"`dynamic_sampling` is true, but `train_dataset` has the column `{images[0]}`, and "
            "batches of images cannot be put together from several rounds. Remove it, or set "
            "`dynamic_sampling: false`."
        )
