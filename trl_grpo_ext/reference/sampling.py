"""Completions of the policy on training prompts: what a reference is calibrated and measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_grpo_ext.reference.completions import CompletionBatch, completion_batches
from trl_grpo_ext.sampling import GroupSamples, group_sample
from trl_grpo_ext.sampling.group_sampler import Prompt

_NUM_PROMPTS = 1024  # that are looked at
_NUM_HELD_OUT = 24  # prompts that fidelity is measured on
_CHUNK = 32  # completions that are sampled at a time
_MAX_ROUNDS = 8  # completions of a prompt, where there are few prompts
_BATCH_TOKENS = 2048  # of a forward pass


class CalibrationData(NamedTuple):
    """Completions of the policy, of different prompts."""

    calibration: Sequence[CompletionBatch]
    held_out: Sequence[CompletionBatch]


@dataclass(frozen=True, kw_only=True)
class CalibrationSampler:
    """Draws completions of the policy until there are enough tokens.

    Attributes:
        tokenizer: Of the policy.
        prompts: Texts or conversations; every fourth one, at most 24, is held out.
        num_tokens: Of prompts and completions together, to calibrate on; 0 for none.
        max_new_tokens: Of a completion.
        seed: Of the draws, which leave torch's random state alone.
        sampling: More arguments of :func:`~trl_grpo_ext.sampling.group_sample`: temperature and so
            on.
        progress: Whether to show a bar.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    num_tokens: int
    max_new_tokens: int
    seed: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = False

    @property
    def identity(self) -> str:
        """A hash of all that decides what is drawn of a policy."""
        drawn = (self.prompts, self.num_tokens, self.max_new_tokens, self.seed)
        text = repr((*drawn, sorted(self.sampling.items())))
        return hashlib.sha256(text.encode()).hexdigest()

    def __call__(self, policy: PreTrainedModel) -> CalibrationData:
        """Return completions of different prompts to calibrate and to measure on.

        A single prompt serves for both.
        """
        held_out = self.prompts[3::4][:_NUM_HELD_OUT] or self.prompts
        others = [prompt for prompt in self.prompts if prompt not in held_out] or held_out
        drawn: list[GroupSamples] = []
        num_tokens = 0
        for number, chunk in enumerate(self._chunks(others)):
            if num_tokens >= self.num_tokens:
                break
            drawn.append(self._sample(policy, chunk, step=number + 1))
            num_tokens += _num_tokens(drawn[-1])
        measured = self._sample(policy, held_out, step=0)
        return CalibrationData(self._batches(policy, drawn), self._batches(policy, [measured]))

    def _chunks(self, prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
        for _ in range(_MAX_ROUNDS):
            for start in range(0, len(prompts), _CHUNK):
                yield prompts[start : start + _CHUNK]

    def _sample(
        self, policy: PreTrainedModel, prompts: Sequence[Prompt], *, step: int
    ) -> GroupSamples:
        return group_sample(
            policy,
            self.tokenizer,
            prompts,
            num_generations=1,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            step=step,
            progress=self.progress,
            **self.sampling,
        )

    def _batches(
        self, policy: PreTrainedModel, drawn: Sequence[GroupSamples]
    ) -> list[CompletionBatch]:
        return completion_batches(
            [ids for samples in drawn for ids in samples.prompt_ids],
            [ids for samples in drawn for ids in samples.completion_ids],
            max_tokens=_BATCH_TOKENS,
            device=policy.device,
        )


def different_prompts(dataset: Any) -> list[Prompt]:
    """Return the first prompts of a dataset, each once."""
    found: dict[str, Prompt] = {}
    for row in islice(iter(dataset), _NUM_PROMPTS):
        found.setdefault(repr(row["prompt"]), row["prompt"])
    return list(found.values())


def _num_tokens(samples: GroupSamples) -> int:
    return sum(map(len, samples.prompt_ids)) + sum(map(len, samples.completion_ids))
