"""What the tests take for vLLM: it samples with transformers, and takes the names that vLLM takes.

Names and defaults are those of vLLM 0.22.0, all of which 0.31.0 has too. ``LLM`` takes a part of
them: its own arguments that are plain values, and of ``EngineArgs`` those that are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: Any = None
    skip_clone: bool = False
    output_text_buffer_length: int = 0
    _eos_token_id: int | None = None
    _all_stop_token_ids: set[int] = field(default_factory=set)
    structured_outputs: Any = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    bad_words: list[str] | None = None
    _bad_words_token_ids: list[list[int]] | None = None
    skip_reading_prefix_cache: bool | None = None
    thinking_token_budget: int | None = None
    repetition_detection: Any = None
    routed_experts_prompt_start: int = 0

    def __post_init__(self) -> None:
        if self.temperature > 2.0:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: str | None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclass
class ModelConfig:
    max_model_len: int


class LLM:
    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        max_model_len: int | None = None,
        distributed_executor_backend: str | None = None,
    ) -> None:
        self.arguments = {name: value for name, value in locals().items() if name != "self"}
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, revision=revision)
        self.eos = AutoTokenizer.from_pretrained(model, revision=tokenizer_revision).eos_token_id
        self.model_config = ModelConfig(max_model_len or self.model.config.max_position_embeddings)

    def generate(
        self,
        prompts: Sequence[dict[str, Any]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        return [
            RequestOutput(ids, [self._reply(ids, replace(one), at) for at in range(one.n)])
            for ids, one in zip(
                [prompt["prompt_token_ids"] for prompt in prompts], sampling_params, strict=True
            )
        ]

    def _reply(self, prompt: list[int], one: SamplingParams, index: int) -> CompletionOutput:
        assert one.seed is not None
        assert one.max_tokens is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(one.seed + index)
            rows = self.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=True,
                temperature=one.temperature,
                top_p=one.top_p,
                top_k=one.top_k,
                min_p=one.min_p or None,
                max_new_tokens=min(one.max_tokens, self.model_config.max_model_len - len(prompt)),
                eos_token_id=self.eos,
                pad_token_id=self.eos,
            )
        ids = rows[0, len(prompt) :].tolist()
        return CompletionOutput(index, "", ids, "stop" if ids[-1] == self.eos else "length")
