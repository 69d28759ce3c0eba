"""Training of reward models: a new head on a language model, and what the trainers read.

An outcome model is trained by ``trl.RewardTrainer`` on pairs, a process model by
``transformers.Trainer`` on steps. Both read prompt and answer by
:func:`~trl_grpo_ext.rewards.models.reading.read`, as the rewards do that score with them.

Shapes: ``N`` solutions of a batch, ``T`` tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging
from trl import RewardConfig, RewardTrainer

from trl_grpo_ext.cpu_linear import use_onednn
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.models.reading import read
from trl_grpo_ext.rewards.models.step_reading import ReadSteps, Solution, step_reader
from trl_grpo_ext.rewards.models.training_options import ModelKind, RewardModelArguments

IGNORED = -100  # the label of a token that ends no step, as torch's cross-entropy has it
LABELS = {0: "wrong", 1: "right"}


# The model --------------------------------------------------------------------------------------


def load_with_head(
    name: str,
    *,
    kind: ModelKind,
    num_layers: int | None = None,
    num_trained_layers: int | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a language model with a new head in place of its own, and its tokenizer.

    Args:
        name: Folder or Hub name of a causal language model.
        kind: ``"outcome"``: one score a text; ``"process"``: two labels a token, wrong and right.
        num_layers: Of its first layers, how many it keeps; all if ``None``.
        num_trained_layers: Of its last layers, how many get gradients, beside the final norm and
            the head; all, and the embeddings, if ``None``.
        seed: Of the head.
        **options: Of ``from_pretrained``, such as ``revision`` and ``dtype``.

    Returns:
        The model, in float32 unless told otherwise, and its tokenizer, whose padding token is its
        EOS token where it has none.

    Raises:
        ConfigurationError: It has fewer layers, or its kind has no such head in transformers.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, revision=options.get("revision", "main"))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    labels: dict[str, Any] = {"num_labels": 1}
    if kind == "process":
        labels = {"id2label": LABELS, "label2id": {label: i for i, label in LABELS.items()}}
    layers = {} if num_layers is None else {"num_hidden_layers": num_layers}
    auto: Any = (
        AutoModelForSequenceClassification if kind == "outcome" else AutoModelForTokenClassification
    )
    set_seed(seed)
    with _quietly():  # that the head is new, and that layers are left out, is what was asked for
        try:
            model = auto.from_pretrained(
                name, **{"dtype": torch.float32, **labels, **layers, **options}
            )
        except ValueError as error:
            raise ConfigurationError([_no_head(name, kind, error)]) from error
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if num_trained_layers is not None:
        _freeze(model, num_trained_layers)
    if model.device.type == "cpu":
        use_onednn(model)
    return model, tokenizer


def _freeze(model: PreTrainedModel, num_trained_layers: int) -> None:
    """Leave gradients to what comes after the layers that stay as they are."""
    body: Any = model.base_model
    frozen = [body.get_input_embeddings(), *body.layers[: len(body.layers) - num_trained_layers]]
    for module in frozen:
        module.requires_grad_(False)


@contextmanager
def _quietly() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _no_head(name: str, kind: ModelKind, error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return (
        f"`model_name_or_path`={name!r} cannot become a reward model of `kind: {kind}` "
        f"({type(error).__name__}: {first[:200]}). Start from another model, such as a Llama or a "
        "Qwen."
    )


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    options: RewardModelArguments,
    args: RewardConfig,
) -> Trainer:
    """Return the trainer for rows of :mod:`~trl_grpo_ext.rewards.models.training_data`.

    Args:
        model: From :func:`load_with_head`.
        tokenizer: Its tokenizer.
        rows: Pairs, or solutions, as ``options.kind`` says.
        options: Of the reward model.
        args: Of the training; ``max_length`` is in tokens, of prompt and reply together.
    """
    max_tokens = args.max_length or tokenizer.model_max_length
    if options.kind == "outcome":
        return outcome_trainer(model, tokenizer, rows, args=args, max_tokens=max_tokens)
    tag = options.step_separator
    return process_trainer(model, tokenizer, rows, args=args, tag=tag, max_tokens=max_tokens)


# Outcome models ---------------------------------------------------------------------------------


def read_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Dataset:
    """Return the pairs as token ids, which ``trl.RewardTrainer`` takes as they are.

    Args:
        pairs: Columns ``prompt``, ``chosen`` and ``rejected``, all of them lists of messages.
        tokenizer: Of the reward model.
        max_tokens: Of prompt and reply; what is longer loses tokens of the prompt from its left.

    Returns:
        Columns ``chosen_ids`` and ``rejected_ids``; a pair with a reply that alone is too long is
        left out.
    """

    def ids(prompt: Any, reply: Sequence[Mapping[str, str]]) -> list[int] | None:
        text = reply[0]["content"]
        reading = read(tokenizer, prompt, [text], max_tokens=max_tokens, add_eos=True)
        return None if reading is None else reading.ids

    rows = [
        {name: ids(pair["prompt"], pair[name.removesuffix("_ids")]) for name in _PAIR}
        for pair in pairs
    ]
    return Dataset.from_list([row for row in rows if all(row.values())])


_PAIR = ("chosen_ids", "rejected_ids")


def outcome_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    *,
    args: RewardConfig,
    max_tokens: int,
) -> Trainer:
    """Return a ``trl.RewardTrainer`` for the pairs, which are read as the reward will read them."""
    return RewardTrainer(
        model=model,
        args=args,
        train_dataset=read_pairs(pairs, tokenizer, max_tokens=max_tokens),
        processing_class=tokenizer,
    )


# Process models ---------------------------------------------------------------------------------


def label_tokens(reader: ReadSteps, solution: Mapping[str, Any]) -> dict[str, list[int]] | None:
    """Return a solution as token ids and labels, or ``None`` for one that is too long.

    Args:
        reader: From :func:`~trl_grpo_ext.rewards.models.step_reading.step_reader`.
        solution: ``prompt`` (text or messages), ``completions`` (the steps, without what stands
            between them) and ``labels`` (whether each is right).

    Returns:
        ``input_ids``, and ``labels``: 1 or 0 at the last token of each step, -100 elsewhere.
    """
    steps = solution["completions"]
    reading = reader(Solution(solution["prompt"], "", steps))
    if reading is None:
        return None
    labels = [IGNORED] * len(reading.ids)
    for end, label in zip(reading.ends, solution["labels"], strict=True):
        labels[end] = int(label)
    return {"input_ids": reading.ids, "labels": labels}


@dataclass(frozen=True)
class StepCollator:
    """Pads solutions, read by :func:`label_tokens`, on the right.

    Args:
        pad_token_id: Of the model's configuration.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, each of shape ``(N, T)``."""
        texts = [row["input_ids"] for row in rows]
        return {
            "input_ids": _padded(texts, self.pad_token_id),
            "attention_mask": _padded([[1] * len(text) for text in texts], 0),
            "labels": _padded([row["labels"] for row in rows], IGNORED),
        }


def process_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    solutions: Dataset,
    *,
    args: TrainingArguments,
    tag: str,
    max_tokens: int,
) -> Trainer:
    """Return a ``transformers.Trainer`` for solutions with a label for each step.

    Args:
        model: A token-classification model with two labels, as :func:`load_with_head` makes it.
        tokenizer: Its tokenizer.
        solutions: Columns ``prompt``, ``completions`` and ``labels``.
        args: Of the training.
        tag: What follows each step.
        max_tokens: Of prompt and solution.
    """
    reader = step_reader(tokenizer, tag=tag, max_tokens=max_tokens)
    rows = [label_tokens(reader, row) for row in solutions]
    return Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list([row for row in rows if row is not None]),
        data_collator=StepCollator(model.config.get_text_config().pad_token_id),
        processing_class=tokenizer,
    )


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
