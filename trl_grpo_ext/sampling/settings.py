"""What shapes the draw of a token: the options of ``transformers``' ``generate``, in its order.

Shapes: ``B`` completions, ``L`` tokens of the longest prompt and completion, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# Options of `generate` that change nothing about a completion sampled by itself.
_WITHOUT_EFFECT = frozenset(
    {
        *("pad_token_id", "bos_token_id", "decoder_start_token_id", "transformers_version"),
        *("max_length", "renormalize_logits", "disable_compile"),
        *("early_stopping", "length_penalty", "diversity_penalty"),  # of beams
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_lookbehind"),
        *("assistant_confidence_threshold", "target_lookbehind", "assistant_ensemble_weight"),
    }
)
# Values that switch an option off, where that is not None or False.
_OFF: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (1, 1.0),
    "min_length": (0,),
    "encoder_repetition_penalty": (1, 1.0),
    "encoder_no_repeat_ngram_size": (0,),
    "penalty_alpha": (0, 0.0),
    "cache_implementation": ("dynamic",),
    "use_cache": (True,),
}


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Everything that shapes the draw of a token; the defaults leave the distribution as it is.

    The names, and the order in which they act, are those of ``transformers.GenerationConfig``. From
    ``top_k`` on down to ``eta_cutoff`` they act on a draw only, not on the likeliest token.

    Attributes:
        max_new_tokens: Tokens a completion at most, at least 1.
        stop_ids: Tokens that end a completion.
        temperature: Logits are divided by it; 0 for the likeliest token each time (greedy).
        top_k: Number of likeliest tokens to draw from; 0 for all.
        top_p: Share of the probability mass to draw from, in (0, 1].
        min_p: Least probability of a token to draw, as a share of the likeliest one's.
        top_h: Share of the entropy to keep, in (0, 1].
        typical_p: Mass of the most typical tokens to draw from, in (0, 1].
        epsilon_cutoff: Least probability of a token to draw, in [0, 1).
        eta_cutoff: As ``epsilon_cutoff``, and lower where the entropy is high.
        repetition_penalty: Above 1, tokens of the prompt and completion become less likely.
        no_repeat_ngram_size: Length of what must not come twice; 0 for no such rule.
        bad_words_ids: Sequences of tokens that must not come.
        sequence_bias: What is added to the logit of a sequence's last token.
        min_new_tokens: No token of ``stop_ids`` comes before.
        exponential_decay_length_penalty: From which token on, and by which factor, a completion is
            driven to its end.
        suppress_tokens: Tokens that never come.
        begin_suppress_tokens: Tokens that do not come first.

    Raises:
        ValueError: a value is out of its range.
    """

    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: list[list[int]] | None = None
    sequence_bias: Any = None
    min_new_tokens: int = 0
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(
                f"`max_new_tokens` is {self.max_new_tokens}; it must be at least 1, "
                "because a completion without a token has nothing to learn from."
            )
        if not self.temperature >= 0:
            raise ValueError(
                f"`temperature` is {self.temperature}; "
                "it must be at least 0 (0 takes the likeliest token each time)."
            )
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"`top_p`={self.top_p} must be in (0, 1], and `top_k`={self.top_k} at least 0."
            )
        # What transformers refuses shows now, and not after the prompts have been computed.
        self.processors(prompt_length=0, device=torch.device("cpu"))
        self.warpers(torch.device("cpu"))

    @classmethod
    def from_generation_config(
        cls, config: GenerationConfig, *, defaults: GenerationConfig | None = None
    ) -> SamplingSettings:
        """Return what ``model.generate(generation_config=config)`` would do.

        Args:
            config: With ``max_new_tokens``.
            defaults: The model's own, for what ``config`` leaves at ``None``.

        Raises:
            ValueError: an option is set that is not honoured; the message names all of them.
        """
        values = {name: value for name, value in vars(config).items() if name in generation_keys()}
        for name, value in vars(defaults).items() if defaults else ():
            if name in values and values[name] is None:
                values[name] = value
        return cls.from_values(values)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> SamplingSettings:
        """Return the settings from options of ``generate`` by name; ``None`` is the default.

        ``do_sample: False`` is greedy, ``eos_token_id`` (one or several) gives ``stop_ids``.

        Raises:
            ValueError: an option is not honoured; the message names all of them.
        """
        if unsupported := unsupported_generation_keys(values):
            raise ValueError(
                f"the generation options {', '.join(f'`{name}`' for name in unsupported)} are not "
                "honoured when groups are sampled, so completions would not be what they ask for. "
                "Remove them from `generation_kwargs`, or leave the sampling to "
                "`transformers`' `generate`."
            )
        names = {field.name for field in fields(cls)}
        known = {k: v for k, v in values.items() if k in names and v is not None}
        if values.get("do_sample") is False:
            known["temperature"] = 0.0
        if (stop := values.get("eos_token_id")) is not None:
            known["stop_ids"] = frozenset(torch.as_tensor(stop).flatten().tolist())
        if known.get("max_new_tokens") is None:
            raise ValueError("`max_new_tokens` is not given, so a completion might never end.")
        return cls(**known)

    @property
    def reads_history(self) -> bool:
        """Whether the draw depends on the tokens so far by more than the model's logits."""
        bias = [key if isinstance(key, tuple) else key[0] for key in self.sequence_bias or []]
        longest = max((len(words) for words in [*bias, *(self.bad_words_ids or [])]), default=0)
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0 or longest > 1

    def processors(self, *, prompt_length: int, device: torch.device) -> LogitsProcessorList:
        """Return what acts on the logits before the temperature does.

        Args:
            prompt_length: Tokens of each row that belong to the prompt, padding included.
            device: Of the logits.
        """
        found = LogitsProcessorList()
        stops = torch.tensor(sorted(self.stop_ids), dtype=torch.long, device=device)
        if self.sequence_bias is not None:
            found.append(SequenceBiasLogitsProcessor(self.sequence_bias))
        if self.repetition_penalty != 1.0:
            found.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.no_repeat_ngram_size > 0:
            found.append(NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if self.bad_words_ids is not None:
            found.append(NoBadWordsLogitsProcessor(self.bad_words_ids, stops))
        if self.min_new_tokens > 0 and self.stop_ids:
            minimum = self.min_new_tokens
            found.append(
                MinNewTokensLengthLogitsProcessor(prompt_length, minimum, stops, str(device))
            )
        if self.exponential_decay_length_penalty is not None:
            start_and_factor = self.exponential_decay_length_penalty
            found.append(ExponentialDecayLengthPenalty(start_and_factor, stops, prompt_length))
        if self.suppress_tokens is not None:
            found.append(SuppressTokensLogitsProcessor(self.suppress_tokens, str(device)))
        if self.begin_suppress_tokens is not None:
            first = self.begin_suppress_tokens
            found.append(SuppressTokensAtBeginLogitsProcessor(first, prompt_length, str(device)))
        return found

    def warpers(self, device: torch.device) -> LogitsProcessorList:
        """Return what acts on a draw after the temperature; nothing if greedy."""
        found = LogitsProcessorList()
        if self.temperature == 0:
            return found
        if self.top_h is not None:
            found.append(TopHLogitsWarper(self.top_h))
        if self.top_k > 0:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None and self.min_p != 0:
            found.append(MinPLogitsWarper(self.min_p))
        if self.typical_p < 1:
            found.append(TypicalLogitsWarper(self.typical_p))
        if self.epsilon_cutoff > 0:
            found.append(EpsilonLogitsWarper(self.epsilon_cutoff))
        if self.eta_cutoff > 0:
            found.append(EtaLogitsWarper(self.eta_cutoff, device=str(device)))
        return found


def unsupported_generation_keys(generation_kwargs: Mapping[str, Any]) -> list[str]:
    """Return the names of the options that group sampling does not honour, in their order.

    Example:
        >>> unsupported_generation_keys({"top_k": 5, "num_beams": 4, "stop_strings": None})
        ['num_beams']
    """
    return [name for name, value in generation_kwargs.items() if not _is_honoured(name, value)]


def _is_honoured(name: str, value: object) -> bool:
    if name in _WITHOUT_EFFECT or name in {"do_sample", "eos_token_id"}:
        return True
    if name != "stop_ids" and name in {field.name for field in fields(SamplingSettings)}:
        return True
    if name not in generation_keys():
        return False
    return value is None or (value is False and name != "use_cache") or value in _OFF.get(name, ())


def generation_keys() -> set[str]:
    """Return the names of the options of ``generate``."""
    return {name for name in vars(GenerationConfig()) if not name.startswith("_")}
