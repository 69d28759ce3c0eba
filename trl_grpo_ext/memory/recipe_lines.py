"""Settings as a recipe takes them: the lines of its YAML, and the command that starts it."""

from __future__ import annotations

from typing import Any

import yaml

from trl_grpo_ext.memory.models import hub_name
from trl_grpo_ext.memory.reference import ReferenceFormat, usual_rank
from trl_grpo_ext.memory.settings import RunSettings

BETA = 0.02  # weight of the KL in the recipes

_DTYPES = {
    "mixed": {"dtype": "float32", "bf16": True},
    "bfloat16": {"dtype": "bfloat16", "bf16": True},
    "float32": {"dtype": "float32", "bf16": False},
}
_OPTIMIZERS = {"adamw": "adamw_torch"}
_ACCELERATE = {"none": "ddp", "fsdp": "fsdp2", "zero3": "zero3"}


def recipe_options(model: str, settings: RunSettings) -> dict[str, Any]:
    """Return the options of ``ExtGRPOConfig`` and of TRL's ``ModelConfig``."""
    options: dict[str, Any] = {
        "model_name_or_path": hub_name(model),
        **_DTYPES[settings.dtype],
        "gradient_checkpointing": settings.gradient_checkpointing,
        "optim": _OPTIMIZERS.get(settings.optimizer, settings.optimizer),
        "num_generations": settings.num_generations,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "max_completion_length": settings.completion_tokens,
        **_reference_options(settings),
    }
    if settings.lora_rank:
        options |= {"use_peft": True, "lora_r": settings.lora_rank}
        options |= {"lora_target_modules": ["all-linear"]}
    if settings.sharding == "zero3":
        options |= {"ds3_gather_for_generation": False}
    return options


def recipe_yaml(model: str, settings: RunSettings) -> str:
    """Return :func:`recipe_options` as lines of YAML."""
    return yaml.safe_dump(recipe_options(model, settings), sort_keys=False)


def launch_command(settings: RunSettings) -> str:
    """Return how to start a recipe with these settings, with a file of ``recipes/accelerate``."""
    if settings.num_gpus == 1:
        return "accelerate launch --config_file recipes/accelerate/one_gpu.yaml"
    name = _ACCELERATE.get(settings.sharding, "zero3")
    command = f"accelerate launch --config_file recipes/accelerate/{name}.yaml"
    command += f" --num_processes {settings.num_gpus}"
    if settings.sharding in ("zero1", "zero2"):
        command += f" --zero_stage {settings.sharding[-1]} --zero3_init_flag false"
        command += " --zero3_save_16bit_model false"
    return command


def _reference_options(settings: RunSettings) -> dict[str, Any]:
    if settings.reference == "none":
        return {"beta": 0.0}
    # TRL's own copy, which `auto` is there, takes ZeRO-3 no gathering.
    trls = settings.sharding == "zero3" and settings.reference == "resident"
    kind = "auto" if trls else settings.reference
    options: dict[str, Any] = {"beta": BETA, "reference": kind}
    if kind != "quantized":
        return options
    storage, usual = settings.storage, ReferenceFormat()
    options["reference_quantization"] = storage.quantization
    if storage.block_size != usual.block_size:
        options["reference_block_size"] = storage.block_size
    if not storage.double_quantization:
        options["reference_double_quantization"] = False
    if storage.bits is not None:
        options["reference_compensation"] = "mixed"
        options["reference_bits"] = storage.bits
    elif storage.rank != usual_rank(storage.quantization):
        options["reference_compensation"] = "low_rank" if storage.rank else "rounding"
        if storage.rank:
            options["reference_rank"] = storage.rank
    if storage.embedding_bits:
        options["reference_embedding_quantization"] = "int8"
    return options
