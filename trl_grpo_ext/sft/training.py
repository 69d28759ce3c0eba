"""The trainer of supervised fine-tuning: TRL's, on turns of conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from trl_grpo_ext.checkpointing import LAST_GOOD
from trl_grpo_ext.cpu_linear import use_onednn
from trl_grpo_ext.sft.chat_template import (
    check_chat_template,
    end_of_reply,
    prepare_chat_template,
    refuse_unopened,
)


def build_trainer(
    name: str,
    rows: Dataset,
    *,
    model: ModelConfig,
    args: SFTConfig,
    opens_think: bool = False,
    eval_rows: Dataset | None = None,
) -> SFTTrainer:
    """Return TRL's trainer for turns of conversations; its loss is on the assistant's turn alone.

    Args:
        name: Folder or Hub name of the model.
        rows: Columns ``prompt`` and ``completion``, of
            :func:`~trl_grpo_ext.sft.traces.make_traces`.
        model: How it is loaded, and its adapter.
        args: Of TRL. ``assistant_only_loss`` is what the rows are made for, so that TRL's way to
            it, which needs a template with marks, is switched off.
        opens_think: As for :func:`~trl_grpo_ext.sft.chat_template.prepare_chat_template`, unless
            ``chat_template_path`` names a template.
        eval_rows: To measure the loss on.

    Raises:
        ConfigurationError: The chat template cannot teach to think, or the traces do not begin
            with what it opens a reply with.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        name, revision=model.model_revision, trust_remote_code=args.trust_remote_code
    )
    if args.chat_template_path is None:
        for change in prepare_chat_template(tokenizer, opens_think=opens_think):
            PartialState().print(change)
        refuse_unopened(tokenizer, rows["completion"])
    args.assistant_only_loss = False
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "quantization_config": get_quantization_config(model),
        **cast("dict[str, Any]", args.model_init_kwargs or {}),
    }
    trainer = SFTTrainer(
        model=name,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
    )
    check_chat_template(tokenizer)
    policy: Any = trainer.model
    stops_at(policy, end_of_reply(tokenizer))
    if args.device.type == "cpu":
        use_onednn(policy)
    return trainer


def stops_at(model: Any, token: int) -> None:
    """Make a token one that generation stops at, before those that the model has."""
    known = model.generation_config.eos_token_id
    others = [known] if isinstance(known, int) else list(known or [])
    if token not in others:
        model.generation_config.eos_token_id = [token, *others]


def checkpoint_to_resume(args: SFTConfig) -> str | None:
    """Return what ``resume_from_checkpoint`` stands for: for ``last-good`` the newest whole one."""
    asked = args.resume_from_checkpoint
    return last_whole_checkpoint(str(args.output_dir)) if asked == LAST_GOOD else asked


def last_whole_checkpoint(output_dir: str) -> str | None:
    """Return the newest checkpoint of a run that has all its files; ``None`` if there is none.

    transformers writes the trainer's state behind weights and optimizer, in the folder itself.
    """
    numbered = {
        int(path.name.rpartition("-")[2]): path
        for path in Path(output_dir).glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdigit() and (path / TRAINER_STATE_NAME).is_file()
    }
    return str(numbered[max(numbered)]) if numbered else None
