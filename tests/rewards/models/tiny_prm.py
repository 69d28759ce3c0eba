"""A process reward model small enough to build in a second, and its scores by a plain loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import CHARACTERS, build_tiny_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForTokenClassification

TAG = "<extra_0>"


def save_prm(folder: Path, *, num_labels: int = 2, bias: Sequence[float] | None = None) -> Path:
    """Write a Llama that classifies tokens, with ``<extra_0>`` as a special token.

    Args:
        folder: Made if there is none.
        num_labels: Of the head.
        bias: Of the head, whose weights then are 0, so that each token has these logits.
    """
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [TAG]})
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=num_labels,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForTokenClassification(config).float().eval()
    with torch.no_grad():
        if bias is None:
            # What came before the tag decides, not the tag: the scores of steps are far apart.
            model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(TAG)] = 0
            model.score.weight.mul_(2)
        else:
            model.score.weight.zero_()
            model.score.bias.copy_(torch.tensor(bias))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class PlainLoop:
    """Reads and scores one answer at a time, without any of our code."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model = LlamaForTokenClassification.from_pretrained(folder, dtype=torch.float32)
        self.ids = self.tokenizer.get_vocab()

    def read(self, text: str) -> list[int]:
        """The token of each character: nothing in the text is a special token."""
        unknown = self.ids["<unk>"]
        return [self.ids[one] if one in CHARACTERS else unknown for one in text]

    def read_all(
        self, prompt: str, steps: Sequence[str], *, tag: str = TAG
    ) -> tuple[list[int], list[int]]:
        """The tokens of a text and its steps, and the places of the last token of each tag."""
        ids, ends = self.read(prompt), []
        for step in steps:
            ids += self.read(step)
            ids += [self.ids[TAG]] if tag == TAG else self.read(tag)
            ends.append(len(ids) - 1)
        return ids, ends

    def probabilities(self, ids: Sequence[int]) -> list[list[float]]:
        """The probabilities of the labels at each token, as vLLM has them."""
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([list(ids)])).logits[0].tolist()
        return [activated(row) for row in logits]

    def scores(
        self, prompt: str, steps: Sequence[str], *, tag: str = TAG, label: int = 1
    ) -> list[float]:
        ids, ends = self.read_all(prompt, steps, tag=tag)
        probabilities = self.probabilities(ids)
        return [probabilities[end][label] for end in ends]


def activated(row: Sequence[float]) -> list[float]:
    """The softmax over several labels, the sigmoid of one."""
    if len(row) == 1:
        return [1 / (1 + math.exp(-row[0]))]
    total = sum(math.exp(logit) for logit in row)
    return [math.exp(logit) / total for logit in row]
