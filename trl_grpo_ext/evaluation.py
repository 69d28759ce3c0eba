"""Accuracy on held-out prompts: greedy completions, judged by a reward function."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, SupportsFloat, cast

import torch
from torch import Tensor
from tqdm import tqdm

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.sampling import group_sample

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Message = Mapping[str, object]
Prompt = str | Sequence[Message]

CORRECT_THRESHOLD = 0.5  # [reward] a score from here on counts as a right answer


class Scorer(Protocol):
    """A reward function as TRL calls it: columns of the dataset by name, one score a completion."""

    def __call__(self, **columns: object) -> Sequence[float | None]:
        """Return one score a completion, or None where it cannot be scored."""


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

    def __str__(self) -> str:
        """Return one line for a terminal."""
        replies = f"{self.num_scored} replies to {self.num_prompts} held-out prompts"
        return f"{self.accuracy:.3f} ({replies})"


def evaluate_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    is_correct: Scorer,
    max_new_tokens: int,
    num_samples: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    chat_template_kwargs: Mapping[str, object] | None = None,
    accelerator: Accelerator | None = None,
) -> Accuracy:
    """Return the share of right answers: greedy, or sampled as in training (mean pass@1).

    With several processes each answers and judges its own share, and all return the same result.

    Args:
        model: Any causal language model; its mode and generation settings are left as they were.
        tokenizer: With a chat template, if the prompts are conversations.
        dataset: With a column ``prompt`` (messages or text) and what ``is_correct`` reads.
        is_correct: Called once with ``prompts``, ``completions`` (messages for conversations, as
            in TRL) and every other column by name. A score of at least 0.5 is a right answer;
            None, NaN and infinity leave the prompt out.
        max_new_tokens: Tokens that a completion may have at most.
        num_samples: Replies sampled for each prompt; 0 for the one greedy reply.
        temperature: Of the sampled replies.
        seed: Of the sampled replies. The random state of the process is left alone.
        batch_size: Replies that one process generates at a time.
        chat_template_kwargs: More arguments of the chat template.
        accelerator: Of a run with several processes; one process does all of it if None.

    Returns:
        The accuracy, with every completion and its score.

    Raises:
        RewardError: ``is_correct`` did not return one number or None a completion.
    """
    columns = {name: list(dataset[name]) for name in dataset.column_names}
    share = _share_of_process(len(dataset), accelerator=accelerator)
    num_replies = max(num_samples, 1)
    padded = _padded_share(share, len(dataset), accelerator)
    generate = functools.partial(
        generate_greedy if num_samples == 0 else generate_samples,
        _unwrapped(model, accelerator=accelerator),
        tokenizer,
        [columns["prompt"][index] for index in padded],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        chat_template_kwargs=chat_template_kwargs,
        show_progress=accelerator is None or accelerator.is_main_process,
    )
    sampling = {"num_samples": num_samples, "temperature": temperature, "seed": seed}
    completions = generate(**sampling) if num_samples else generate()
    share = [index for index in share for _ in range(num_replies)]
    completions = completions[: len(share)]
    own_columns = {name: [values[index] for index in share] for name, values in columns.items()}
    scores = _scores(is_correct, completions=completions, columns=own_columns) if share else []
    rows = _gathered(list(zip(share, completions, scores, strict=True)), accelerator=accelerator)
    return _accuracy(
        completions=[row[1] for row in rows],
        scores=[row[2] for row in rows],
        num_prompts=len(dataset),
    )


def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    chat_template_kwargs: Mapping[str, object] | None = None,
    show_progress: bool = True,
) -> list[str]:
    """Return ``num_samples`` sampled replies to each prompt, prompt after prompt.

    Args:
        model: As for :func:`generate_greedy`.
        tokenizer: As for :func:`generate_greedy`.
        prompts: As for :func:`generate_greedy`.
        num_samples: Replies a prompt, at least 1.
        max_new_tokens: Tokens that a reply may have at most.
        temperature: Logits are divided by it.
        seed: The same seed gives the same replies on the same device.
        batch_size: Replies that are generated at a time.
        chat_template_kwargs: More arguments of the chat template.
        show_progress: Whether to draw a progress bar.
    """
    replies: list[str] = []
    at_a_time = max(batch_size // num_samples, 1)
    total = len(prompts) * num_samples
    with tqdm(total=total, desc="evaluating", unit="reply", disable=not show_progress) as bar:
        for start in range(0, len(prompts), at_a_time):
            samples = group_sample(
                model,
                tokenizer,
                prompts[start : start + at_a_time],
                num_generations=num_samples,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed + start,
                chat_template_kwargs=chat_template_kwargs,
            )
            replies += samples.completions
            bar.update(len(samples.completions))
    return replies


@torch.no_grad()
def generate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    chat_template_kwargs: Mapping[str, object] | None = None,
    show_progress: bool = True,
) -> list[str]:
    """Return the model's most likely continuation of each prompt, token by token.

    Prompts of similar length share a batch, so that little is padded.

    Args:
        model: Any causal language model; its mode and generation settings are left as they were.
        tokenizer: With a chat template, if the prompts are conversations.
        prompts: Texts or lists of messages. A last message by the assistant is continued.
        max_new_tokens: Tokens that a completion may have at most.
        batch_size: Prompts in one call of ``generate``.
        chat_template_kwargs: More arguments of the chat template.
        show_progress: Whether to draw a progress bar.

    Returns:
        One text a prompt, in the order of the prompts, without special tokens.

    Raises:
        ValueError: a prompt has no tokens.
    """
    prompt_ids = [_prompt_ids(tokenizer, prompt, chat_template_kwargs or {}) for prompt in prompts]
    # The longest come first: if the batch does not fit into memory, that shows at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompt_ids[index]))
    texts: dict[int, str] = {}
    with _greedy_mode(model, tokenizer, max_new_tokens=max_new_tokens) as config:
        bar = tqdm(total=len(prompts), desc="evaluating", unit="prompt", disable=not show_progress)
        with bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                completions = _generate_batch(model, [prompt_ids[i] for i in batch], config=config)
                texts.update(zip(batch, map(_decoder(tokenizer), completions), strict=True))
                bar.update(len(batch))
    return [texts[index] for index in range(len(prompts))]


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat_template_kwargs: Mapping[str, object]
) -> list[int]:
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
    else:
        ids = _chat_ids(tokenizer, list(prompt), chat_template_kwargs)
    if not ids:
        raise ValueError("a prompt has no tokens, so there is nothing to continue: remove its row")
    return ids


def _chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    chat_template_kwargs: Mapping[str, object],
) -> list[int]:
    continued = messages[-1]["role"] == "assistant"
    apply = cast("Callable[..., Mapping[str, list[int]]]", tokenizer.apply_chat_template)
    encoded = apply(
        messages,
        add_generation_prompt=not continued,
        continue_final_message=continued,
        tokenize=True,
        return_dict=True,
        **chat_template_kwargs,
    )
    return encoded["input_ids"]


@contextmanager
def _greedy_mode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int
) -> Iterator[GenerationConfig]:
    """Put the model into evaluation mode, with greedy settings only, and restore both afterwards.

    ``generate`` fills what its ``generation_config`` leaves open from the model's own, and warns of
    sampling values there: so the model's own is replaced, not only overridden.
    """
    # PEFT's wrapper copies its own settings onto the model inside, which is the one that counts.
    owner: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
    training, settings = model.training, owner.generation_config
    config = _greedy_config(settings, tokenizer=tokenizer, max_new_tokens=max_new_tokens)
    owner.generation_config = config
    model.train(False)
    try:
        yield config
    finally:
        owner.generation_config = settings
        model.train(training)


def _greedy_config(
    settings: GenerationConfig, *, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    from transformers import GenerationConfig

    eos_token_ids = _eos_token_ids(settings.eos_token_id, tokenizer=tokenizer)
    pad_token_id = tokenizer.pad_token_id
    build: Callable[..., GenerationConfig] = GenerationConfig
    return build(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=settings.bos_token_id,
        eos_token_id=eos_token_ids or None,
        pad_token_id=next(iter(eos_token_ids), 0) if pad_token_id is None else pad_token_id,
    )


def _eos_token_ids(
    model_ids: int | Sequence[int] | None, *, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return what ends a completion in training too: the model's tokens and the tokenizer's."""
    ids = [model_ids] if isinstance(model_ids, int) else list(model_ids or [])
    own = tokenizer.eos_token_id
    return ids if own is None or own in ids else [own, *ids]


def _generate_batch(
    model: PreTrainedModel, prompt_ids: Sequence[list[int]], *, config: GenerationConfig
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to the first that ends the completion."""
    input_ids, attention_mask = _left_padded(prompt_ids, pad_token_id=config.pad_token_id)
    generate = cast("Callable[..., Tensor]", model.generate)
    sequences = generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=config,
    )
    new_ids: list[list[int]] = sequences[:, input_ids.shape[1] :].tolist()
    return [_until_end(row, ends=config.eos_token_id or []) for row in new_ids]


def _left_padded(rows: Sequence[list[int]], *, pad_token_id: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    input_ids = [[pad_token_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(input_ids), torch.tensor(mask)


def _until_end(row: list[int], *, ends: Sequence[int]) -> list[int]:
    end = next((position for position, token in enumerate(row) if token in ends), len(row))
    return row[:end]


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def _scores(
    is_correct: Scorer, *, completions: list[str], columns: Mapping[str, list[object]]
) -> list[float | None]:
    prompts = columns["prompt"]
    others = {name: values for name, values in columns.items() if name != "prompt"}
    if not isinstance(prompts[0], str):
        replies: list[object] = [[{"role": "assistant", "content": text}] for text in completions]
    else:
        replies = list(completions)
    scores = is_correct(prompts=prompts, completions=replies, **others)
    if len(scores) != len(completions):
        raise RewardError(
            f"`is_correct` returned {len(scores)} scores for {len(completions)} completions, so "
            "they cannot be matched. Return one number or None a completion."
        )
    return [_score(score) for score in scores]


def _score(score: object) -> float | None:
    if score is None:
        return None
    if not isinstance(score, SupportsFloat):
        raise RewardError(
            f"`is_correct` returned a {type(score).__name__}, so it cannot be compared with "
            f"{CORRECT_THRESHOLD}. Return one number or None a completion."
        )
    value = float(score)
    return value if math.isfinite(value) else None


def _accuracy(*, completions: list[str], scores: list[float | None], num_prompts: int) -> Accuracy:
    right = [score >= CORRECT_THRESHOLD for score in scores if score is not None]
    return Accuracy(
        accuracy=sum(right) / len(right) if right else math.nan,
        num_prompts=num_prompts,
        num_scored=len(right),
        completions=completions,
        scores=scores,
    )


def _unwrapped(model: PreTrainedModel, *, accelerator: Accelerator | None) -> PreTrainedModel:
    return model if accelerator is None else accelerator.unwrap_model(model)


def _share_of_process(num_rows: int, *, accelerator: Accelerator | None) -> list[int]:
    indices = list(range(num_rows))
    if accelerator is None:
        return indices
    with accelerator.split_between_processes(indices) as share:
        return list(share)


def _padded_share(share: list[int], num_rows: int, accelerator: Accelerator | None) -> list[int]:
    """Return the share, filled up so that all processes run as many batches.

    Where the weights are sharded, each forward pass is a collective that all have to join.
    """
    num_processes = 1 if accelerator is None else accelerator.num_processes
    largest = math.ceil(num_rows / num_processes)
    return share + [num_rows - 1] * (largest - len(share))


Row = tuple[int, str, float | None]


def _gathered(rows: list[Row], *, accelerator: Accelerator | None) -> list[Row]:
    if accelerator is None:
        return rows
    from accelerate.utils import gather_object

    gathered: list[Row] = gather_object(rows)
    return sorted(gathered, key=lambda row: row[0])
