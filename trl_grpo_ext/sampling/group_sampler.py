"""Group sampling from texts to texts; :mod:`trl_grpo_ext.sampling.decoding` does the work.

Shapes: ``P`` prompts, ``G`` completions a prompt, ``B = P * G`` rows with the completions of prompt
``p`` at ``p*G .. p*G+G-1``, ``S`` tokens of the longest prompt, ``T`` completion tokens, ``V``
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_grpo_ext.sampling.decoding import Completion, check_prompts, sample_completions
from trl_grpo_ext.sampling.settings import SamplingSettings
from trl_grpo_ext.sampling.streams import CompletionKey

Prompt = str | Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class GroupSamples:
    """Groups of completions; lists have ``B = P * G`` entries, group after group.

    Attributes:
        prompts: Each prompt ``G`` times in a row, as it was given.
        prompt_ids: Its tokens.
        completion_ids: Sampled tokens, the end-of-sequence token included.
        completions: Their text, without special tokens.
        policy_logprobs: Log-probability of each sampled token under temperature alone (1 where
            greedy): what the loss uses.
        sampling_logprobs: Log-probability under everything that shaped the draw (temperature,
            top-k, top-p, min-p, repetition penalty and so on).
        finish_reasons: ``"stop"`` after an end-of-sequence token, ``"length"`` at the limit.
        group_size: ``G``.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    completions: list[str]
    policy_logprobs: list[Tensor]
    sampling_logprobs: list[Tensor]
    finish_reasons: list[Literal["stop", "length"]]
    group_size: int

    @property
    def logprob_sums(self) -> Tensor:
        """Log-probability of each completion under temperature alone, nats, shape ``(B,)``."""
        return torch.stack([logprobs.sum() for logprobs in self.policy_logprobs])

    @property
    def mask_BT(self) -> Tensor:
        """1 on the completion's tokens, 0 on padding; shape ``(B, T)``, float32."""
        return _padded([torch.ones(len(ids)) for ids in self.completion_ids])

    @property
    def policy_logprobs_BT(self) -> Tensor:
        """``policy_logprobs``, padded on the right with 0; shape ``(B, T)``."""
        return _padded(self.policy_logprobs)


def group_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    num_generations: int = 8,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    generation_kwargs: Mapping[str, object] | None = None,
    seed: int | None = None,
    step: int = 0,
    prompt_indices: Sequence[int] | None = None,
    chat_template_kwargs: Mapping[str, object] | None = None,
    max_live_tokens: int | None = None,
    fixed_shapes: bool | None = None,
    on_finished: Callable[[int, str, list[int]], None] | None = None,
    progress: bool = False,
) -> GroupSamples:
    """Return ``num_generations`` completions of each prompt, with their log-probabilities.

    A prompt runs through the model once; finished completions leave the batch at once. The random
    numbers of a completion depend only on the seed, the step, its prompt's index and its index in
    the group, so that it is the same whatever else is sampled beside it.

    Args:
        model: A causal language model with a key-value cache; its training mode is kept.
        tokenizer: With an end-of-sequence token, and a chat template if prompts are conversations;
            it needs no padding token.
        prompts: ``P`` texts, or conversations (lists of messages), which get the chat template.
        num_generations: ``G``, at least 1.
        max_new_tokens: Tokens a completion at most, at least 1.
        temperature: Logits are divided by it; 0 for the likeliest token each time (greedy), with
            the log-probabilities of temperature 1, and without the three options that follow.
        top_p: Share of the probability mass to draw from, in (0, 1].
        top_k: Number of likeliest tokens to draw from; 0 for all.
        min_p: Least probability of a token to draw, as a share of the likeliest one's.
        repetition_penalty: Above 1, tokens of the prompt and completion become less likely.
        generation_kwargs: More options of ``transformers``' ``generate``; they override the
            arguments here. See :class:`~trl_grpo_ext.sampling.settings.SamplingSettings`.
        seed: Of the draws; drawn from the global random state if not given.
        step: Of the training; another one gives other completions.
        prompt_indices: ``P`` different numbers, at least 0, that stand for the prompts in their
            random numbers; their positions here if not given.
        chat_template_kwargs: More arguments of the chat template.
        max_live_tokens: Tokens whose keys and values are kept at a time; what does not fit is
            sampled in a later wave. By default what fits into the memory of a CUDA device,
            elsewhere all.
        fixed_shapes: Whether the steps stay in the same memory, so that CUDA graphs repeat them; by
            default where those can be captured.
        on_finished: Called with the index, the text and the tokens of each completion as soon as it
            ends, while others are still growing.
        progress: Whether to show a bar that counts completions.

    Returns:
        ``P * G`` completions. Log-probabilities are float32 on the CPU.

    Raises:
        ValueError: an argument is out of its range, an option is not honoured, there is no prompt,
            one without a token or one with more tokens than the model has positions, or the model
            has no key-value cache.

    Example:
        >>> samples = group_sample(model, tokenizer, ["2 + 3 ="])  # doctest: +SKIP
        >>> samples.completions  # doctest: +SKIP
    """
    indices = range(len(prompts)) if prompt_indices is None else prompt_indices
    _check(prompts, num_generations, indices)
    settings = SamplingSettings.from_values(
        {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "eos_token_id": _stop_ids(model, tokenizer),
            **(generation_kwargs or {}),
        }
    )
    template = chat_template_kwargs or {}
    prompt_ids = [prompt_token_ids(tokenizer, prompt, template) for prompt in prompts]
    check_prompts(model, prompt_ids, max_new_tokens=settings.max_new_tokens)

    def hand_over(index: int, completion: Completion) -> None:
        if on_finished is not None:
            text = tokenizer.decode(completion.ids, skip_special_tokens=True)
            on_finished(index, cast(str, text), completion.ids)

    rows = sample_completions(
        model,
        [ids for ids in prompt_ids for _ in range(num_generations)],
        [CompletionKey(i, j) for i in indices for j in range(num_generations)],
        settings=settings,
        seed=int(torch.randint(2**63 - 1, ())) if seed is None else seed,
        step=step,
        max_live_tokens=max_live_tokens,
        fixed_shapes=fixed_shapes,
        on_finished=hand_over,
        progress=progress,
    )
    return GroupSamples(
        prompts=[prompt for prompt in prompts for _ in range(num_generations)],
        prompt_ids=[ids for ids in prompt_ids for _ in range(num_generations)],
        completion_ids=[row.ids for row in rows],
        completions=tokenizer.batch_decode([row.ids for row in rows], skip_special_tokens=True),
        policy_logprobs=[torch.tensor(row.policy_logprobs) for row in rows],
        sampling_logprobs=[torch.tensor(row.sampling_logprobs) for row in rows],
        finish_reasons=["stop" if row.stopped else "length" for row in rows],
        group_size=num_generations,
    )


def token_logprobs(
    model: PreTrainedModel, samples: GroupSamples, *, temperature: float = 1.0
) -> Tensor:
    """Return the log-probabilities of the sampled tokens, with gradient if it is enabled.

    Args:
        model: A causal language model: the policy, or the reference.
        samples: From :func:`group_sample`.
        temperature: Of the sampling; above 0, so 1 if it was greedy.

    Returns:
        Shape ``(B, T)``, float32, natural logarithm, on the model's device; 0 on padding.
    """
    device = model.device
    longest = max(len(ids) for ids in samples.completion_ids)
    rows = [p + c for p, c in zip(samples.prompt_ids, samples.completion_ids, strict=True)]
    pads = [[0] * (longest - len(c)) for c in samples.completion_ids]
    input_ids, attention_mask = _left_padded(
        [row + pad for row, pad in zip(rows, pads, strict=True)], device
    )
    mask_BT = samples.mask_BT.to(device)
    attention_mask[:, -longest:] = mask_BT
    logits_BTV = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=_positions(attention_mask),
        logits_to_keep=longest + 1,
        use_cache=False,
    ).logits[:, :-1]
    logprobs_BTV = (logits_BTV.float() / temperature).log_softmax(dim=-1)
    logprobs_BT: Tensor = (
        logprobs_BTV.gather(-1, input_ids[:, -longest:, None]).squeeze(-1) * mask_BT
    )
    return logprobs_BT


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    declared = model.generation_config.eos_token_id if model.generation_config else None
    ids = declared if isinstance(declared, list) else [declared]
    return [i for i in [*ids, tokenizer.eos_token_id] if i is not None]


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: Mapping[str, object]
) -> list[int]:
    """Return the tokens of a prompt: a text's, or those of a conversation in its template.

    Args:
        tokenizer: Of the model.
        prompt: A text, or messages.
        template: More arguments of the chat template.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt).input_ids)
    render: Callable[..., object] = tokenizer.apply_chat_template
    text = str(render(prompt, add_generation_prompt=True, tokenize=False, **template))
    # The template has written the special tokens, a leading BOS among them.
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _left_padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the left with 0, and their mask."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device
    )
    return ids, mask


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _check(prompts: Sequence[Prompt], num_generations: int, indices: Sequence[int]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ValueError("`prompts` must be a list of at least one prompt.")
    if num_generations < 1:
        raise ValueError(f"`num_generations` is {num_generations}; it must be at least 1.")
    if len(indices) != len(prompts) or len(set(indices)) < len(indices) or min(indices) < 0:
        raise ValueError(
            f"`prompt_indices` must be {len(prompts)} different numbers of at least 0, one a "
            "prompt, or two prompts would get the same random numbers."
        )
