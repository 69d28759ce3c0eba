"""Write docs/dropin.md: what becomes of each option of TRL. Tests hold each row of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["works", "falls back", "refused", "inherited"]

HERE = Path(__file__).parent
OPTIONS = "tests/dropin/test_options.py"
PATHS = "tests/dropin/test_paths.py"
DATA = "tests/dropin/test_data_and_rewards.py"
TOOLS = "tests/dropin/test_tools.py"
IMAGES = "tests/dropin/test_images.py"
SPEEDUPS = "tests/test_trainer_speedups.py"
CASES = "cases"  # a case of tests/dropin/cases.py that sets the option

INTRODUCTION = """# Drop-in: what becomes of each option of TRL

`ExtGRPOTrainer` takes the arguments of `trl.GRPOTrainer` 1.16, and `ExtGRPOConfig` every option of
`trl.GRPOConfig`. Each row below is held by a test that trains with the option, and where numbers
can agree trains plain TRL beside it and compares every metric that TRL logs, all advantages and
all weights.

- **Bit for bit**: `extensions: false` is TRL's code.
- **Up to rounding, the same random completions**: `group_sampler: transformers`, `shared_prefix:
  never` and `onednn_linear: false` have TRL draw and compute; only the advantages are ours (1e-5
  of each metric).
- **Up to rounding, the same completions given**: with everything of ours on, as it is by default,
  metrics agree to 1e-4 and weights to 1e-5, for each loss, mask, clip and reward option. Our
  sampler agrees token for token where the draw is no matter of luck (`top_k: 1`), and in
  distribution else ([sampling.md](sampling.md)).

What differs, and why:

- Completions are drawn from the same distribution by other random numbers: those of a completion
  depend on the seed, the generation and its place, so that batches can be cut as memory wants.
- A micro-batch holds whole groups, so that a prompt is computed once. Where a generation feeds
  several updates (`steps_per_generation` above `gradient_accumulation_steps`), an update sees
  whole groups instead of rows of any group; with `loss_type: bnpo` and gradient accumulation the
  denominators are those of whole groups. `shared_prefix: never` shuffles rows as TRL does.
- A group of equal rewards has advantages of exactly 0. A reward that is NaN or infinite counts as
  `None`. `frac_reward_zero_std` is the share of groups without any advantage.
- An evaluation takes its prompts in the order of the set, counts each once, leaves the random
  numbers of training alone, and names all metrics after the set if there are several.

**works**: with our features on. **falls back**: it trains as in TRL, and TRL's sampler or TRL's
padded rows take the place of ours; the log says which and why. **refused**: an error before
training that says what to do. **inherited**: TRL's code reads it, ours leaves it alone; no test
here runs it, for the reason given.

This page is written by `python docs/dropin_table.py`.
"""


@dataclass(frozen=True)
class Row:
    """What becomes of one option.

    Attributes:
        option: Its name, or in words what is handed in.
        status: See the introduction of the page.
        note: What to know; may be empty.
        shown_by: ``CASES``, or the test that shows it, ``file::name``.
    """

    option: str
    status: Status
    note: str = ""
    shown_by: str = CASES


SAMPLED = f"{OPTIONS}::test_likeliest_completions_train_as_in_trl"
STEPS_ASIDE = f"{PATHS}::test_trl_samples_where_we_cannot"
REFUSED = f"{PATHS}::test_what_cannot_work_is_refused_with_the_reason"
UPDATES = f"{PATHS}::test_updates_of_one_generation_hold_other_rows_but_the_same_in_all"
VLLM = f"{PATHS}::test_options_of_vllm_are_taken_as_trl_takes_them"
DEPRECATED = f"{PATHS}::test_deprecated_options_still_set_what_took_their_place"
PRECISION = f"{PATHS}::test_half_precision_agrees_up_to_its_rounding"
COMPLETIONS_LOG = f"{DATA}::test_logged_completions_are_those_of_trl"
PACKAGES = f"{PATHS}::test_what_needs_another_package_says_so_as_in_trl"
NO_VLLM = "vLLM could not be installed where the tests run"

GRPO = [
    Row("learning_rate", "works"),
    Row("remove_unused_columns", "works", "rewards then get no other columns, as in TRL"),
    Row("model_init_kwargs", "works", "with eager attention: padded rows; `dtype`: see `bf16`"),
    Row("trust_remote_code", "works"),
    Row(
        "router_aux_loss_coef",
        "falls back",
        "padded rows, because the loss counts every token of the batch; works with 0; "
        "refused without experts",
        f"{SPEEDUPS}::test_a_mixture_with_an_auxiliary_loss_takes_padded_rows",
    ),
    Row("disable_dropout", "works", "and so shares prefixes, which dropout excludes"),
    Row(
        "cast_lm_head_to_fp32",
        "works",
        shown_by=f"{PATHS}::test_cast_lm_head_to_fp32_gives_the_numbers_of_trl",
    ),
    Row("num_generations", "works"),
    Row(
        "num_generations_eval",
        "works",
        "1 too",
        f"{DATA}::test_evaluation_leaves_training_alone_and_scores_as_trl_does",
    ),
    Row(
        "max_completion_length",
        "works",
        "unset: TRL samples, to the end that `generate` finds; below 1: refused",
    ),
    Row("ds3_gather_for_generation", "inherited", "needs DeepSpeed"),
    Row("shuffle_dataset", "works"),
    Row("pad_to_multiple_of", "works", "packed rows have no padding; the batch has it"),
    Row("generation_batch_size", "works", "an update holds whole groups, see above", UPDATES),
    Row("steps_per_generation", "works", "an update holds whole groups, see above", UPDATES),
    Row("temperature", "works"),
    Row("top_p", "works"),
    Row("top_k", "works"),
    Row("min_p", "works"),
    Row(
        "generation_kwargs",
        "works",
        "with beams, stop strings and what else our sampler does not honour TRL samples; "
        "an unknown name is refused",
    ),
    Row("chat_template_kwargs", "works"),
    Row("repetition_penalty", "works", "continuous batching does not serve it"),
    Row("cache_implementation", "falls back", "TRL samples; works with `dynamic`"),
    Row("use_vllm", "inherited", f"{NO_VLLM}; refused where it is not installed", REFUSED),
    *(
        Row(f"vllm_{name}", "inherited", NO_VLLM, VLLM)
        for name in (
            *("mode", "model_impl", "enable_sleep_mode", "structured_outputs_regex"),
            *("server_base_url", "server_host", "server_port", "server_timeout", "group_port"),
            *("gpu_memory_utilization", "max_model_length", "tensor_parallel_size"),
        )
    ),
    Row("beta", "works"),
    Row("num_iterations", "works", "old log-probabilities come from our sampler if it drew"),
    Row("epsilon", "works"),
    Row("delta", "works"),
    Row("epsilon_high", "works"),
    *(Row(f"sapo_temperature_{sign}", "works") for sign in ("neg", "pos")),
    *(Row(f"vespo_{name}", "works") for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")),
    Row("importance_sampling_level", "works", "`token` and `sequence`"),
    Row("reward_weights", "works"),
    Row("multi_objective_aggregation", "works", "both"),
    Row("scale_rewards", "works", "`group`, `batch`, `none`, and the booleans"),
    Row(
        "loss_type",
        "works",
        "`dapo`, `grpo`, `dr_grpo`, `bnpo`, `cispo`, `sapo`, `luspo`, `vespo`; `bnpo` under "
        "gradient accumulation: see above",
    ),
    Row("mask_truncated_completions", "works"),
    Row("sync_ref_model", "works", "refused with `beta` 0, as by TRL, and under PEFT"),
    Row("ref_model_mixup_alpha", "works"),
    Row("ref_model_sync_steps", "works"),
    Row("top_entropy_quantile", "works"),
    Row("entropy_coef", "works"),
    Row("use_adaptive_entropy", "works"),
    Row("entropy_coef_min", "works"),
    Row("entropy_coef_max", "works"),
    Row("entropy_coef_delta", "works"),
    Row("entropy_target", "works"),
    Row(
        "max_tool_calling_iterations",
        "works",
        "TRL samples where tools are called",
        f"{TOOLS}::test_max_tool_calling_iterations_ends_the_loop",
    ),
    *(
        Row(f"vllm_importance_sampling_{name}", "inherited", NO_VLLM, VLLM)
        for name in ("correction", "mode", "clip_max", "clip_min")
    ),
    Row("off_policy_mask_threshold", "works", "also with `logprobs` of a `rollout_func`"),
    Row("use_bias_correction_kl", "works"),
    Row("log_completions", "works", "the advantages in it are ours", COMPLETIONS_LOG),
    Row(
        "log_multimodal",
        "works",
        shown_by=f"{IMAGES}::test_images_train_as_in_trl",
    ),
    Row("num_completions_to_print", "works", shown_by=COMPLETIONS_LOG),
    Row("log_unique_prompts", "works", "only wandb and trackio read it", COMPLETIONS_LOG),
    Row(
        "log_completions_hub_repo",
        "inherited",
        "needs the Hub; refused without `log_completions`",
        REFUSED,
    ),
    Row(
        "use_transformers_continuous_batching",
        "works",
        "our engine around `generate_batch`; where it cannot serve the run, `shared_prefill`",
        f"{PATHS}::test_continuous_batching_draws_what_generate_draws",
    ),
    Row(
        "transformers_continuous_batching_config",
        "works",
        "TRL's own path then samples; our engine sizes its cache itself",
        f"{PATHS}::test_trls_continuous_batching_runs_with_trls_sampler",
    ),
    Row("use_transformers_paged", "works", "deprecated by TRL", DEPRECATED),
    Row("vllm_importance_sampling_cap", "inherited", f"deprecated by TRL; {NO_VLLM}", DEPRECATED),
]

TRAINING = [
    Row("bf16", "works", "up to the rounding of half precision", PRECISION),
    Row("fp16", "inherited", "on a CPU it does nothing; it needs a GPU"),
    Row("gradient_checkpointing", "works"),
    Row("gradient_accumulation_steps", "works"),
    Row(
        "torch_compile",
        "falls back",
        "padded rows, and torch's own linear layers on a CPU",
        f"{PATHS}::test_torch_compile_trains_as_in_trl",
    ),
    Row(
        "neftune_noise_alpha",
        "falls back",
        "padded rows, because each place has its own noise",
        f"{PATHS}::test_padded_rows_where_shared_ones_are_not_exact",
    ),
    Row("optim", "works", "`adamw_torch`, `adamw_8bit`, `adafactor`, `sgd` are tested"),
    Row("lr_scheduler_type", "works"),
    Row("warmup_steps", "works"),
    Row("max_grad_norm", "works"),
    Row("weight_decay", "works"),
    Row("seed", "works"),
    Row("num_train_epochs", "works"),
    Row("logging_steps", "works"),
    Row("dataloader_num_workers", "works"),
    Row("dataloader_drop_last", "works"),
    Row("train_sampling_strategy", "works", "TRL's sampler of prompts does not read it"),
    Row(
        "eval_strategy",
        "works",
        "what it reports: see above",
        f"{DATA}::test_evaluation_leaves_training_alone_and_scores_as_trl_does",
    ),
    Row(
        "save_strategy",
        "works",
        "checkpoints of TRL resume in ours, and the other way round",
        "tests/test_trainer.py::test_checkpoints_cross_over_between_trl_and_ours",
    ),
    Row("auto_find_batch_size", "refused", "by TRL too: a group would be split", REFUSED),
    Row("use_liger_kernel", "inherited", "liger-kernel is not installed here", PACKAGES),
    Row(
        "report_to",
        "works",
        "TensorBoard here; wandb 0.31 and trackio 0.43 were tried by hand, offline",
        "tests/dropin/test_trackers.py"
        "::test_tensorboard_gets_every_metric_of_training_and_evaluation",
    ),
    Row(
        "push_to_hub",
        "works",
        "in the background, and private unless told otherwise: [Hub](hub.md)",
        "tests/hub/test_runs.py"
        "::test_run_pushes_model_checkpoints_card_plots_and_completions_in_private",
    ),
]

ARGUMENTS = [
    Row(
        "model",
        "works",
        "a name, a folder, a model, a `PeftModel`",
        f"{DATA}::test_objects_are_taken_as_trl_takes_them",
    ),
    Row(
        "reward_funcs",
        "works",
        "functions, `async` ones, objects, partials, reward models; `None` and columns as in TRL",
        f"{DATA}::test_rewards_train_as_in_trl",
    ),
    Row(
        "args",
        "works",
        "a plain `GRPOConfig` means our defaults",
        "tests/test_trainer.py::test_trainer_takes_a_plain_trl_config_as_the_defaults",
    ),
    Row("train_dataset", "works", "plain, conversations, streams"),
    Row(
        "eval_dataset",
        "works",
        "sets, streams (read into memory), several by name",
        f"{DATA}::test_evaluation_leaves_training_alone_and_scores_as_trl_does",
    ),
    Row(
        "processing_class",
        "works",
        shown_by=f"{DATA}::test_objects_are_taken_as_trl_takes_them",
    ),
    Row(
        "reward_processing_classes",
        "works",
        shown_by=f"{DATA}::test_a_reward_model_by_name_trains_as_in_trl",
    ),
    Row("callbacks", "works", shown_by=f"{DATA}::test_objects_are_taken_as_trl_takes_them"),
    Row("optimizers", "works", shown_by=f"{DATA}::test_objects_are_taken_as_trl_takes_them"),
    Row(
        "quantization_config",
        "works",
        "with a `peft_config`",
        f"{PATHS}::test_a_policy_loaded_in_4_bits_trains_its_adapter_as_in_trl",
    ),
    Row(
        "peft_config",
        "works",
        "LoRA, DoRA, whole modules; prompt and prefix tuning fall back, for their virtual tokens",
    ),
    Row(
        "tools",
        "falls back",
        "TRL samples and calls them; prefixes are shared",
        f"{TOOLS}::test_tools_train_as_in_trl",
    ),
    Row(
        "rollout_func",
        "works",
        "its completions go through shared prefixes; `env_mask`, `logprobs` and columns as in TRL",
    ),
    Row(
        "environment_factory",
        "falls back",
        "as `tools`; one, several, with their own data or reward",
        f"{TOOLS}::test_environments_train_as_in_trl",
    ),
    Row(
        "images in the data",
        "falls back",
        "TRL samples, and computes padded rows; the reference is TRL's",
        f"{IMAGES}::test_images_train_as_in_trl",
    ),
]

SECTIONS = {
    "Options of `GRPOConfig`": GRPO,
    "Options of `TrainingArguments` that touch what we do": TRAINING,
    "Arguments of the trainer, and data": ARGUMENTS,
}


def page() -> str:
    """Return the text of docs/dropin.md."""
    return INTRODUCTION + "".join(
        f"\n## {title}\n\n| option | | what to know |\n|---|---|---|\n{''.join(map(_line, rows))}"
        for title, rows in SECTIONS.items()
    )


def _line(row: Row) -> str:
    name = row.option if " " in row.option else f"`{row.option}`"
    return f"| {name} | {row.status} | {row.note} |\n"


if __name__ == "__main__":
    (HERE / "dropin.md").write_text(page())
