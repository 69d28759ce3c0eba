"""A classification model and its logits of texts.

Shapes: N texts of one forward pass, T tokens of the longest of them, L labels, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_grpo_ext.cpu_linear import use_onednn
from trl_grpo_ext.rewards.models.loading import load_model, resolve_device
from trl_grpo_ext.rewards.models.offload import on_device
from trl_grpo_ext.rewards.models.passes import plan_passes
from trl_grpo_ext.rewards.models.settings import Kind, ModelSettings, Pooling, model_problems

__all__ = ["Kind", "ModelSettings", "ScoringModel", "forward_pass", "model_problems"]


@dataclass(frozen=True, kw_only=True)
class ScoringModel:
    """A model that scores, its tokenizer, and what they take.

    Args:
        model: With ``pad_token_id`` in its configuration, in evaluation mode.
        tokenizer: Its tokenizer; how it would pad does not matter.
        kind: Whether it has logits for each text, or for each token.
        max_tokens: Of one text, special tokens included.
        max_batch_tokens: Of one forward pass, padding included; a longer text goes alone.
        device: Where it scores. A model that is elsewhere is moved there for each call.
        pooling: See :class:`~trl_grpo_ext.rewards.models.settings.ModelSettings`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    max_tokens: int
    max_batch_tokens: int
    device: torch.device
    pooling: Pooling = "transformers"

    @classmethod
    def load(cls, settings: ModelSettings, *, kind: Kind) -> Self:
        """Return the model of the settings; no code of the model's folder runs.

        Raises:
            ConfigurationError: It cannot be loaded, has no trained classification head, no usable
                padding token, or fewer embeddings than the tokenizer has tokens.
        """
        device = resolve_device(settings.device)
        model, tokenizer = load_model(settings, kind=kind, device=device)
        if device.type == "cpu":
            use_onednn(model)
        limits = (settings.max_tokens, _num_positions(model), tokenizer.model_max_length)
        return cls(
            model=model,
            tokenizer=tokenizer,
            kind=kind,
            max_tokens=int(min(limit for limit in limits if limit)),
            max_batch_tokens=settings.max_batch_tokens,
            device=device,
            pooling=settings.pooling,
        )

    @property
    def num_labels(self) -> int:
        """The number of logits of a text, or of a token."""
        return int(cast(Any, self.model.config).num_labels)

    def logits(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the logits of each text, in float32 on the CPU.

        Texts of like length share forward passes, padded on the right and masked, so the logits of
        one do not depend on the others beyond rounding.

        Args:
            texts: Token ids, at least one each.

        Returns:
            In the order of the texts: shape ``(L,)`` of a sequence model; ``(T, L)`` of a token
            model, where ``T`` are the tokens of this text.
        """
        if not texts:
            return []
        found: dict[int, Tensor] = {}
        lengths = [len(text) for text in texts]
        with on_device(self.model, self.device):
            for indices in plan_passes(lengths, max_tokens=self.max_batch_tokens):
                chosen = [texts[index] for index in indices]
                rows = forward_pass(self.model, chosen, kind=self.kind, pooling=self.pooling)
                found |= zip(indices, rows, strict=True)
        return [found[index] for index in range(len(texts))]


def forward_pass(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    *,
    kind: Kind,
    pooling: Pooling = "transformers",
) -> list[Tensor]:
    """Return the logits of texts that share one forward pass, where the model is.

    Args:
        model: With ``pad_token_id`` in its configuration, in evaluation mode.
        texts: Token ids, at least one each.
        kind: Whether it has logits for each text, or for each token.
        pooling: See :class:`~trl_grpo_ext.rewards.models.settings.ModelSettings`.

    Returns:
        See :meth:`ScoringModel.logits`.
    """
    ids_NT, mask_NT = _padded(texts, pad_id=model.config.get_text_config().pad_token_id)
    inputs = {"input_ids": ids_NT.to(model.device), "attention_mask": mask_NT.to(model.device)}
    # In its own dtype, whatever the policy computes in around this call.
    with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
        if kind == "sequence" and pooling == "last":
            logits = _last_token_logits(model, **inputs)
        else:
            logits = model(**inputs).logits
    logits = logits.float().cpu()
    if kind == "sequence":
        return list(logits)
    return [row[: len(text)] for row, text in zip(logits, texts, strict=True)]


def _num_positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens have a position.

    Models like RoBERTa count positions from the one after that of the padding.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first if limit is None else int(limit) - first
    return limit


def _padded(texts: Sequence[Sequence[int]], *, pad_id: int) -> tuple[Tensor, Tensor]:
    shape_NT = (len(texts), max(len(text) for text in texts))
    ids_NT = torch.full(shape_NT, pad_id)
    mask_NT = torch.zeros(shape_NT, dtype=torch.long)
    for row, text in enumerate(texts):
        ids_NT[row, : len(text)] = torch.tensor(text)
        mask_NT[row, : len(text)] = 1
    return ids_NT, mask_NT


def _last_token_logits(
    model: PreTrainedModel, *, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    hidden_NTH = model.base_model(input_ids=input_ids, attention_mask=attention_mask)[0]
    rows_N = torch.arange(len(input_ids), device=hidden_NTH.device)
    last_NH = hidden_NTH[rows_N, attention_mask.sum(1).to(hidden_NTH.device) - 1]
    return cast(Tensor, cast(Any, model).score(last_NH))
