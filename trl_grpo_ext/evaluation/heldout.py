"""Accuracy on held-out prompts: greedy or sampled replies, judged by a reward function."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from trl_grpo_ext.rewards.scores import checked_scores
from trl_grpo_ext.sampling import group_sample

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CORRECT_THRESHOLD = 0.5  # [reward] a score from here on counts as a right answer


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How many of a dataset's prompts were answered correctly.

    Attributes:
        accuracy: Share of the scored completions with at least 0.5; NaN if none was scored.
        num_prompts: Prompts of the dataset.
        num_scored: Completions that got a score.
        completions: The texts, prompt after prompt in the dataset's order.
        scores: One score a completion; None where there is none.
    """

    accuracy: float
    num_prompts: int
    num_scored: int
    completions: list[str]
    scores: list[float | None]

    @property
    def num_scored_prompts(self) -> int:
        """Prompts with a scored completion."""
        size = len(self.scores) // max(self.num_prompts, 1)
        return len({at // size for at, score in enumerate(self.scores) if score is not None})

    def __str__(self) -> str:
        """Return one line for a terminal."""
        if not self.num_prompts:
            return "not measured (no held-out prompts, or sharded weights)"
        scored = self.num_scored_prompts
        some = "" if scored == self.num_prompts else f"{scored} of "
        replies = f"{self.num_scored} replies to {some}{self.num_prompts} held-out prompts"
        return f"{self.accuracy:.3f} ({replies})"


def evaluate_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    is_correct: Callable[..., object],
    max_new_tokens: int,
    num_samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    chat_template_kwargs: Mapping[str, object] | None = None,
    accelerator: Accelerator | None = None,
) -> Accuracy:
    """Return the share of right answers: greedy, or sampled as in training (mean pass@1).

    Several processes share out the batches, and all return the result that one would. Each needs
    all weights: where they are sharded (FSDP, DeepSpeed), the recipe does not measure.

    Args:
        model: Any causal language model; its mode is left as it was.
        tokenizer: With a chat template, if the prompts are conversations.
        dataset: With a column ``prompt`` (messages or text) and what ``is_correct`` reads.
        is_correct: A reward function, called as TRL does, once in each process that has replies;
            may be asynchronous. A score of at least 0.5 is a right answer; None, NaN and infinity
            leave the reply out.
        max_new_tokens: Tokens that a completion may have at most.
        num_samples: Replies sampled for each prompt; 0 for the one greedy reply.
        temperature: Of the sampled replies.
        seed: Of the sampled replies. Each has random numbers of its own, by the position of its
            prompt in the dataset, so that neither ``batch_size`` nor the number of processes
            changes it. The random state of the process is left alone.
        batch_size: Replies that one process generates at a time.
        chat_template_kwargs: More arguments of the chat template.
        accelerator: Of a run with several processes; one process does all of it if None.

    Returns:
        The accuracy, with every completion and its score.

    Raises:
        RewardError: ``is_correct`` did not return one number or None a completion.
    """
    prompts = list(dataset["prompt"])
    # The longest come first: if a batch does not fit into memory, that shows at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(str(prompts[index])))
    group_size = num_samples or 1
    width = max(batch_size // group_size, 1)
    batches = [order[start : start + width] for start in range(0, len(order), width)]
    rank = 0 if accelerator is None else accelerator.process_index
    step = 1 if accelerator is None else accelerator.num_processes
    rows: list[tuple[int, str, list[int]]] = []
    own = range(rank, len(batches), step)
    for number in tqdm(own, desc="evaluating", unit="batch", disable=rank > 0 or not own):
        samples = group_sample(
            model if accelerator is None else accelerator.unwrap_model(model),
            tokenizer,
            [prompts[index] for index in batches[number]],
            num_generations=group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature if num_samples else 0.0,
            seed=seed,
            prompt_indices=batches[number],
            chat_template_kwargs=chat_template_kwargs,
        )
        indices = [index for index in batches[number] for _ in range(group_size)]
        rows += zip(indices, samples.completions, samples.completion_ids, strict=True)
    rows.sort(key=lambda row: row[0])
    scores = _scores(is_correct, dataset, rows) if rows else []
    results = [(*row[:2], score) for row, score in zip(rows, scores, strict=True)]
    if accelerator is not None:
        from accelerate.utils import gather_object

        results = sorted(gather_object(results), key=lambda result: result[0])
    scores = [score for _, _, score in results]
    right = [score >= CORRECT_THRESHOLD for score in scores if score is not None]
    return Accuracy(
        accuracy=sum(right) / len(right) if right else math.nan,
        num_prompts=len(prompts),
        num_scored=len(right),
        completions=[text for _, text, _ in results],
        scores=scores,
    )


def _scores(
    is_correct: Callable[..., object], dataset: Dataset, rows: list[tuple[int, str, list[int]]]
) -> list[float | None]:
    """Call the reward function as TRL's trainer does, on each row: index, text and tokens."""
    columns: dict[str, list[Any]] = dataset[[index for index, _, _ in rows]]
    other = columns.keys() - {"prompt", "completion", "completion_ids"}
    completions: list[object] = [text for _, text, _ in rows]
    if not isinstance(columns["prompt"][0], str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    values = is_correct(
        prompts=columns["prompt"],
        completions=completions,
        completion_ids=[ids for _, _, ids in rows],
        trainer_state=None,
        log_extra=_ignore,
        log_metric=_ignore,
        **{name: columns[name] for name in other},
    )
    if inspect.iscoroutine(values):
        values = asyncio.run(values)
    name = getattr(is_correct, "__name__", type(is_correct).__name__)
    return checked_scores(values, name=name, num_completions=len(rows))[0]


def _ignore(*_: object, **__: object) -> None:
    """Stand in for the trainer's ``log_extra`` and ``log_metric``."""
