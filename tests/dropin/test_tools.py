"""Tools and environments: TRL's loop around the model, our log-probabilities and advantages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from dropin.compare import CHATS, Options, Run, assert_same_run, ours, theirs
from tiny import build_tiny_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_grpo_ext.errors import ConfigurationError

# A call is a JSON object in brackets; an answer of a tool is a message of its own.
CHAT_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name + '\n' }}{% endfor %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '[' + (call.function | tojson) + ']' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "[",
            "close_pattern": r"\]\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a chat template for tools."""
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


class Scripted(LlamaForCausalLM):
    """A Llama whose ``generate`` says what a trained one might: calls of tools, then an answer."""

    tool = "add"

    def generate(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the prompts, each with what it is answered."""
        tokenizer = build_tiny_tokenizer()
        texts = [self.answer(i, tokenizer.decode(ids)) for i, ids in enumerate(input_ids)]
        rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]
        longest = max(map(len, rows))
        padded = [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(padded)], dim=1)

    def answer(self, place: int, prompt: str) -> str:
        turns = prompt.count("<|im_start|>tool")
        calls = [
            {"name": self.tool, "arguments": {"a": place, "b": turns}},
            {"name": "unknown", "arguments": {}},
            {"name": self.tool, "arguments": {"wrong": 1}},
        ]
        if turns < (0, 1, 2, 1)[place % 4]:
            return "e" * place + "[" + json.dumps(calls[(place // 4) % 3]) + "]"
        return "ae"[: place % 3] + "x" * (place % 5)


def scripted(folder: Path, tool: str = "add") -> Scripted:
    model = Scripted.from_pretrained(folder, dtype=torch.float32)
    model.tool = tool
    return model


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        Their sum.
    """
    return a + b


async def add_later(a: int, b: int) -> int:
    """Add two numbers, later.

    Args:
        a: The first.
        b: The second.

    Returns:
        Their sum.
    """
    return a + b


def talk(*, completions: list[Any], **_: Any) -> list[float]:
    """A reward that reads the whole conversation."""
    return [float(len(str(messages)) % 13) + len(messages) for messages in completions]


OPTIONS: dict[str, Any] = {
    "train_dataset": CHATS,
    "reward_funcs": talk,
    "max_completion_length": 160,
    "num_iterations": 2,
    "max_steps": 2,
}


@pytest.mark.parametrize("tool", [add, add_later], ids=["a function", "asynchronous"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_tool_calling_iterations": 1},
        {"mask_truncated_completions": True},
        {"max_completion_length": 100},
        {"loss_type": "grpo", "top_entropy_quantile": 0.5},
    ],
    ids=["defaults", "one round", "truncated masked", "calls that do not fit", "entropy mask"],
)
def test_tools_train_as_in_trl(
    tiny_model_dir: Path, tmp_path: Path, tokenizer: Any, tool: Any, changes: Options
) -> None:
    options = OPTIONS | {"tools": [tool], "processing_class": tokenizer} | changes
    models = [scripted(tiny_model_dir, tool.__name__) for _ in range(2)]
    found = Run.of(ours(models[0], tmp_path, shared_prefix="always", **options))
    expected = Run.of(theirs(models[1], tmp_path, **options))
    assert expected.moves
    roles = [message["role"] for messages in expected.completions for message in messages]
    assert "tool" in roles
    assert 0 < expected.log[0]["tools/failure_frequency"] < 1
    assert_same_run(found, expected)


def test_max_tool_calling_iterations_ends_the_loop(
    tiny_model_dir: Path, tmp_path: Path, tokenizer: Any
) -> None:
    options = OPTIONS | {"tools": [add], "processing_class": tokenizer, "max_steps": 1}
    rounds = []
    for limit in (None, 1):
        changes = {"max_tool_calling_iterations": limit}
        run = Run.of(ours(scripted(tiny_model_dir), tmp_path, **options, **changes))
        rounds.append(max(sum(m["role"] == "tool" for m in c) for c in run.completions))
    assert rounds == [2, 1]


def test_tools_without_extensions_are_trls_bit_for_bit(
    tiny_model_dir: Path, tmp_path: Path, tokenizer: Any
) -> None:
    options = OPTIONS | {"tools": [add], "processing_class": tokenizer}
    found = Run.of(ours(scripted(tiny_model_dir), tmp_path, extensions=False, **options))
    expected = Run.of(theirs(scripted(tiny_model_dir), tmp_path, **options))
    assert_same_run(found, expected, rel=0)


def test_our_kl_leaves_what_a_tool_said_out_as_trls_does(
    tiny_model_dir: Path, tmp_path: Path, tokenizer: Any
) -> None:
    options = OPTIONS | {"tools": [add], "processing_class": tokenizer}
    found = Run.of(ours(scripted(tiny_model_dir), tmp_path, kl_clamp=1000.0, **options))
    expected = Run.of(theirs(scripted(tiny_model_dir), tmp_path, **options))
    assert expected.log[1]["kl"] > 1e-3
    assert_same_run(found, expected)


def test_trl_samples_where_tools_are_called(
    tiny_model_dir: Path, tmp_path: Path, tokenizer: Any
) -> None:
    options = OPTIONS | {"tools": [add], "processing_class": tokenizer}
    trainer = ours(scripted(tiny_model_dir), tmp_path, **options)
    assert trainer.group_sampler == "transformers"
    assert trainer.group_sampler_reason == "completions call tools"
    with pytest.raises(ConfigurationError, match=r"completions call tools.*group_sampler: auto"):
        ours(scripted(tiny_model_dir), tmp_path, group_sampler="shared_prefill", **options)


def test_a_template_that_knows_no_tools_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not support tool calling"):
        ours(tiny_model_dir, tmp_path, **OPTIONS, tools=[add])


class Counter:
    """Adds, and scores itself."""

    def reset(self, **columns: Any) -> str | None:
        """Start anew, from a number of the data set."""
        self.total = len(str(columns.get("prompt", "")))
        return f" from {self.total}"

    def add(self, a: int, b: int) -> int:
        """Add to the total.

        Args:
            a: The first.
            b: The second.

        Returns:
            The total.
        """
        self.total += a + b
        return self.total

    def get_reward(self) -> float:
        return float(self.total % 7)


class Silent(Counter):
    def reset(self, **_: Any) -> None:
        self.total = 0

    async def get_reward(self) -> float:
        return float(self.total % 5)


def routed(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {"environment": "count" if index % 2 else "silent"}


BOTH = {"count": Counter, "silent": Silent}


@pytest.mark.parametrize(
    "changes",
    [
        {"environment_factory": Counter},
        {"environment_factory": Silent, "reward_funcs": None},
        {"environment_factory": Counter, "train_dataset": None},
        {"environment_factory": BOTH, "train_dataset": CHATS.map(routed, with_indices=True)},
        {
            "environment_factory": BOTH,
            "train_dataset": Dataset.from_dict({"environment": ["count", "silent"] * 4}),
        },
    ],
    ids=["one", "its own reward", "its own data", "several", "several, their own data"],
)
def test_environments_train_as_in_trl(
    tiny_model_dir: Path, tmp_path: Path, tokenizer: Any, changes: Options
) -> None:
    options = OPTIONS | {"processing_class": tokenizer} | changes
    trainer = ours(scripted(tiny_model_dir), tmp_path, shared_prefix="always", **options)
    assert trainer.group_sampler == "transformers"
    expected = Run.of(theirs(scripted(tiny_model_dir), tmp_path, **options))
    assert expected.moves
    assert expected.log[0]["tools/call_frequency"] > 0
    assert_same_run(Run.of(trainer), expected)
