"""What this package relies on inside TRL and transformers' trainer, and a check that it holds.

TRL's private members may change in any release. Each :class:`Seam` names one that we wrap, with
what we read of it; :func:`check_contract` runs when the trainer is first imported, so that a
changed TRL stops a run before a model loads.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from types import CodeType
from typing import Any, Literal

from trl_grpo_ext.errors import ContractError

TESTED_TRL_VERSIONS = ("1.16.0",)
TESTED_TRANSFORMERS_VERSION = "5.23.0"


@dataclass(frozen=True)
class Seam:
    """One method that this package wraps, or whose order of events it relies on.

    Attributes:
        name: Of the method.
        parameters: Those that we pass or read by name.
        names: Attributes and globals that its body must use, since we replace or read them there.
        constants: String keys that its body must hold.
        owner: Whose method it is: ``trl.GRPOTrainer``'s or ``transformers.Trainer``'s.
    """

    name: str
    parameters: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    owner: Literal["GRPOTrainer", "Trainer"] = "GRPOTrainer"


SEAMS = (
    Seam(
        "__init__",
        parameters=(
            "model",
            "reward_funcs",
            "args",
            "train_dataset",
            "eval_dataset",
            "processing_class",
        ),
        names=(
            "create_model_from_path",
            "prepare_deepspeed",
            "SyncRefModelCallback",
            "_tokenizer",
            "eos_token_ids",
            "eval_dataset",
            "pad_to_multiple_of",
            "mask_truncated_completions",
            "rollout_func",
            "vllm_generation",
            "_dist",
            "_is_vlm",
            "_logs",
            "_metrics",
            "_step",
            "_tag_names",
            "add_fused_lm_head",
            "environment_factories",
            "generation_config",
            "num_generations",
            "num_generations_eval",
            "num_iterations",
            "ref_model",
            "reward_funcs",
            "reward_func_names",
            "reward_weights",
            "temperature",
            "tools",
            "use_vllm",
        ),
        constants=("advantages", "log_probs", "entropy"),
    ),
    Seam(
        "create_model_card",
        names=("output_dir", "save", "hub_model_id"),
        constants=("README.md",),
    ),
    Seam(
        "_generate",
        parameters=("prompts",),
        names=("_generate_single_turn", "parse_response", "rollout_func"),
        constants=("response_schema", "response_template"),
    ),
    Seam(
        "_generate_single_turn",
        parameters=("prompt_ids", "images", "multimodal_fields"),
        names=(
            "unwrap_model_for_generation",
            "model_wrapped",
            "_dist",
            "summon_full_params",
            "generation_config",
        ),
        constants=("gather_deepspeed3_params", "gradient_checkpointing_kwargs", "recurse"),
    ),
    Seam(
        "_prepare_inputs",
        parameters=("generation_batch",),
        names=(
            "shuffle_sequence_dict",
            "split_tensor_dict",
            "_buffered_inputs",
            "_step",
            "_generate_and_score_completions",
            "num_iterations",
            "steps_per_generation",
        ),
    ),
    Seam(
        "_get_per_token_logps_and_entropies",
        parameters=(
            "model",
            "input_ids",
            "attention_mask",
            "logits_to_keep",
            "batch_size",
            "compute_entropy",
            "compute_aux_loss",
        ),
        names=("autocast", "log_probs", "entropy"),
        constants=("labels", "fused_lm_head"),
    ),
    Seam(
        "_calculate_rewards",
        parameters=("inputs", "prompts", "completions", "completion_ids_list"),
        names=("reward_funcs", "reward_processing_classes", "_log_metric"),
    ),
    Seam("_log_metric", parameters=("name", "value"), names=("_pending_metrics",)),
    Seam("_log_completion_extra", names=("_pending_extra_logs",)),
    Seam(
        "_generate_and_score_completions",
        parameters=("inputs",),
        names=(
            "_calculate_rewards",
            "_generate",
            "_get_per_token_logps_and_entropies",
            "_logs",
            "_metrics",
            "disable_gradient_checkpointing",
            "gradient_accumulation_steps",
            "multi_objective_aggregation",
            "num_generations_eval",
            "num_iterations",
            "no_grad",
            "process_index",
            "ref_model",
            "reward_weights",
            "scale_rewards",
            "steps_per_generation",
        ),
        constants=(
            "advantages",
            "batch_size",
            "completion_mask",
            "frac_reward_zero_std",
            "num_items_in_batch",
            "old_per_token_logps",
            "ref_per_token_logps",
        ),
    ),
    Seam(
        "_compute_loss",
        parameters=("model", "inputs"),
        names=(
            "beta",
            "use_bias_correction_kl",
            "importance_sampling_level",
            "current_gradient_accumulation_steps",
            "loss_type",
            "steps_per_generation",
            "_get_per_token_logps_and_entropies",
        ),
        constants=(
            "compute_entropy",
            "compute_aux_loss",
            "ref_per_token_logps",
            "old_per_token_logps",
            "completion_mask",
            "tool_mask",
            "num_items_in_batch",
            "kl",
        ),
    ),
    Seam(
        "training_step",
        parameters=("model", "inputs", "num_items_in_batch"),
        names=("_step", "current_gradient_accumulation_steps"),
    ),
    Seam("train", parameters=("resume_from_checkpoint",)),
    Seam("_save_checkpoint", parameters=("model", "trial"), names=("_get_output_dir",)),
    Seam("_get_train_sampler", names=("RepeatSampler",)),
    Seam("_get_eval_sampler", names=("RepeatSampler",)),
    Seam("get_eval_dataloader", parameters=("eval_dataset",)),
    Seam("prediction_step", names=("_prepare_inputs",)),
    Seam("evaluation_loop", parameters=("dataloader", "metric_key_prefix"), owner="Trainer"),
    Seam("_remove_unused_columns", parameters=("dataset",), owner="Trainer"),
    Seam(
        "_inner_training_loop",
        names=(
            "on_train_begin",
            "eval_on_start",
            "_evaluate",
            "_run_epoch",
            "_tr_loss",
            "_globalstep_last_logged",
        ),
        owner="Trainer",
    ),
    Seam(
        "_run_epoch",
        names=(
            "skip_first_batches",
            "get_batch_samples",
            "_load_rng_state",
            "training_step",
            "_get_grad_norm",
            "global_step",
            "_maybe_log_save_evaluate",
        ),
        owner="Trainer",
    ),
    Seam(
        "_maybe_log_save_evaluate",
        parameters=("tr_loss", "grad_norm", "model", "trial", "epoch", "start_time"),
        names=("_evaluate", "_save_checkpoint", "should_evaluate", "should_save"),
        owner="Trainer",
    ),
    Seam("_evaluate", parameters=("trial", "skip_scheduler"), owner="Trainer"),
    Seam("_get_grad_norm", parameters=("model", "grad_norm"), owner="Trainer"),
    Seam("_load_rng_state", parameters=("checkpoint",), owner="Trainer"),
    Seam(
        "init_hf_repo",
        parameters=("token", "private"),
        names=("hf_api", "create_repo", "hub_model_id", "hub_token", "push_in_progress"),
        owner="Trainer",
    ),
    Seam(
        "push_to_hub",
        parameters=("commit_message", "blocking", "token", "revision", "private"),
        names=(
            "hf_api",
            "upload_folder",
            "save_model",
            "create_model_card",
            "_finish_current_push",
            "output_dir",
        ),
        constants=("run_as_future", "folder_path", "ignore_patterns"),
        owner="Trainer",
    ),
    Seam(
        "_push_from_checkpoint",
        parameters=("checkpoint_folder",),
        names=("hf_api", "upload_folder", "hub_always_push", "push_in_progress", "is_done"),
        constants=("run_as_future", "folder_path", "path_in_repo", "last-checkpoint"),
        owner="Trainer",
    ),
    Seam("_finish_current_push", names=("push_in_progress",), owner="Trainer"),
    Seam("_save", names=("args", "TRAINING_ARGS_NAME"), owner="Trainer"),
    Seam(
        "_save_checkpoint",
        parameters=("model", "trial"),
        names=(
            "_get_output_dir",
            "_push_from_checkpoint",
            "rotate_checkpoints",
            "best_model_checkpoint",
            "save_to_json",
        ),
        owner="Trainer",
    ),
)

# Functions of TRL's module that we call or replace there, with the parameters that we pass.
_FUNCTIONS = {
    "create_model_from_path": (),
    "shuffle_sequence_dict": ("seq_dict",),
    "disable_gradient_checkpointing": ("model", "gradient_checkpointing_kwargs"),
    "unwrap_model_for_generation": (
        "model",
        "accelerator",
        "gather_deepspeed3_params",
        "gradient_checkpointing_kwargs",
    ),
    "add_fused_lm_head": ("model", "temperature", "outputs"),
}

_CONFIG_FIELDS = (
    "beta",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "num_generations",
    "num_generations_eval",
    "scale_rewards",
    "loss_type",
    "use_bias_correction_kl",
    "multi_objective_aggregation",
    "importance_sampling_level",
    "steps_per_generation",
    "generation_batch_size",
    "sync_ref_model",
    "max_completion_length",
    "num_iterations",
    "temperature",
    "generation_kwargs",
    "cache_implementation",
    "use_vllm",
    "use_transformers_continuous_batching",
    "ds3_gather_for_generation",
    "router_aux_loss_coef",
    "push_to_hub",
    "hub_always_push",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "hub_token",
    "log_completions",
)


def contract_problems() -> list[str]:
    """Return what the installed TRL changed of what we rely on, a line each; empty if sound."""
    from transformers import Trainer
    from trl.trainer import grpo_trainer
    from trl.trainer.grpo_config import GRPOConfig

    owners = {"GRPOTrainer": grpo_trainer.GRPOTrainer, "Trainer": Trainer}
    problems = [problem for seam in SEAMS for problem in _seam_problems(seam, owners[seam.owner])]
    for name, parameters in _FUNCTIONS.items():
        function = getattr(grpo_trainer, name, None)
        if function is None:
            problems.append(f"trl.trainer.grpo_trainer.{name} is gone")
            continue
        found = inspect.signature(function).parameters
        problems += [f"{name} lost its parameter `{p}`" for p in parameters if p not in found]
    fields = GRPOConfig.__dataclass_fields__
    problems += [f"GRPOConfig.{name} is gone" for name in _CONFIG_FIELDS if name not in fields]
    return problems


def is_tested_version() -> bool:
    """Return whether the test suite has run against the installed TRL version."""
    return version("trl") in TESTED_TRL_VERSIONS


def check_contract() -> None:
    """Make sure that the installed TRL is one that this package can extend.

    Raises:
        ContractError: a member changed; the message names each and says which version to install.

    Warns:
        UserWarning: every member is as expected, but this version has not been tested.
    """
    tested = ", ".join(TESTED_TRL_VERSIONS)
    if problems := contract_problems():
        # `Trainer` is transformers' own: another version of that changed.
        changed = any(problem.startswith("Trainer.") for problem in problems)
        beside = f", transformers=={TESTED_TRANSFORMERS_VERSION}" if changed else ""
        raise ContractError(
            f"trl {version('trl')} changed {len(problems)} of the members that trl_grpo_ext "
            f"relies on: {'; '.join(problems)}. Install a tested version (trl=={tested}{beside}), "
            "or follow 'Widening the TRL range' in CONTRIBUTING.md."
        )
    if not is_tested_version():
        warnings.warn(
            f"trl {version('trl')} has every member that trl_grpo_ext relies on but was not tested "
            f"with it. If numbers look wrong, install a tested version (trl=={tested}).",
            stacklevel=2,
        )


def _seam_problems(seam: Seam, trainer_class: type) -> list[str]:
    method = getattr(trainer_class, seam.name, None)
    if method is None:
        return [f"{seam.owner}.{seam.name} is gone"]
    method = inspect.unwrap(method)
    missing = [
        f"its parameter `{name}`"
        for name in seam.parameters
        if name not in inspect.signature(method).parameters
    ]
    names, constants = _vocabulary(method.__code__)
    missing += [f"its use of `{name}`" for name in seam.names if name not in names]
    missing += [f"its key '{key}'" for key in seam.constants if key not in constants]
    return [f"{seam.owner}.{seam.name} lost {', '.join(missing)}"] if missing else []


def _vocabulary(code: CodeType) -> tuple[set[str], set[Any]]:
    """Names and string constants that a function's byte code uses, inner functions included."""
    names, constants = set(code.co_names) | set(code.co_varnames), set()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner_names, inner_constants = _vocabulary(constant)
            names |= inner_names
            constants |= inner_constants
        elif isinstance(constant, str | tuple):
            constants |= set(constant) if isinstance(constant, tuple) else {constant}
    return names, constants
