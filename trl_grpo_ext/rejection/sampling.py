"""From prompts to scored candidates, with a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_grpo_ext.errors import RewardOutageError
from trl_grpo_ext.rejection.candidates import Candidate, Group
from trl_grpo_ext.rejection.options import RejectionArguments, mapping
from trl_grpo_ext.rejection.provenance import prompt_id
from trl_grpo_ext.rewards.missing import excludes_without
from trl_grpo_ext.rewards.registry import RewardFunction
from trl_grpo_ext.rewards.score_file import Completions, Scored, score_completions
from trl_grpo_ext.sampling import GroupSamples, group_sample
from trl_grpo_ext.sampling.group_sampler import Prompt

Draw = Callable[[Sequence[Prompt], Sequence[int]], GroupSamples]
"""Samples prompts, which their numbers stand for in the random numbers."""

Sampler = Callable[[Sequence[int]], list[Group]]
"""Samples and scores the rows with these numbers."""

_MAX_LEAKED = 8  # names of special tokens that are noted of a candidate


def group_draw(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, options: RejectionArguments
) -> Draw:
    """Return a draw by :func:`~trl_grpo_ext.sampling.group_sample`.

    Args:
        policy: What samples.
        tokenizer: Its tokenizer.
        options: Of the run.
    """

    def draw(prompts: Sequence[Prompt], indices: Sequence[int]) -> GroupSamples:
        return group_sample(
            policy,
            tokenizer,
            prompts,
            num_generations=options.num_generations,
            seed=options.seed,
            prompt_indices=indices,
            chat_template_kwargs=mapping(options.chat_template_kwargs),
            max_live_tokens=options.max_live_tokens,
            **{**options.sampling(), "generation_kwargs": mapping(options.generation_kwargs)},
        )

    return draw


def make_sampler(
    draw: Draw,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    rewards: Sequence[RewardFunction],
    options: RejectionArguments,
) -> Sampler:
    """Return what samples and scores the prompts of some rows, by their numbers.

    The random numbers of a candidate depend on the seed, the number of its row and its own index
    alone.

    Args:
        draw: What samples: :func:`group_draw`, or
            :func:`~trl_grpo_ext.rejection.vllm_sampling.vllm_draw`.
        tokenizer: Of the model that samples.
        rows: Of the task.
        rewards: Called as in training.
        options: Of the run.

    Raises:
        RewardOutageError: From the returned function: a reward that excludes what it could not
            score left out more of a batch than ``max_unscored_fraction``.
    """

    def sample(indices: Sequence[int]) -> list[Group]:
        part = rows.select(indices)
        samples = draw(list(part["prompt"]), list(indices))
        found = as_completions(part, samples)
        scored = [score_completions(reward, found) for reward in rewards]
        needs = {
            reward: [
                excludes_without(reward, row) for row in part for _ in range(samples.group_size)
            ]
            for reward in rewards
        }
        for reward, one in zip(rewards, scored, strict=True):
            _refuse_outage(reward, one, needs[reward], most=options.max_unscored_fraction)
        leaked = leaked_tokens(samples, tokenizer)
        flat = [
            Candidate(
                index=at % options.num_generations,
                text=samples.completions[at],
                num_tokens=len(samples.completion_ids[at]),
                finished=samples.finish_reasons[at] == "stop",
                special_tokens=leaked[at],
                scores={one.name: one.scores[at] for one in scored},
                scored=all(
                    one.scores[at] is not None or not needs[reward][at]
                    for reward, one in zip(rewards, scored, strict=True)
                ),
            )
            for at in range(len(samples.completions))
        ]
        return _groups(indices, part, flat)

    return sample


def as_completions(rows: Dataset, samples: GroupSamples) -> Completions:
    """Return the samples as a reward takes them, with each row's columns for each of its group."""
    size = samples.group_size
    columns: dict[str, list[Any]] = {
        name: [value for value in rows[name] for _ in range(size)]
        for name in rows.column_names
        if name != "prompt"
    }
    columns["prompts"] = list(samples.prompts)
    columns["completions"] = [
        [{"role": "assistant", "content": text}] for text in samples.completions
    ]
    columns["completion_ids"] = list(samples.completion_ids)
    return Completions(rows=[], row_of=range(len(samples.completions)), columns=columns)


def leaked_tokens(
    samples: GroupSamples, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, ...]]:
    """Return the special tokens within each completion; the one that ended it is none of them."""
    added = tokenizer.added_tokens_decoder.items()
    names = {index: str(token) for index, token in added if token.special}
    names |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return [
        tuple(names[i] for i in (ids[:-1] if reason == "stop" else ids) if i in names)[:_MAX_LEAKED]
        for ids, reason in zip(samples.completion_ids, samples.finish_reasons, strict=True)
    ]


def _groups(indices: Sequence[int], rows: Dataset, flat: Sequence[Candidate]) -> list[Group]:
    size = len(flat) // len(indices)
    return [
        Group(
            prompt_index=index,
            prompt_id=prompt_id(row),
            prompt=row["prompt"],
            answer=row.get("answer"),
            candidates=flat[at * size : (at + 1) * size],
        )
        for at, (index, row) in enumerate(zip(indices, rows, strict=True))
    ]


def _refuse_outage(
    reward: RewardFunction, scored: Scored, needed: Sequence[bool], *, most: float
) -> None:
    asked = [score for score, needs in zip(scored.scores, needed, strict=True) if needs]
    num_missing = asked.count(None)
    if num_missing <= most * len(asked):
        return
    failure = getattr(reward, "failure", "")
    raise RewardOutageError(
        f"the reward '{scored.name}' has no score for {num_missing} of {len(asked)} "
        f"candidates{f' ({failure})' if failure else ''}, so right ones would be lost. See that "
        "the service answers (`trl-grpo-ext check-reward`), and start the same again: it goes on "
        "with this batch."
    )
