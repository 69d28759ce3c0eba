"""A sequence-classification model and its scores of texts; L labels of each of N texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_grpo_ext.rewards.models.scoring_model import ModelSettings, ScoringModel, forward_pass
from trl_grpo_ext.rewards.serve.settings import ServeSettings
from trl_grpo_ext.rewards.serve.wire import RefusedError


@dataclass(frozen=True)
class Classifier:
    """A model, its tokenizer and the longest text that they take.

    Args:
        model: With ``pad_token_id`` in its configuration, in evaluation mode.
        tokenizer: Its tokenizer; how it would pad does not matter.
        max_tokens: Of one text, special tokens included.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, with the special tokens of the tokenizer.

        A text that opens with the BOS token, as a chat template writes it, gets no second one.

        Raises:
            RefusedError: A text has no token, or more than ``max_tokens``.
        """
        encoded = self.tokenizer(list(texts), return_attention_mask=False, verbose=False)
        ids = [self._without_second_bos(text) for text in cast(Any, encoded)["input_ids"]]
        for index, text in enumerate(ids):
            if not 0 < len(text) <= self.max_tokens:
                raise RefusedError(
                    f"Text {index} has {len(text)} tokens, and this model scores texts of 1 to "
                    f"{self.max_tokens}. Send another text."
                )
        return ids

    def _without_second_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def logits(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the logits of each text from one forward pass, one a label.

        Texts are padded on the right and masked, so the logits of one do not depend on the others
        beyond rounding.

        Args:
            texts: Token ids, at least one each.
        """
        rows = forward_pass(self.model, texts, kind="sequence")
        return [cast("list[float]", row.tolist()) for row in rows]

    def activated(self, logits: Sequence[Sequence[float]]) -> list[list[float]]:
        """Return the probabilities of the labels of each text, as vLLM computes them.

        The sigmoid of a single label or of independent ones, else the softmax over the labels; a
        model trained for regression keeps its logits.
        """
        logits_NL = torch.tensor(logits)
        kind = getattr(self.model.config, "problem_type", None)
        if kind == "regression":
            probs_NL = logits_NL
        elif logits_NL.shape[1] == 1 or kind == "multi_label_classification":
            probs_NL = logits_NL.sigmoid()
        else:
            probs_NL = logits_NL.softmax(-1)
        return cast("list[list[float]]", probs_NL.tolist())

    def best_label(self, logits: Sequence[float]) -> str | None:
        """Return the name of the label with the highest logit, if the model names it."""
        names: dict[int, str] = cast(Any, self.model.config).id2label or {}
        return names.get(max(range(len(logits)), key=lambda index: logits[index]))


def load_classifier(settings: ServeSettings) -> Classifier:
    """Return the model of the settings, on its device; no code of the model's folder runs.

    Raises:
        ConfigurationError: It cannot be loaded, has no trained classification head, no usable
            padding token, or fewer embeddings than the tokenizer has tokens.
    """
    chosen = ModelSettings(
        model=str(settings.model),
        device=settings.device,
        dtype=settings.dtype,
        max_tokens=settings.max_tokens,
        pad_token=settings.pad_token,
    )
    loaded = ScoringModel.load(chosen, kind="sequence")
    return Classifier(loaded.model, loaded.tokenizer, loaded.max_tokens)
