"""The hand-written loop learns, holds to its reference, and is as short as it says."""

from __future__ import annotations

import inspect
import logging
import statistics
import string
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.training_loop import digit_share, main, train

PROMPTS = ["1+1=", "x", "What?", "3*7="]


def run(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[float]:
    settings = {"steps": 25, "max_new_tokens": 8, **options}
    return train(model, tokenizer, PROMPTS, [digit_share], **settings)


@pytest.mark.parametrize("reference", ["resident", "quantized"])
def test_training_loop_learns(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, reference: str
) -> None:
    rewards = run(tiny_model, tiny_tokenizer, reference=reference)
    assert len(rewards) == 25
    assert statistics.mean(rewards[-5:]) > statistics.mean(rewards[:5]) + 0.3


def test_training_loop_is_held_back_by_a_heavy_kl_penalty(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rewards = run(tiny_model, tiny_tokenizer, beta=20.0)
    assert statistics.mean(rewards[-5:]) < statistics.mean(rewards[:5]) + 0.15


def test_training_loop_gives_the_same_rewards_for_the_same_seed(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    start = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    first = run(tiny_model, tiny_tokenizer, steps=3)
    tiny_model.load_state_dict(start)
    assert run(tiny_model, tiny_tokenizer, steps=3) == first
    tiny_model.load_state_dict(start)
    assert run(tiny_model, tiny_tokenizer, steps=3, seed=9) != first


def test_training_loop_takes_at_most_45_lines() -> None:
    lines = [line.strip() for line in inspect.getsource(train).splitlines()]
    code = [line for line in lines if line and not line.startswith(("#", '"""'))]
    assert code[0] == "def train("
    assert len(code) <= 45


def test_training_loop_runs_as_a_script(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="examples.training_loop"):
        main(["--steps", "2", "--reference", "quantized"])
    steps = [record.getMessage().split()[:3] for record in caplog.records]
    assert steps == [["step", "0", "reward"], ["step", "1", "reward"]]


def test_digit_share_by_hand() -> None:
    assert digit_share(completions=["12", "a1b2", "xyz", ""]) == [1.0, 0.5, 0.0, 0.0]
    assert digit_share(completions=[string.digits]) == [1.0]
