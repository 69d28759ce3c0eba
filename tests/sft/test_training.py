"""The chat template that can teach to think, and a loss on the assistant's turns alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from tiny import BOS, EOS, PAD
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from trl import ModelConfig, SFTConfig, SFTTrainer
from trl.chat_template_utils import deepseek_r1_distill_chat_template

from trl_grpo_ext.cpu_linear import OneDNNLinear
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.sft.chat_template import (
    end_of_reply,
    prepare_chat_template,
    refuse_unopened,
)
from trl_grpo_ext.sft.training import build_trainer, last_whole_checkpoint

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
    assert prompt(tokenizer) == f"{BOS}User: 1 + 1 =\n\nAssistant: "
    assert whole(tokenizer) == f"{prompt(tokenizer)}{REPLY['content']}{EOS}\n"


def test_a_template_that_drops_thinking_is_replaced_by_trls(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = deepseek_r1_distill_chat_template
    tokenizer.add_special_tokens({"extra_special_tokens": ["<｜end▁of▁sentence｜>"]})
    assert "1 + 1 = 2" not in whole(tokenizer)
    assert any("TRL's version" in change for change in prepare_chat_template(tokenizer))
    assert REPLY["content"] in whole(tokenizer)


def test_the_token_that_ends_a_reply_is_the_one_to_stop_at(tiny_model_dir: Path) -> None:
    """As with Qwen2.5's base models: their EOS token is not what the template writes."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    end = tokenizer.eos_token_id
    tokenizer.eos_token = PAD
    (change,) = prepare_chat_template(tokenizer)
    assert change.startswith(f"A reply ends with {EOS} in the chat template")
    assert tokenizer.eos_token_id == end == end_of_reply(tokenizer)


def test_a_model_that_stops_elsewhere_learns_to_stop_at_the_end_of_a_reply(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.eos_token = PAD
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": pad}))
    made = trainer(folder, tmp_path)
    made.save_model(str(tmp_path / "saved"))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token_id == end
    config = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert config.eos_token_id == [end, pad]


def test_a_template_without_an_end_is_refused(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant{% endif %}"
    with pytest.raises(ConfigurationError, match="ends a reply with no special token"):
        prepare_chat_template(tokenizer)


TRLS = Path(trl.__file__).parent / "chat_templates"


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "gemma", "phi3"])
def test_templates_of_common_models_can_teach(name: str, tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ends = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}
    tokenizer.add_special_tokens({"extra_special_tokens": [ends.get(name, EOS)]})
    tokenizer.chat_template = (TRLS / f"{name}.jinja").read_text()
    prepare_chat_template(tokenizer)
    assert tokenizer.eos_token == ends.get(name, EOS)


def test_only_a_checkpoint_with_all_its_files_is_resumed(tmp_path: Path) -> None:
    assert last_whole_checkpoint(str(tmp_path)) is None
    for step in (5, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")


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
