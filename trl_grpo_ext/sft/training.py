"""The trainer of supervised fine-tuning: TRL's, on turns of conversations."""

from __future__ import annotations

from typing import Any, cast

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from trl_grpo_ext.cpu_linear import use_onednn
from trl_grpo_ext.sft.chat_template import prepare_chat_template, refuse_unopened


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
    if args.device.type == "cpu" and trainer.model is not None:
        use_onednn(trainer.model)
    return trainer
