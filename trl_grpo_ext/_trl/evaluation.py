"""TRL's trainer with an evaluation that counts each prompt once.

TRL's loop runs as it is, with its loss and its forward passes. At the end TRL's means of batch
means give way to metrics of all prompts. A greedy pass beside the sampled one only generates and
scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from trl_grpo_ext._trl.eval_rows import EvalRowSeams
from trl_grpo_ext.config import ExtensionOptions
from trl_grpo_ext.data_checks import too_few_prompts
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.evaluation.groups import EvalGroups
from trl_grpo_ext.evaluation.metrics import MetricSettings, group_metrics, spread_metrics
from trl_grpo_ext.evaluation.options import eval_ks, long_best_problem, unnamed_best_problem
from trl_grpo_ext.randomness import random_state, set_random_state
from trl_grpo_ext.rewards.registry import log_name


class EvaluationSeams(EvalRowSeams):
    """``trl.GRPOTrainer`` whose evaluation reports pass@k, majority votes and intervals."""

    def __init__(
        self,
        *args: Any,
        compute_metrics: Callable[[EvalGroups], Mapping[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        given = inspect.signature(GRPOTrainer).bind_partial(*args, **kwargs).arguments
        if problems := list(_problems(given, compute_metrics)):
            raise ConfigurationError(problems)
        self.compute_group_metrics = compute_metrics
        super().__init__(*args, **kwargs)
        if self.extended and self.options.eval_decoding == "greedy":
            self.num_generations_eval = 1

    # The eval set, each time in the same order ----------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return TRL's; a stream is read into memory, once.

        So it is the same each time, and its prompts can be counted with any number of processes.
        """
        if self.extended:
            eval_dataset = self._without_stream(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def _without_stream(self, eval_dataset: Any) -> Any:
        own: Any = self.eval_dataset
        if eval_dataset is None and isinstance(own, IterableDataset):
            self.eval_dataset = _in_memory(own)
        elif isinstance(eval_dataset, str) and isinstance(own[eval_dataset], IterableDataset):
            self.eval_dataset = {**own, eval_dataset: _in_memory(own[eval_dataset])}
        elif isinstance(eval_dataset, IterableDataset):
            return _in_memory(eval_dataset)
        return eval_dataset

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        sampler: Any = super()._get_eval_sampler(eval_dataset)
        if self.extended:
            sampler.shuffle = False
        return sampler

    # The loop -------------------------------------------------------------------------------------

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Run TRL's loop, and return the metrics of its prompts, each counted once."""
        kwargs["metric_key_prefix"] = metric_key_prefix
        if not self.extended:
            return cast(EvalLoopOutput, super().evaluation_loop(dataloader, *args, **kwargs))
        self._check_before_evaluation(dataloader.dataset)
        self._metrics["eval"].clear()  # what an interrupted evaluation left
        decoding = self.options.eval_decoding
        with self._same_random_numbers():
            with (
                self._collecting(len(dataloader.dataset)) as collected,
                self._greedy() if decoding == "greedy" else nullcontext(),
            ):
                output = cast(EvalLoopOutput, super().evaluation_loop(dataloader, *args, **kwargs))
            groups = self._gathered(collected)
            metrics = self._batch_metrics(collected) | self._spreads(groups)
            num_tokens = metrics.pop("num_tokens", 0.0)
            metrics |= self._measured(groups)
            if decoding == "both":
                found = self._measured(self._greedy_groups(groups))
                metrics |= {f"greedy/{name}": value for name, value in found.items()}
        cast(dict[str, float], output.metrics).update(_prefixed(metrics, f"{metric_key_prefix}_"))
        self._metrics["eval"]["num_tokens"] = [num_tokens]  # of the run, so TRL logs it of no set
        return output

    def _check_before_evaluation(self, dataset: Any) -> None:
        processes, size = self.accelerator.num_processes, self.args.eval_batch_size
        if processes * size % cast(int, self.num_generations_eval):
            raise ConfigurationError(
                [
                    f"`num_generations_eval`={self.num_generations_eval} does not divide the eval "
                    f"batch of {processes * size} completions (`per_device_eval_batch_size`={size} "
                    f"x {processes} process{'' if processes == 1 else 'es'}), so a group would be "
                    "split. Change `per_device_eval_batch_size` or `num_generations_eval`."
                ]
            )
        if problem := _task_problem(self.options.eval_task_column, dataset):
            raise ConfigurationError([problem])

    @contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        """Start the global generators anew, and give training back its own."""
        state = random_state()
        set_seed(self.args.seed + self.args.process_index)
        try:
            yield
        finally:
            set_random_state(state)

    def _greedy_groups(self, groups: EvalGroups) -> EvalGroups:
        """Return the greedy completion of each prompt with its scores."""
        examples, processes = groups.examples, self.accelerator.num_processes
        width = self.args.eval_batch_size * processes
        with (
            self._greedy(),
            self._collecting(len(examples)) as collected,
            self._only_scores(),
            torch.no_grad(),
        ):
            self._num_evaluated = 0
            for start in self._bar(range(0, len(examples), width)):
                self.between_batches()
                batch = examples[start : start + width]
                batch += batch[:1] * (-len(batch) % processes)
                share = len(batch) // processes
                first = self.accelerator.process_index * share
                self._generate_and_score_completions(batch[first : first + share])
        self._metrics["eval"].clear()
        return self._gathered(collected)

    def between_batches(self) -> None:
        """Do what is due between two batches of a greedy pass; every process calls it."""

    def _bar(self, starts: range) -> Any:
        return tqdm(
            starts,
            desc="greedy",
            disable=self.args.disable_tqdm or not self.is_world_process_zero(),
            leave=not self.is_in_train,
            dynamic_ncols=True,
        )

    # Metrics --------------------------------------------------------------------------------------

    def _measured(self, groups: EvalGroups) -> dict[str, float]:
        """Return the metrics of the groups, with those of the user."""
        if not groups.num_prompts:
            return {}
        options = self.options
        settings = MetricSettings(
            ks=eval_ks(options, group_size=groups.group_size),
            correct_threshold=options.eval_correct_threshold,
            num_resamples=options.eval_bootstrap,
            seed=self.args.seed,
            task_column=options.eval_task_column,
        )
        metrics = group_metrics(groups, settings)
        if self.compute_group_metrics is not None:
            metrics |= _numbers(self.compute_group_metrics(groups))
        return metrics

    def _spreads(self, groups: EvalGroups) -> dict[str, float]:
        """Return TRL's metrics that are no means over prompts."""
        if not groups.num_prompts:
            return {}
        metrics = spread_metrics(groups)
        rewards_BR = groups.rewards_BR.to(self.accelerator.device)
        advantages_B = self.compute_advantages(rewards_BR, groups.group_size)
        if advantages_B is not None:
            silent_P = (advantages_B.view(-1, groups.group_size) == 0).all(dim=1)
            metrics["frac_reward_zero_std"] = silent_P.float().mean().item()
        return metrics


def _prefixed(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return the metrics under their prefix, as ``transformers`` does."""
    return {k if k.startswith(prefix) else f"{prefix}{k}": v for k, v in metrics.items()}


def _in_memory(stream: IterableDataset) -> Dataset:
    return Dataset.from_list(list(stream), features=stream.features)


def _problems(given: Mapping[str, Any], compute_metrics: object) -> Iterator[str]:
    """Yield what cannot work in the arguments of the constructor, before a model loads."""
    args, sets = given.get("args"), given.get("eval_dataset")
    options = ExtensionOptions() if args is None else ExtensionOptions.of(args)
    if compute_metrics is not None and not options.extensions:
        yield (
            "`compute_metrics` is given, but `extensions` is false, so TRL evaluates, which calls "
            "no such function. Set `extensions: true`, or remove `compute_metrics`."
        )
    if compute_metrics is not None and not callable(compute_metrics):
        yield (
            f"`compute_metrics` is a {type(compute_metrics).__name__}, which cannot be called. "
            "Pass a function from EvalGroups to a dict of numbers, or leave it out."
        )
    if given.get("rollout_func") is not None and options.eval_decoding != "sampled":
        yield (
            f"`eval_decoding` is {options.eval_decoding!r}, but a `rollout_func` generates the "
            "completions, and cannot be told to be greedy. Set `eval_decoding: sampled`."
        )
    if args is not None and options.extensions:
        yield from _best_problems(args, given)
        batch_size, group_size = cast(int, args.generation_batch_size), args.num_generations
        rows = given.get("train_dataset")
        if problem := too_few_prompts(rows, batch_size=batch_size, group_size=group_size):
            yield problem
    for dataset in sets.values() if isinstance(sets, dict) else [sets]:
        if problem := _task_problem(options.eval_task_column, dataset):
            yield problem


def _best_problems(args: GRPOConfig, given: Mapping[str, Any]) -> Iterator[str]:
    metric, sets = args.metric_for_best_model, given.get("eval_dataset")
    if metric is None or args.eval_strategy == "no":
        return
    if isinstance(sets, dict) and (problem := unnamed_best_problem(metric, sets=sets)):
        yield problem
    rewards = given.get("reward_funcs")
    first = rewards[0] if isinstance(rewards, list) and rewards else rewards
    if callable(first) and (problem := long_best_problem(metric, first_reward=log_name(first))):
        yield problem


def _task_problem(column: str | None, dataset: Any) -> str | None:
    columns = getattr(dataset, "column_names", None)
    if column is None or columns is None or column in columns:
        return None
    return (
        f"`eval_task_column` is {column!r}, but an eval set has the columns {', '.join(columns)}, "
        "so its prompts have no task. Name one of these, or remove `eval_task_column` (with "
        "`remove_unused_columns: true` no other column is left)."
    )


def _numbers(found: object) -> dict[str, float]:
    """Return what ``compute_metrics`` returned, checked."""
    try:
        return {str(name): float(value) for name, value in dict(cast(Any, found)).items()}
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            [
                f"`compute_metrics` returned a {type(found).__name__} that is no dict of numbers "
                f"({error}), so it cannot be logged. Return such as {{'short': 0.5}}."
            ]
        ) from None
