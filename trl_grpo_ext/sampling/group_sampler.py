"""Group sampling: each prompt is computed once, its key-value cache serves the whole group.

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
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

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
            top-k, top-p).
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


@torch.no_grad()
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
    seed: int | None = None,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> GroupSamples:
    """Return ``num_generations`` completions of each prompt, with their log-probabilities.

    A prompt runs through the model once; finished completions leave the batch at once.

    Args:
        model: A causal language model with a standard key-value cache; its training mode is kept.
        tokenizer: With an end-of-sequence token, and a chat template if prompts are conversations.
        prompts: ``P`` texts, or conversations (lists of messages), which get the chat template.
        num_generations: ``G``, at least 1.
        max_new_tokens: Tokens a completion at most, at least 1.
        temperature: Logits are divided by it; 0 for the likeliest token each time (greedy), with
            the log-probabilities of temperature 1.
        top_p: Share of the probability mass to draw from, in (0, 1].
        top_k: Number of likeliest tokens to draw from; 0 for all.
        seed: Of the draws, so that the same call gives the same completions on the same device; the
            global random state if not given.
        chat_template_kwargs: More arguments of the chat template.

    Returns:
        ``P * G`` completions. Log-probabilities are float32 on the CPU.

    Raises:
        ValueError: an argument is out of its range, there is no prompt, or one without a token.

    Example:
        >>> samples = group_sample(model, tokenizer, ["2 + 3 ="])  # doctest: +SKIP
        >>> samples.completions  # doctest: +SKIP
    """
    _check(prompts, num_generations, max_new_tokens, temperature, top_p, top_k)
    template = chat_template_kwargs or {}
    prompt_ids = [_prompt_ids(tokenizer, prompt, template) for prompt in prompts]
    if [] in prompt_ids:
        raise ValueError(
            f"`prompts[{prompt_ids.index([])}]` has no token, so there is nothing to go on from; "
            "leave it out, or start it with the tokenizer's `bos_token`."
        )
    training = model.training
    model.eval()
    try:
        rows = _sample(
            model,
            prompt_ids,
            group_size=num_generations,
            max_new_tokens=max_new_tokens,
            stop_ids=_stop_ids(model, tokenizer),
            temperature=temperature,
            warpers=_warpers(top_p, top_k),
            generator=None if seed is None else torch.Generator(model.device).manual_seed(seed),
        )
    finally:
        model.train(training)
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


@dataclass
class _Row:
    """One completion while it grows."""

    ids: list[int]
    policy_logprobs: list[float]
    sampling_logprobs: list[float]
    stopped: bool = False


def _sample(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    stop_ids: set[int],
    temperature: float,
    warpers: LogitsProcessorList,
    generator: torch.Generator | None,
) -> list[_Row]:
    input_ids, mask = _left_padded(prompt_ids, model.device)
    cache = DynamicCache(config=model.config)
    logits = _last_logits(model, input_ids, mask, cache).repeat_interleave(group_size, dim=0)
    cache.batch_repeat_interleave(group_size)
    mask = mask.repeat_interleave(group_size, dim=0)
    rows = [_Row([], [], []) for _ in range(len(logits))]
    active = list(rows)
    for _ in range(max_new_tokens):
        policy_BV = (logits.float() / (temperature or 1.0)).log_softmax(dim=-1)
        sampling_BV = warpers(
            cast(torch.LongTensor, input_ids), cast(torch.FloatTensor, policy_BV)
        ).log_softmax(dim=-1)
        if temperature == 0:
            tokens_B1 = logits.argmax(dim=-1, keepdim=True)
        else:
            tokens_B1 = torch.multinomial(sampling_BV.exp(), 1, generator=generator)
        _append(
            active,
            tokens_B1,
            policy_BV.gather(1, tokens_B1),
            sampling_BV.gather(1, tokens_B1),
            stop_ids,
        )
        keep = torch.tensor([not row.stopped for row in active], device=mask.device)
        active = [row for row in active if not row.stopped]
        if not active or len(active[0].ids) == max_new_tokens:
            break
        if not keep.all():
            cache.batch_select_indices(keep.nonzero().squeeze(1))
        mask = torch.cat([mask[keep], mask.new_ones(len(active), 1)], dim=1)
        logits = _last_logits(model, tokens_B1[keep], mask, cache)
    return rows


def _last_logits(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor, cache: DynamicCache
) -> Tensor:
    positions = _positions(mask)[:, -input_ids.shape[1] :]
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _append(
    rows: list[_Row], tokens_B1: Tensor, policy_B1: Tensor, sampling_B1: Tensor, stop_ids: set[int]
) -> None:
    drawn = zip(
        rows,
        tokens_B1.flatten().tolist(),
        policy_B1.flatten().tolist(),
        sampling_B1.flatten().tolist(),
        strict=True,
    )
    for row, token, policy_logprob, sampling_logprob in drawn:
        row.ids.append(token)
        row.policy_logprobs.append(policy_logprob)
        row.sampling_logprobs.append(sampling_logprob)
        row.stopped = token in stop_ids


def _warpers(top_p: float, top_k: int) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    declared = model.generation_config.eos_token_id if model.generation_config else None
    ids = declared if isinstance(declared, list) else [declared]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


def _prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: Mapping[str, object]
) -> list[int]:
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


def _check(
    prompts: Sequence[Prompt],
    num_generations: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ValueError("`prompts` must be a list of at least one prompt.")
    for name, value in (("num_generations", num_generations), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")
    if not temperature >= 0:
        raise ValueError(
            f"`temperature` is {temperature}; "
            "it must be at least 0 (0 takes the likeliest token each time)."
        )
    if not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"`top_p`={top_p} must be in (0, 1], and `top_k`={top_k} at least 0.")
