"""The configuration: what it refuses, and that it says everything at once."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, TrlParser

from trl_grpo_ext.config import (
    ExtensionOptions,
    ExtGRPOConfig,
    _group_problem,
)
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.losses import LOSS_TYPE_REDUCTIONS

BASE: dict[str, Any] = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": []}


def problems(**settings: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        ExtGRPOConfig(**BASE | settings)
    return caught.value.problems


def test_config_defaults_equal_trl() -> None:
    ours, theirs = ExtGRPOConfig(**BASE), GRPOConfig(**BASE)
    skipped = {"logging_dir", "run_name"}
    for name in set(GRPOConfig.__dataclass_fields__) - skipped:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_config_takes_the_output_folder_first_as_trl_does() -> None:
    assert ExtGRPOConfig("here", use_cpu=True, bf16=False, report_to=[]).output_dir == "here"


def test_config_reports_everything_at_once() -> None:
    found = problems(
        num_generations=7, kl_estimator="k4", advantage_eps=-1.0, kl_clamp=0.0, reference="nf4"
    )
    assert len(found) == 6
    text = "\n".join(found)
    for part in ("`num_generations`=7", "'k4'", "`advantage_eps` is -1.0", "`kl_clamp` is 0.0"):
        assert part in text
    assert (
        "`reference` is 'nf4', which is not known. Use one of: auto, none, adapter, "
        "resident, streamed, quantized." in text
    )
    assert "`beta` is 0" in text


def test_config_names_batch_and_divisors_when_a_group_would_be_split() -> None:
    (found,) = problems(num_generations=8, per_device_train_batch_size=5, steps_per_generation=4)
    assert found == (
        "`num_generations`=8 does not divide the generation batch of 20 completions "
        "(`per_device_train_batch_size`=5 x 1 process x `steps_per_generation`=4), so a group "
        "would be split. Use 2, 4, 5, 10, 20, or change the batch size."
    )


def test_config_counts_the_processes_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the check: a whole configuration would look for the other process.
    config = ExtGRPOConfig(**BASE)
    config.num_generations, config.per_device_train_batch_size = 4, 3
    config.generation_batch_size = config.steps_per_generation = None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "6 completions (`per_device_train_batch_size`=3 x 2 processes" in _group_problem(config)


@pytest.mark.parametrize("size", [0, 1])
def test_config_refuses_a_group_of_one(size: int) -> None:
    assert "at least 2 completions" in "\n".join(problems(num_generations=size))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage_baseline": "median"}, "Use one of: mean, leave_one_out."),
        ({"kl_estimator": "k4"}, "Use one of: k1, k2, k3."),
        ({"scale_rewards": "std"}, "Use one of: group, batch, none."),
        ({"loss_type": "ppo"}, "Use one of: grpo, dr_grpo, dapo"),
        ({"importance_sampling_level": "word"}, "Use one of: token, sequence."),
        ({"multi_objective_aggregation": "max"}, "Use one of: sum_then_normalize"),
        (
            {"beta": 0.1, "reference": "quantized", "reference_quantization": "int3"},
            "Use one of: nf4, fp4, int8.",
        ),
        (
            {"beta": 0.1, "reference": "quantized", "reference_block_size": 3},
            "Use one of: 64, 128",
        ),
        ({"enable_jit_checkpoint": True}, "Set `enable_jit_checkpoint: false`."),
        ({"dynamic_sampling_max_rounds": 3}, "but `dynamic_sampling` is false"),
        ({"max_skipped_steps": 0}, "Use at least 1"),
        ({"eval_decoding": "beam"}, "Use one of: sampled, greedy, both."),
        ({"eval_pass_k": [64]}, "Set `num_generations_eval` to at least 64"),
        ({"step_log": "table"}, "`step_log` is 'table'"),
        ({"kl_estimator": "k1", "use_bias_correction_kl": False}, "expected gradient of 0"),
        ({"kl_estimator": "k2"}, "Set `use_bias_correction_kl: false`."),
        ({"reference": "quantized"}, "no KL penalty and no reference, but `reference` is set"),
        ({"reference": "adapter"}, "no KL penalty and no reference, but `reference` is set"),
        ({"beta": 0.1, "reference": "none"}, "so there is a KL penalty that needs one"),
        ({"reference": "none", "kl_clamp": 1.0}, "but `kl_clamp` is set"),
        (
            {"beta": 0.1, "reference": "quantized", "reference_compensation": "lowrank"},
            "Use one of: none, rounding, mixed, low_rank.",
        ),
        (
            {"beta": 0.1, "reference": "quantized", "reference_embedding_quantization": "nf4"},
            "Use one of: int8.",
        ),
        (
            {"beta": 0.1, "reference": "quantized", "reference_on_disk": True},
            "`reference` is 'quantized', but `reference_on_disk` is set. Set `reference: streamed`",
        ),
        (
            {"beta": 0.1, "reference": "streamed", "reference_rank": 8},
            "`reference` is 'streamed', but `reference_rank` is set. Set `reference: quantized`",
        ),
        (
            {"beta": 0.1, "reference": "quantized", "reference_rank": 8, "reference_bits": 5.0},
            "each says how large the low-rank factors are",
        ),
        ({"reference_quantization": "nf4"}, "`beta` is 0"),
        ({"kl_clamp": 10.0}, "`beta` is 0, so there is no KL penalty"),
        ({"beta": 0.1, "reference_quantization": "nf4"}, "`reference` is 'auto', but"),
        (
            {"beta": 0.1, "reference": "quantized", "reference_block_size": 0},
            "`reference_block_size` is 0",
        ),
        (
            {"beta": 0.1, "reference": "quantized", "reference_keep_modules": "down_proj"},
            "Write [down_proj].",
        ),
        ({"advantage_baseline": "leave_one_out", "extensions": False}, "`extensions` is false"),
        ({"beta": 0.1, "reference": "quantized", "sync_ref_model": True}, "`sync_ref_model`"),
        ({"beta": 0.1, "reference": "resident", "extensions": False}, "`extensions` is false"),
        (
            {"beta": 0.1, "reference_rank": 8, "extensions": False},
            "`extensions` is false, but `reference_rank` is set",
        ),
    ],
)
def test_config_refuses_what_cannot_work(settings: dict[str, Any], message: str) -> None:
    assert message in "\n".join(problems(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_sampler": "fast"}, "`group_sampler` is 'fast', which is not known."),
        ({"group_sampler": "vllm"}, "`use_vllm` is false, so there is no vLLM to sample with"),
        (
            {"use_vllm": True, "group_sampler": "shared_prefill"},
            "Set `group_sampler: vllm` (or auto)",
        ),
        (
            {"group_sampler": "shared_prefill", "generation_kwargs": {"num_beams": 2}},
            "`group_sampler: shared_prefill` does not honour `num_beams` in `generation_kwargs`",
        ),
        ({"generation_kwargs": {"num_beam": 2}}, "`num_beam`, which `generate` does not know"),
        ({"max_live_tokens": 0}, "`max_live_tokens` is 0; use at least"),
        (
            {"max_live_tokens": 99, "group_sampler": "transformers"},
            "'transformers', which does not read it",
        ),
        ({"max_completion_length": 0}, "completions would have no token to learn from"),
        ({"temperature": 0.0}, "but the loss divides by it. Set it above 0"),
        (
            {"shared_prefix": False},
            "Use one of: auto, always, never. (YAML reads off and no as false.)",
        ),
        ({"old_logprobs": "cached"}, "Use one of: sampler, recompute."),
    ],
)
def test_config_refuses_a_sampler_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    assert message in "\n".join(problems(**settings))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_config_says_that_vllm_is_not_installed() -> None:
    assert "pip install 'trl[vllm]'" in "\n".join(problems(use_vllm=True))


def test_config_knows_every_loss_type_of_trl() -> None:
    text = GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    for loss_type in LOSS_TYPE_REDUCTIONS:
        assert f"'{loss_type}'" in text
        assert ExtGRPOConfig(**BASE, loss_type=loss_type).loss_type == loss_type


def test_config_still_takes_the_booleans_of_older_trl() -> None:
    assert ExtGRPOConfig(**BASE, scale_rewards=True).scale_rewards == "group"
    assert ExtGRPOConfig(**BASE, scale_rewards=False).scale_rewards == "none"


def test_config_passes_on_what_trl_refuses() -> None:
    assert "auto_find_batch_size" in "\n".join(problems(auto_find_batch_size=True))


def test_config_parses_with_trl_parser(tmp_path: Path) -> None:
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        "output_dir: out\nuse_cpu: true\nbf16: false\nreport_to: none\nbeta: 0.1\n"
        "reference: quantized\nreference_keep_modules: [down_proj]\nkl_clamp: 10\n"
    )
    (config,) = TrlParser(ExtGRPOConfig).parse_args_and_config(["--config", str(yaml)])
    assert config.reference == "quantized"
    assert config.reference_keep_modules == ["down_proj"]
    assert config.kl_clamp == 10


@pytest.mark.parametrize(
    "settings",
    [
        {"reference": "none"},
        {"beta": 0.1, "reference": "adapter"},
        {"beta": 0.1, "reference": "streamed", "reference_on_disk": True, "sync_ref_model": True},
        {
            "beta": 0.1,
            "reference": "quantized",
            "sync_ref_model": True,
            "ref_model_mixup_alpha": 1.0,
            "reference_quantization": "int8",
            "reference_compensation": "low_rank",
            "reference_rank": 4,
            "reference_distillation_steps": 10,
        },
    ],
)
def test_config_takes_every_kind_of_reference(settings: dict[str, Any]) -> None:
    assert ExtGRPOConfig(**BASE | settings).reference == settings["reference"]


def test_options_of_a_plain_trl_config_are_the_defaults() -> None:
    assert ExtensionOptions.of(GRPOConfig(**BASE)) == ExtensionOptions()


def test_reference_pages_are_those_of_the_classes() -> None:
    docs = Path(__file__).parents[1] / "docs"
    pages = runpy.run_path(str(docs / "config_reference.py"))["pages"]()
    assert set(pages) == {path.name for path in (docs / "reference").glob("*.md")}
    for name, text in pages.items():
        assert (docs / "reference" / name).read_text() == text
