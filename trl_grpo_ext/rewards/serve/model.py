"""A sequence-classification model and its scores of texts.

Shapes: N texts of one forward pass, T tokens of the longest of them, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.serve.settings import ServeSettings
from trl_grpo_ext.rewards.serve.wire import RefusedError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        shape_NT = (len(texts), max(len(text) for text in texts))
        ids_NT = torch.full(shape_NT, _text_config(self.model).pad_token_id)
        mask_NT = torch.zeros(shape_NT, dtype=torch.long)
        for row, text in enumerate(texts):
            ids_NT[row, : len(text)] = torch.tensor(text)
            mask_NT[row, : len(text)] = 1
        device = self.model.device
        with torch.inference_mode():
            output = self.model(input_ids=ids_NT.to(device), attention_mask=mask_NT.to(device))
        return cast("list[list[float]]", output.logits.float().tolist())

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
    name = str(settings.model)
    device = _device(settings.device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=_dtype(settings, device), output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, AssertionError) as error:
        raise ConfigurationError([_not_loaded(name, error)]) from error
    if problems := [*_head_problems(name, loaded), *_vocabulary_problems(model, tokenizer)]:
        raise ConfigurationError(problems)
    _set_pad_token(model, tokenizer, settings=settings)
    model.config.use_cache = False
    return Classifier(model.to(device).eval(), tokenizer, _max_tokens(model, tokenizer, settings))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown, not there, or torch without CUDA
        problem = f"`device`={name!r} cannot be used here ({error}). Choose 'auto' or 'cpu'."
        raise ConfigurationError([problem]) from error


def _dtype(settings: ServeSettings, device: torch.device) -> torch.dtype:
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def _num_embeddings(model: PreTrainedModel) -> int:
    return int(cast(Any, model.get_input_embeddings()).weight.shape[0])


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()


def _set_pad_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, settings: ServeSettings
) -> None:
    """Let the configuration name the padding token, which tells the model where a text ends."""
    config = _text_config(model)
    if settings.pad_token is not None:
        config.pad_token_id = tokenizer.get_vocab().get(settings.pad_token)
    elif config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    found = config.pad_token_id
    if found is None or not 0 <= found < _num_embeddings(model):
        raise ConfigurationError([_no_pad_token(settings, found)])


def _max_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ServeSettings
) -> int:
    positions = getattr(_text_config(model), "max_position_embeddings", None)
    limits = (settings.max_tokens, positions, tokenizer.model_max_length)
    return int(min(limit for limit in limits if limit))


def _head_problems(name: str, loaded: dict[str, Any]) -> list[str]:
    if not (missing := sorted(loaded["missing_keys"])):
        return []
    return [
        f"`model`={name!r} lacks {len(missing)} weights of a classification model (such as "
        f"{missing[0]!r}), so its scores would be random. Name a model that was trained to "
        "classify or to reward, not the language model that it came from."
    ]


def _vocabulary_problems(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    num_embeddings = _num_embeddings(model)
    if len(tokenizer) <= num_embeddings:
        return []
    return [
        f"The tokenizer has {len(tokenizer)} tokens and the model {num_embeddings} embeddings, so "
        "some texts could not be read. Use the tokenizer that the model was trained with."
    ]


def _no_pad_token(settings: ServeSettings, found: int | None) -> str:
    where = f"`pad_token`={settings.pad_token!r} stands for" if settings.pad_token else "It has"
    return (
        f"`model`={settings.model!r} has no padding token that it can read ({where} id {found}), "
        "so several texts could not share a forward pass. Set `pad_token` to a token of its "
        "vocabulary; the one that it was trained with is right."
    )


def _not_loaded(name: str, error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return (
        f"`model`={name!r} could not be loaded as a sequence-classification model "
        f"({type(error).__name__}: {first}), so there is nothing to serve. Check the name; in a "
        "folder there must be the configuration, the weights and the tokenizer."
    )
