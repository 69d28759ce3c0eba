"""What stands between our paths and TRL's: switches, precisions, and where ours step aside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from dropin.cases import LIKELIEST
from dropin.compare import (
    CHATS,
    PROMPTS,
    TRL_PATHS,
    Log,
    Options,
    Run,
    assert_same_run,
    differ,
    ours,
    rollout,
    theirs,
    trl_run,
)
from peft import LoraConfig
from tiny import build_tiny_model, build_tiny_tokenizer
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedTokenizerFast,
)

from trl_grpo_ext import ExtGRPOConfig
from trl_grpo_ext.errors import ConfigurationError

RANDOM_RUNS: dict[str, Options] = {
    "defaults": {},
    "nucleus": {"top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.1},
    "a few tokens": {"top_k": 5, "min_p": 0.05},
    "conversations": {"train_dataset": CHATS},
    "a stream": {"train_dataset": PROMPTS.to_iterable_dataset()},
    "bnpo, cut": {
        "loss_type": "bnpo",
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 4,
    },
    "several updates a generation": {"steps_per_generation": 3, "per_device_train_batch_size": 4},
    "a large generation": {"generation_batch_size": 24, "max_steps": 3},
    "noisy embeddings": {"neftune_noise_alpha": 5.0, "num_iterations": 2},
}


@pytest.mark.parametrize("changes", RANDOM_RUNS.values(), ids=RANDOM_RUNS.keys())
def test_with_trls_sampler_and_rows_a_random_run_is_trls(
    tiny_model_dir: Path, tmp_path: Path, folder: Path, changes: Options
) -> None:
    found = Run.of(ours(tiny_model_dir, tmp_path, **TRL_PATHS, **changes))
    assert_same_run(found, trl_run(tiny_model_dir, folder, **changes), rel=1e-5)


@pytest.mark.parametrize("name", ["nucleus", "a stream", "several updates a generation"])
def test_without_extensions_a_random_run_is_trls_bit_for_bit(
    tiny_model_dir: Path, tmp_path: Path, folder: Path, name: str
) -> None:
    changes = RANDOM_RUNS[name]
    found = Run.of(ours(tiny_model_dir, tmp_path, extensions=False, **changes))
    assert_same_run(found, trl_run(tiny_model_dir, folder, **changes), rel=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps_per_generation": 3, "per_device_train_batch_size": 4, "max_steps": 3},
        {"generation_batch_size": 24, "max_steps": 2},
    ],
    ids=["steps_per_generation", "generation_batch_size"],
)
def test_updates_of_one_generation_hold_other_rows_but_the_same_in_all(
    tiny_model_dir: Path, tmp_path: Path, folder: Path, changes: Options
) -> None:
    # An update of ours has whole groups, one of TRL rows of any. Without learning the sums agree.
    options = {"rollout_func": rollout, "learning_rate": 0.0, **changes}
    found = Run.of(ours(tiny_model_dir, tmp_path, shared_prefix="always", **options))
    expected = trl_run(tiny_model_dir, folder, **options)
    assert found.completions == expected.completions
    losses, their_losses = (_values(run.log, "loss") for run in (found, expected))
    assert losses != pytest.approx(their_losses, rel=1e-3)
    assert sum(losses) == pytest.approx(sum(their_losses), rel=1e-4)


def _values(log: Log, key: str) -> list[float]:
    return [entry[key] for entry in log if key in entry]


# Precisions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{"bf16": True}, {"model_init_kwargs": {"dtype": "bfloat16"}}],
    ids=["bf16", "model_init_kwargs"],
)
def test_half_precision_agrees_up_to_its_rounding(
    tiny_model_dir: Path, tmp_path: Path, folder: Path, changes: Options
) -> None:
    options = {"rollout_func": rollout, "max_steps": 1, "beta": 0.0, **changes}
    found = Run.of(ours(tiny_model_dir, tmp_path, shared_prefix="always", **options))
    expected = trl_run(tiny_model_dir, folder, **options)
    assert expected.moves
    single = trl_run(tiny_model_dir, folder, rollout_func=rollout, max_steps=1, beta=0.0)
    assert differ(expected, single)
    assert_same_run(found, expected, rel=0.03, weights=(0.01, 0.01))


@pytest.fixture(scope="module")
def untied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an LM head of its own."""
    folder = tmp_path_factory.mktemp("untied") / "tiny-untied"
    tokenizer = build_tiny_tokenizer()
    model = build_tiny_model(tokenizer)
    model.config.tie_word_embeddings = False
    untied = type(model)(model.config)
    untied.load_state_dict(model.state_dict())
    untied.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("dtype", "rel", "weights"),
    [("float32", 1e-4, (2e-6, 1e-5)), ("bfloat16", 0.03, (0.01, 0.01))],
    ids=["float32", "bfloat16"],
)
def test_cast_lm_head_to_fp32_gives_the_numbers_of_trl(
    untied_dir: Path, tmp_path: Path, dtype: str, rel: float, weights: tuple[float, float]
) -> None:
    options = {"rollout_func": rollout, "cast_lm_head_to_fp32": True, "max_steps": 1}
    options |= {"model_init_kwargs": {"dtype": dtype}}
    trainer = ours(untied_dir, tmp_path, shared_prefix="always", **options)
    assert trainer.model.lm_head.weight.dtype == torch.float32
    expected = Run.of(theirs(untied_dir, tmp_path, **options))
    assert expected.moves
    assert_same_run(Run.of(trainer), expected, rel=rel, weights=weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cast_lm_head_to_fp32_samples(untied_dir: Path, tmp_path: Path, dtype: str) -> None:
    options = {"cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": dtype}}
    trainer = ours(untied_dir, tmp_path, max_steps=1, **options)
    assert trainer.group_sampler == "shared_prefill"
    assert Run.of(trainer).moves


def test_a_policy_loaded_in_4_bits_trains_its_adapter_as_in_trl(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    options = {
        "rollout_func": rollout,
        "peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True),
        "max_steps": 1,
    }
    found = Run.of(ours(tiny_model_dir, tmp_path, **options))
    expected = Run.of(theirs(tiny_model_dir, tmp_path, **options))
    assert expected.moves
    assert_same_run(found, expected, rel=0.03, weights=(0.01, 0.01))


# Ours step aside ----------------------------------------------------------------------------------


def test_continuous_batching_draws_what_generate_draws(
    tiny_model_dir: Path, tmp_path: Path, folder: Path
) -> None:
    options = LIKELIEST | {"max_steps": 1}
    changes = {"use_transformers_continuous_batching": True}
    trainer = ours(tiny_model_dir, tmp_path, **options, **changes)
    assert trainer.group_sampler == "continuous_batching"
    assert_same_run(Run.of(trainer), trl_run(tiny_model_dir, folder, **options))


def test_trls_continuous_batching_runs_with_trls_sampler(
    tiny_model_dir: Path, tmp_path: Path, folder: Path
) -> None:
    options = LIKELIEST | {"max_steps": 1}
    changes = {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"num_blocks": 32, "max_batch_tokens": 128},
        "group_sampler": "transformers",
    }
    found = Run.of(ours(tiny_model_dir, tmp_path, **options, **changes))
    assert_same_run(found, trl_run(tiny_model_dir, folder, **options))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cache_implementation": "static"}, "`cache_implementation`"),
        ({"generation_kwargs": {"num_beams": 2}}, "`num_beams`"),
        ({"max_completion_length": None}, "`max_new_tokens` is not given"),
    ],
    ids=["cache_implementation", "generation_kwargs", "max_completion_length"],
)
def test_trl_samples_where_we_cannot(
    tiny_model_dir: Path, tmp_path: Path, changes: Options, reason: str
) -> None:
    trainer = ours(tiny_model_dir, tmp_path, **changes)
    assert trainer.group_sampler == "transformers"
    assert reason in trainer.group_sampler_reason


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")
def test_without_a_limit_completions_are_those_of_trl(
    tiny_model_dir: Path, tmp_path: Path, folder: Path
) -> None:
    options = LIKELIEST | {"max_completion_length": None}
    found = Run.of(ours(tiny_model_dir, tmp_path, **options))
    assert_same_run(found, trl_run(tiny_model_dir, folder, **options))


TRACING = "ignore:"  # torch.compile reads what warns where it traces


@pytest.mark.filterwarnings(TRACING)
@pytest.mark.parametrize(
    "changes",
    [
        {"neftune_noise_alpha": 5.0},
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow
        ),
    ],
    ids=["neftune_noise_alpha", "torch_compile"],
)
def test_padded_rows_where_shared_ones_are_not_exact(
    tiny_model_dir: Path, tmp_path: Path, changes: Options
) -> None:
    packed: list[bool] = []

    def note(_: Any, __: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            packed.append("shared_prefix" in kwargs)

    trainer = ours(tiny_model_dir, tmp_path, rollout_func=rollout, **changes)
    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    assert Run.of(trainer).moves
    assert packed == [False, False]


@pytest.mark.slow
@pytest.mark.filterwarnings(TRACING)
def test_torch_compile_trains_as_in_trl(tiny_model_dir: Path, tmp_path: Path, folder: Path) -> None:
    options = {"rollout_func": rollout, "torch_compile": True, "torch_compile_backend": "eager"}
    found = Run.of(ours(tiny_model_dir, tmp_path, **options))
    assert_same_run(found, trl_run(tiny_model_dir, folder, **options))


@pytest.mark.slow
@pytest.mark.filterwarnings(TRACING)
def test_torch_compile_works_with_the_default_backend(
    tiny_model_dir: Path, tmp_path: Path, folder: Path
) -> None:
    options = {"rollout_func": rollout, "max_steps": 1}
    found = Run.of(ours(tiny_model_dir, tmp_path, **options, torch_compile=True))
    assert_same_run(found, trl_run(tiny_model_dir, folder, **options))


# Refused ------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Options, type[Exception], str]] = {
    "use_vllm": ({"use_vllm": True}, ConfigurationError, "vLLM is not installed"),
    "auto_find_batch_size": (
        {"auto_find_batch_size": True},
        ConfigurationError,
        "auto_find_batch_size is not supported",
    ),
    "log_completions_hub_repo": (
        {"log_completions_hub_repo": "me/completions"},
        ConfigurationError,
        "log_completions is False",
    ),
    "generation_batch_size": (
        {"generation_batch_size": 12, "steps_per_generation": 1},
        ConfigurationError,
        "can not be both configured",
    ),
    "generation_kwargs": (
        {"generation_kwargs": {"top_q": 1}},
        ConfigurationError,
        "`top_q`.*does not know",
    ),
    "sync_ref_model": (
        {"sync_ref_model": True, "beta": 0.0},
        ValueError,
        "nothing to synchronize",
    ),
    "router_aux_loss_coef": (
        {"router_aux_loss_coef": 0.1},
        ValueError,
        "not a Mixture-of-Experts model",
    ),
    "loss_type": ({"loss_type": "ppo"}, ConfigurationError, "`loss_type` is 'ppo'"),
    "max_completion_length": (
        {"max_completion_length": 0},
        ConfigurationError,
        "`max_completion_length` is 0",
    ),
    "vllm_importance_sampling_clip_min": (
        {"vllm_importance_sampling_clip_min": 5.0},
        ConfigurationError,
        "must be less than",
    ),
    "accelerator_config": (
        {
            "accelerator_config": {"dispatch_batches": True},
            "train_dataset": PROMPTS.to_iterable_dataset(),
        },
        ValueError,
        "dispatch_batches=False",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_work_is_refused_with_the_reason(
    tiny_model_dir: Path, tmp_path: Path, changes: Options, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ours(tiny_model_dir, tmp_path, **changes)


VLLM: Options = {
    "vllm_mode": "server",
    "vllm_model_impl": "transformers",
    "vllm_enable_sleep_mode": True,
    "vllm_structured_outputs_regex": "a+",
    "vllm_server_base_url": "http://localhost:1",
    "vllm_server_host": "localhost",
    "vllm_server_port": 1,
    "vllm_server_timeout": 1.0,
    "vllm_group_port": 2,
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_max_model_length": 99,
    "vllm_tensor_parallel_size": 2,
    "vllm_importance_sampling_correction": False,
    "vllm_importance_sampling_mode": "token_mask",
    "vllm_importance_sampling_clip_max": 2.0,
    "vllm_importance_sampling_clip_min": 0.5,
}


def test_options_of_vllm_are_taken_as_trl_takes_them(tiny_model_dir: Path, tmp_path: Path) -> None:
    found, expected = (make(tiny_model_dir, tmp_path, **VLLM).args for make in (ours, theirs))
    for name, value in VLLM.items():
        assert getattr(found, name) == getattr(expected, name) == value


@pytest.mark.parametrize(
    ("deprecated", "option", "value"),
    [
        ("use_transformers_paged", "use_transformers_continuous_batching", True),
        ("vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max", 2.5),
    ],
)
def test_deprecated_options_still_set_what_took_their_place(
    tmp_path: Path, deprecated: str, option: str, value: object
) -> None:
    with pytest.warns(FutureWarning, match=deprecated):
        config = ExtGRPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to=[], **{deprecated: value}
        )
    assert getattr(config, option) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"use_liger_kernel": True}, "liger-kernel"), ({"report_to": "wandb"}, "wandb")],
    ids=["use_liger_kernel", "report_to"],
)
@pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated")
def test_what_needs_another_package_says_so_as_in_trl(
    tiny_model_dir: Path, tmp_path: Path, changes: Options, message: str
) -> None:
    with pytest.raises((ImportError, RuntimeError), match=message):
        ours(tiny_model_dir, tmp_path, **changes).train()


@pytest.mark.parametrize("engine", ["auto", "transformers"])
@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "has no token, so there is nothing to go on from"), ("1" * 600, "has 600 tokens, but")],
    ids=["empty", "too-long"],
)
def test_a_prompt_that_cannot_be_answered_is_named_whatever_samples(
    tiny_model_dir: Path, tmp_path: Path, engine: str, prompt: str, message: str
) -> None:
    rows = Dataset.from_dict({"prompt": ["1 + 1 =", prompt]})
    changes = {"group_sampler": engine, "train_dataset": rows, "per_device_train_batch_size": 8}
    with pytest.raises(ValueError, match=message):
        ours(tiny_model_dir, tmp_path, **changes).train()


def test_a_tokenizer_without_padding_pads_with_its_end(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.pad_token = None
    histories = []
    for given in (tokenizer, None):
        trainer = ours(tiny_model_dir, tmp_path, processing_class=given, max_steps=1)
        trainer.train()
        histories.append(trainer.state.log_history[0])
    assert tokenizer.pad_token == tokenizer.eos_token
    for name in ("loss", "reward", "kl", "completions/mean_length"):
        assert histories[0][name] == pytest.approx(histories[1][name], abs=1e-6), name


def test_a_model_without_a_cache_is_sampled_by_generate(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = OpenAIGPTConfig(
        vocab_size=len(tiny_tokenizer), n_positions=128, n_embd=8, n_layer=1, n_head=2
    )
    changes = {"processing_class": tiny_tokenizer, "max_steps": 1, "disable_dropout": True}
    model = tmp_path / "model"
    OpenAIGPTLMHeadModel(config).save_pretrained(model)
    with pytest.raises(ConfigurationError, match="the model keeps no keys and values"):
        ours(model, tmp_path, **changes, group_sampler="shared_prefill")
    trainer = ours(model, tmp_path, **changes)
    trainer.train()
    assert trainer.group_sampler == "transformers"
    assert trainer.state.global_step == 1
