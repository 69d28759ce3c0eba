"""GRPO: reinforcement learning from rewards, with a frozen reference that holds the policy back.

What it shows: task and rewards chosen in YAML, accuracy on held-out prompts before and after.
How it departs from the DeepSeek-R1 paper: any model and task; k3 times the ratio, as in TRL.

Hardware, minutes, expected result: in the header of each YAML in recipes/configs/.

    accelerate launch recipes/grpo.py --config recipes/configs/quickstart.yaml
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/grpo.py \
        --config recipes/configs/grpo_qwen2.5-1.5b_gsm8k.yaml

Every option of the YAML can be given on the command line too. ``--dry_run`` checks all of it and
loads no model.
"""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate import PartialState
from transformers import AutoTokenizer
from trl import get_peft_config, get_quantization_config

from trl_grpo_ext import ExtGRPOTrainer
from trl_grpo_ext.data import Task, load_task
from trl_grpo_ext.evaluation import Accuracy
from trl_grpo_ext.evaluation.measuring import measure_accuracy
from trl_grpo_ext.model_cache import prepare_model
from trl_grpo_ext.recipe import Recipe, compare_replies, run_recipe, summarize
from trl_grpo_ext.report import write_report
from trl_grpo_ext.rewards import build_rewards


def run(recipe: Recipe) -> int:
    """Measure, train, measure, write everything to the output folder; return the exit code."""
    task = load_task(recipe.task)
    trainer = build_trainer(recipe, task)
    trainer.run_settings, trainer.run_dataset = recipe.settings, recipe.task.dataset
    before = measure(trainer, recipe, task)
    trainer.accelerator.print(f"Accuracy before: {before}")
    trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
    output_dir = Path(recipe.training.output_dir)
    trainer.save_model(str(output_dir))
    after = measure(trainer, recipe, task)
    trainer.accelerator.print(f"Accuracy after: {after}")
    if trainer.accelerator.is_main_process:
        report = write_report(
            output_dir,
            summary=summarize(trainer, recipe.run, before, after),
            log_history=trainer.state.log_history,
            settings=recipe.settings,
            examples=compare_replies(task.held_out, before, after),
        )
        print(f"The model and its report are in {output_dir}. Read {report}.")
    if recipe.training.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.task.dataset)
    return 0


def build_trainer(recipe: Recipe, task: Task) -> ExtGRPOTrainer:
    """Return the trainer; the main process of each machine prepares the model first."""
    with PartialState().local_main_process_first():
        model = prepare_model(
            recipe.model.model_name_or_path,
            source=recipe.run.model_source,
            cache_dir=recipe.run.model_cache_dir,
        )
    reward_funcs, recipe.training.reward_weights = build_rewards(recipe.task.rewards)
    recipe.training.model_init_kwargs = {
        "revision": recipe.model.model_revision,
        "attn_implementation": recipe.model.attn_implementation,
        "dtype": recipe.model.dtype,
        **(recipe.training.model_init_kwargs or {}),
    }
    return ExtGRPOTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=recipe.training,
        train_dataset=task.train,
        eval_dataset=task.held_out if recipe.training.eval_strategy != "no" else None,
        processing_class=AutoTokenizer.from_pretrained(
            model,
            revision=recipe.model.model_revision,
            padding_side="left",
            trust_remote_code=recipe.training.trust_remote_code,
        ),
        quantization_config=get_quantization_config(recipe.model),
        peft_config=get_peft_config(recipe.model),
    )


def measure(trainer: ExtGRPOTrainer, recipe: Recipe, task: Task) -> Accuracy:
    """Return the accuracy on the held-out prompts, judged by the first reward of the YAML."""
    return measure_accuracy(
        trainer,
        task.held_out if recipe.run.measure_accuracy else task.held_out.select([]),
        trainer.reward_funcs[0],
        max_new_tokens=recipe.training.max_completion_length,
        num_samples=recipe.run.eval_samples,
        temperature=recipe.training.temperature,
        chat_template_kwargs=recipe.training.chat_template_kwargs,
        max_unscored_fraction=recipe.training.max_unscored_fraction,
    )


if __name__ == "__main__":
    sys.exit(run_recipe(run))
