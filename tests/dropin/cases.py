"""One option of ``GRPOConfig`` at a time, beside the run without it.

``GIVEN`` runs train on completions that a ``rollout_func`` hands out, so that our shared prefixes
can be compared with TRL's padded rows. ``SAMPLED`` runs sample, but always the likeliest token, so
that our sampler can be compared with TRL's, whose random numbers are others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dropin.compare import (
    CHATS,
    PROMPTS,
    Options,
    by_place,
    masked_rollout,
    scored_rollout,
    vowels,
)
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from tiny import CHAT_TEMPLATE, build_tiny_tokenizer


@dataclass(frozen=True)
class Case:
    """One option, or some that belong together.

    Attributes:
        changes: The option.
        base: What both runs have beside it.
        acts: Whether it changes a number of the run; if not, it only must not.
        but: Metrics that are means of micro-batches' means, which hold other rows in ours.
    """

    changes: Options
    base: Options = field(default_factory=dict)
    acts: bool = True
    but: tuple[str, ...] = ()


# The policy moves far between the generation and the last update on it.
AGAIN: Options = {"num_iterations": 3, "max_steps": 3, "learning_rate": 0.5}
ADAPTIVE: Options = {
    "use_adaptive_entropy": True,
    "entropy_target": 9.0,
    "entropy_coef_delta": 0.3,
    "max_steps": 3,
}
SYNC: Options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 3}
TWO_REWARDS: Options = {"reward_funcs": [vowels, by_place]}
MEANS_OF_MEANS = ("kl", "entropy", "clip_ratio/region_mean", "clip_ratio/low_mean")

LOSSES: dict[str, Case] = {
    **{
        f"loss_type={name}": Case({"loss_type": name}, AGAIN)
        for name in ("grpo", "dr_grpo", "cispo", "sapo", "vespo")
    },
    "loss_type=bnpo": Case({"loss_type": "bnpo"}, AGAIN | {"loss_type": "grpo"}),
    "loss_type=luspo": Case({"loss_type": "luspo"}, AGAIN | {"learning_rate": 0.02}),
    "loss_type=luspo, sequence": Case(
        {"loss_type": "luspo", "importance_sampling_level": "sequence"}, AGAIN
    ),
    "importance_sampling_level": Case({"importance_sampling_level": "sequence"}, AGAIN),
    "importance_sampling_level, grpo": Case(
        {"importance_sampling_level": "sequence", "loss_type": "grpo"}, AGAIN
    ),
    "mask_truncated_completions": Case({"mask_truncated_completions": True}, AGAIN),
    "top_entropy_quantile": Case({"top_entropy_quantile": 0.5}),
    "top_entropy_quantile=0": Case({"top_entropy_quantile": 0.0}),
    "entropy_coef": Case({"entropy_coef": 0.1}),
    "entropy_coef, half the tokens": Case({"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}),
    "use_adaptive_entropy": Case(ADAPTIVE, {"max_steps": 3}),
    "entropy_coef_max": Case({"entropy_coef_max": 0.2}, ADAPTIVE),
    "entropy_coef_delta": Case({"entropy_coef_delta": 0.1}, ADAPTIVE),
    "entropy_target": Case({"entropy_target": 0.0}, ADAPTIVE | {"entropy_coef": 0.3}),
    "entropy_coef_min": Case(
        {"entropy_coef_min": 0.2}, ADAPTIVE | {"entropy_target": 0.0, "entropy_coef": 0.3}
    ),
    "epsilon": Case({"epsilon": 0.01}, AGAIN),
    "epsilon_high": Case({"epsilon_high": 0.9}, AGAIN),
    "epsilon_high, cispo": Case({"epsilon_high": 1.1}, AGAIN | {"loss_type": "cispo"}),
    "delta": Case({"delta": 1.05}, AGAIN),
    "beta": Case({"beta": 0.0}),
    "use_bias_correction_kl": Case({"use_bias_correction_kl": False}, AGAIN),
    "use_bias_correction_kl, sequence": Case(
        {"use_bias_correction_kl": False}, AGAIN | {"importance_sampling_level": "sequence"}
    ),
    "off_policy_mask_threshold": Case({"off_policy_mask_threshold": 0.001}, AGAIN),
    "off_policy_mask_threshold, log-probabilities of a sampler": Case(
        {"off_policy_mask_threshold": 0.5}, {"rollout_func": scored_rollout}
    ),
    "sapo_temperature_neg": Case({"sapo_temperature_neg": 3.0}, AGAIN | {"loss_type": "sapo"}),
    "sapo_temperature_pos": Case({"sapo_temperature_pos": 3.0}, AGAIN | {"loss_type": "sapo"}),
    **{
        name: Case({name: 0.7}, AGAIN | {"loss_type": "vespo"})
        for name in ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")
    },
    "temperature": Case({"temperature": 0.6}),
    "max_completion_length, dr_grpo": Case({"max_completion_length": 80}, {"loss_type": "dr_grpo"}),
    "env_mask of a rollout_func": Case({"rollout_func": masked_rollout}, AGAIN),
    "env_mask, truncated masked": Case(
        {"mask_truncated_completions": True, "top_entropy_quantile": 0.5, "entropy_coef": 0.1},
        AGAIN | {"rollout_func": masked_rollout},
    ),
}

ADVANTAGES: dict[str, Case] = {
    "scale_rewards=batch": Case({"scale_rewards": "batch"}),
    "scale_rewards=none": Case({"scale_rewards": "none"}),
    "scale_rewards=false": Case({"scale_rewards": False}),
    "multi_objective_aggregation": Case(
        {"multi_objective_aggregation": "normalize_then_sum"}, TWO_REWARDS
    ),
    "reward_weights": Case({"reward_weights": [0.3, 2.0]}, TWO_REWARDS),
    "num_generations": Case({"num_generations": 6}),
}

LORA = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
WITH_DROPOUT = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5)
DORA = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["mlp"], use_dora=True)

RUNS: dict[str, Case] = {
    "num_iterations": Case({"num_iterations": 2}, {"max_steps": 4}),
    "gradient_accumulation_steps": Case(
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4}, but=MEANS_OF_MEANS
    ),
    "gradient_checkpointing": Case({"gradient_checkpointing": True}, acts=False),
    "shuffle_dataset": Case({"shuffle_dataset": False}),
    "pad_to_multiple_of": Case({"pad_to_multiple_of": 16}, AGAIN, acts=False),
    "sync_ref_model": Case(SYNC, {"max_steps": 3}),
    "ref_model_mixup_alpha": Case({"ref_model_mixup_alpha": 0.1}, SYNC),
    "ref_model_sync_steps": Case({"ref_model_sync_steps": 2}, SYNC),
    "remove_unused_columns": Case({"remove_unused_columns": True}, acts=False),
    "trust_remote_code": Case({"trust_remote_code": True}, acts=False),
    "ds3_gather_for_generation": Case({"ds3_gather_for_generation": False}, acts=False),
    "log_multimodal": Case({"log_multimodal": False}, acts=False),
    "learning_rate": Case({"learning_rate": 0.01}),
    "lr_scheduler_type": Case({"lr_scheduler_type": "cosine", "warmup_steps": 1}),
    "max_grad_norm": Case({"max_grad_norm": 0.01}),
    "seed": Case({"seed": 3}),
    "optim=adamw_torch": Case({"optim": "adamw_torch", "learning_rate": 1e-3}),
    "optim=adamw_8bit": Case({"optim": "adamw_8bit", "learning_rate": 1e-3}),
    "optim=adafactor": Case({"optim": "adafactor", "learning_rate": 1e-3}),
    "weight_decay": Case({"weight_decay": 0.1}),
    "logging_steps": Case({"logging_steps": 2}),
    "num_train_epochs": Case({"num_train_epochs": 1, "max_steps": -1}),
    "dataloader_num_workers": Case({"dataloader_num_workers": 1}, acts=False),
    "dataloader_drop_last": Case({"dataloader_drop_last": True}, acts=False),
    "train_sampling_strategy": Case({"train_sampling_strategy": "group_by_length"}, acts=False),
    "peft_config": Case({"peft_config": LORA}, AGAIN),
    "disable_dropout": Case({"disable_dropout": True}, {"peft_config": WITH_DROPOUT}),
    "peft_config, DoRA and whole modules": Case({"peft_config": DORA}),
}
GIVEN = LOSSES | ADVANTAGES | RUNS

# The likeliest token each time, so that both samplers draw the same. Equal completions have no
# gradient of their own: the bonus of the entropy has.
RANDOM: Options = {"reward_funcs": by_place, "entropy_coef": 0.5}
LIKELIEST: Options = RANDOM | {"top_k": 1}
TERSE = build_tiny_tokenizer()
TERSE.chat_template = (
    "{% if terse %}{{ messages[0].content }}{% else %}" + CHAT_TEMPLATE + "{% endif %}"
)
SAMPLED: dict[str, Case] = {
    "top_k": Case({"top_k": 1}, RANDOM),
    "top_p": Case({"top_p": 1e-6}, RANDOM),
    "min_p": Case({"min_p": 1.0}, RANDOM),
    "temperature": Case({"temperature": 0.7}, LIKELIEST),
    "repetition_penalty": Case({"repetition_penalty": 1.8}, LIKELIEST),
    "max_completion_length": Case({"max_completion_length": 3}, LIKELIEST),
    "num_generations": Case({"num_generations": 6}, LIKELIEST),
    "num_iterations": Case({"num_iterations": 2, "temperature": 0.8}, LIKELIEST),
    "pad_to_multiple_of": Case(
        {"pad_to_multiple_of": 8}, LIKELIEST | {"num_iterations": 2}, acts=False
    ),
    "generation_kwargs": Case(
        {"generation_kwargs": {"suppress_tokens": [4, 5, 6, 7], "no_repeat_ngram_size": 2}},
        LIKELIEST,
    ),
    "generation_kwargs, greedy": Case({"generation_kwargs": {"do_sample": False}}, RANDOM),
    "generation_kwargs, beams": Case(
        {"generation_kwargs": {"num_beams": 2, "do_sample": False}}, RANDOM
    ),
    "cache_implementation": Case({"cache_implementation": "static"}, LIKELIEST, acts=False),
    "conversations": Case({"train_dataset": CHATS}, LIKELIEST),
    "chat_template_kwargs": Case(
        {"chat_template_kwargs": {"terse": True}},
        LIKELIEST | {"train_dataset": CHATS, "processing_class": TERSE},
    ),
    "a stream": Case({"train_dataset": PROMPTS.to_iterable_dataset()}, LIKELIEST),
    "model_init_kwargs": Case(
        {"model_init_kwargs": {"attn_implementation": "eager"}}, LIKELIEST, acts=False
    ),
    "peft_config, virtual tokens": Case(
        {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}, LIKELIEST
    ),
    "peft_config, prefix": Case(
        {"peft_config": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}, LIKELIEST
    ),
}
