"""The chat template that can teach to think, and a loss on the assistant's turns alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import EOS
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl import ModelConfig, SFTConfig, SFTTrainer
from trl.chat_template_utils import deepseek_r1_distill_chat_template

from trl_grpo_ext.cpu_linear import OneDNNLinear
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.sft.chat_template import prepare_chat_template, refuse_unopened
from trl_grpo_ext.sft.training import build_trainer

QUESTION = {"role": "user", "content": "1 + 1 ="}
REPLY = {"role": "assistant", "content": "<think>\n1 + 1 = 2\n</think>\n<answer>2</answer>"}


def prompt(tokenizer: Any) -> str:
    text: str = tokenizer.apply_chat_template(
        [QUESTION], tokenize=False, add_generation_prompt=True
    )
    return text


def whole(tokenizer: Any) -> str:
    text: str = tokenizer.apply_chat_template([QUESTION, REPLY], tokenize=False)
    return text


def test_a_template_that_can_teach_stays(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    before = tiny_tokenizer.chat_template
    assert prepare_chat_template(tiny_tokenizer) == []
    assert tiny_tokenizer.chat_template == before


def test_a_template_is_added_where_there_is_none(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = None
    (change,) = prepare_chat_template(tokenizer)
    assert "has no chat template" in change
    assert prompt(tokenizer) == "User: 1 + 1 =\n\nAssistant: "
    assert whole(tokenizer) == f"{prompt(tokenizer)}{REPLY['content']}{EOS}\n"


def test_a_template_that_drops_thinking_is_replaced_by_trls(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = deepseek_r1_distill_chat_template
    assert "1 + 1 = 2" not in whole(tokenizer)
    assert any("TRL's version" in change for change in prepare_chat_template(tokenizer))
    assert REPLY["content"] in whole(tokenizer)


def test_a_template_that_nobody_can_mend_is_refused(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ConfigurationError, match="Set `chat_template_path`"):
        prepare_chat_template(tokenizer)


def test_the_template_opens_think_once_and_refuses_traces_that_do_not(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    closed = prompt(tokenizer)
    refuse_unopened(tokenizer, [[{"role": "assistant", "content": "2"}]])
    (change,) = prepare_chat_template(tokenizer, opens_think=True)
    assert "open <think>" in change
    assert prompt(tokenizer) == f"{closed}<think>\n"
    assert whole(tokenizer).startswith(prompt(tokenizer))
    assert prepare_chat_template(tokenizer, opens_think=True) == []
    refuse_unopened(tokenizer, [[REPLY]])
    with pytest.raises(ConfigurationError, match="but 1 of 2 traces do not begin with it"):
        refuse_unopened(tokenizer, [[REPLY], [{"role": "assistant", "content": "<think>2"}]])


def trainer(tiny_model_dir: Path, tmp_path: Path, **changes: Any) -> SFTTrainer:
    rows = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": text}], "completion": [REPLY]}
            for text in ("1 + 1 =", "what is 1 + 1?", "add one to 1", "1+1")
        ]
    )
    args = SFTConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=4,
        gradient_checkpointing=False,
        **{"max_length": 512, **changes},
    )
    return build_trainer(str(tiny_model_dir), rows, model=ModelConfig(dtype="float32"), args=args)


def test_the_loss_is_on_the_reply_and_its_end_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    made = trainer(tiny_model_dir, tmp_path, assistant_only_loss=True)
    tokenizer: Any = made.processing_class
    (batch,) = made.get_train_dataloader()
    assert len(batch["labels"]) == 4
    for labels, ids in zip(batch["labels"], batch["input_ids"], strict=True):
        trained = labels != -100
        assert tokenizer.decode(ids[trained]) == f"{REPLY['content']}{EOS}\n"
    assert any(isinstance(module, OneDNNLinear) for module in made.model.modules())


def test_packed_traces_have_the_loss_of_separate_ones(tiny_model_dir: Path, tmp_path: Path) -> None:
    losses = []
    for packing in (False, True):
        made = trainer(tiny_model_dir, tmp_path, packing=packing)
        batches = list(made.get_train_dataloader())
        assert (len(batches), len(batches[0]["input_ids"])) == (1, 1 if packing else 4)
        with torch.no_grad():
            losses.append(made.compute_loss(made.model, dict(batches[0])).item())
    separate, packed = losses
    assert packed == pytest.approx(separate, rel=1e-5)


def test_training_lowers_the_loss(tiny_model_dir: Path, tmp_path: Path) -> None:
    made = trainer(
        tiny_model_dir,
        tmp_path,
        max_steps=12,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
    )
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
