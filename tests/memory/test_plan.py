"""Plans: the comparison, the search, what is printed and what is drawn."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from rich.console import Console
from trl import ModelConfig

from trl_grpo_ext.config import ExtGRPOConfig
from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.memory import ReferenceFormat, RunSettings, estimate_run
from trl_grpo_ext.memory.plan import make_plan
from trl_grpo_ext.memory.recipe_lines import launch_command, recipe_options, recipe_yaml
from trl_grpo_ext.memory.search import fastest_that_fits, frugal_settings, gpus_that_suffice
from trl_grpo_ext.memory.settings import settings_problems
from trl_grpo_ext.memory.show import print_plan, save_plot
from trl_grpo_ext.recipe import _training_problems

GB = 10**9
ROOT = Path(__file__).parent.parent.parent
ON_8 = RunSettings(num_gpus=8)


def shown(model: str, settings: RunSettings, **memory: Any) -> str:
    text = io.StringIO()
    plan = make_plan(model, settings, **{"gpu_memory_gb": 80, **memory})
    print_plan(plan, Console(file=text, width=140))
    return text.getvalue()


def test_comparison_of_a_70b_model_is_the_well_known_one() -> None:
    setups = make_plan("Llama-3-70B", ON_8, gpu_memory_gb=80).comparison
    parts = [[size / GB for size in setup.parts.values()] for setup in setups]
    assert parts == [
        [140, 140, 140, 140],  # PPO
        [140, 140, 140],  # GRPO needs no value model
        [140, 140],  # and no reward model behind an API
        [140, 35, 140],
        [140, 35],
    ]
    assert [setup.total / GB for setup in setups] == [560, 420, 280, 315, 175]


def test_comparison_prints_sums_of_parts_beside_what_is_stored() -> None:
    text = shown("Llama-3-70B", ON_8)
    for line in (
        "140 + 140 + 140 + 140 = 560",
        "140 + 140 + 140 = 420",
        "140 + 140 = 280",
        "140 + 35 + 140 = 315",
        "140 + 35 = 175",
        "141.1 + 39.5 = 180.6",
    ):
        assert line in text
    assert "GB (1e9 bytes)" in text


def test_frugal_settings_start_with_those_asked_for() -> None:
    asked = replace(ON_8, reference="streamed", gradient_checkpointing=False)
    settings = list(frugal_settings(asked))
    assert settings[0] == asked
    assert len(set(settings)) == len(settings)
    assert {s.reference for s in settings} == {"streamed", "resident", "quantized", "adapter"}
    assert settings[1] == replace(asked, reference="resident")
    assert settings[2] == replace(asked, reference="quantized")
    assert settings[3] == replace(asked, sharding="zero2")
    assert settings[-1].lora_rank > 0
    assert settings[-1].reference == "adapter"


def test_frugal_settings_keep_one_gpu_whole_and_a_run_without_reference_without() -> None:
    settings = list(frugal_settings(RunSettings(reference="none")))
    assert {s.sharding for s in settings} == {"none"}
    assert {s.reference for s in settings} == {"none"}


def test_fastest_that_fits_is_the_first_whose_estimate_does() -> None:
    plan = make_plan("Qwen2.5-7B", ON_8, gpu_memory_gb=80)
    found = fastest_that_fits(plan.shape, ON_8, usable_bytes=plan.usable_bytes)
    assert found is not None
    order = list(frugal_settings(ON_8))
    needs = [estimate_run(plan.shape, settings).total_bytes for settings in order]
    first = next(index for index, need in enumerate(needs) if need <= plan.usable_bytes)
    assert found == order[first]
    assert first > 0


def test_fastest_that_fits_counts_host_memory_for_every_process() -> None:
    asked = replace(ON_8, reference="streamed", sharding="fsdp")
    plan = make_plan("Qwen2.5-7B", asked, gpu_memory_gb=80)
    host = 8 * plan.estimate.host_bytes
    limits: dict[str, Any] = {"usable_bytes": plan.usable_bytes}
    assert fastest_that_fits(plan.shape, asked, host_bytes=host, **limits) == asked
    less = fastest_that_fits(plan.shape, asked, host_bytes=host - 1, **limits)
    assert less == replace(asked, reference="resident")  # exact, and split
    short = make_plan("Qwen2.5-7B", asked, gpu_memory_gb=80, host_memory_gb=(host - 1) / GB)
    assert not short.fits
    assert "of host memory" in short.verdict()
    assert short.verdict().endswith("`reference_on_disk: true` reads the layers from disk instead.")
    paged = replace(asked, optimizer="paged_adamw_8bit")
    states = make_plan("Qwen2.5-7B", replace(paged, reference="none"), gpu_memory_gb=80)
    least = 8 * states.estimate.host_bytes / GB
    short = make_plan("Qwen2.5-7B", paged, gpu_memory_gb=80, host_memory_gb=least * 0.9)
    assert "of host memory" in short.verdict()
    assert "reference_on_disk" not in short.verdict()


def test_verdict_says_by_how_much_it_fits_or_does_not() -> None:
    need = make_plan("Qwen2.5-0.5B", RunSettings(), gpu_memory_gb=80).estimate.total_bytes
    fits = make_plan("Qwen2.5-0.5B", RunSettings(), gpu_memory_gb=need / GB + 2, reserve=0)
    short = make_plan("Qwen2.5-0.5B", RunSettings(), gpu_memory_gb=need / GB - 3, reserve=0)
    assert fits.fits
    assert fits.verdict().endswith("2.0 GB to spare.")
    assert not short.fits
    assert short.verdict().startswith("does not fit by 3.0 GB")


def test_plan_without_a_solution_says_how_many_gpus_would_do() -> None:
    asked = RunSettings(num_gpus=1)
    plan = make_plan("Llama-3-70B", asked, gpu_memory_gb=40)
    assert plan.suggestion is None
    assert plan.enough_gpus is not None
    few, enough = (
        replace(asked, num_gpus=gpus) for gpus in (plan.enough_gpus // 2, plan.enough_gpus)
    )
    assert fastest_that_fits(plan.shape, few, usable_bytes=plan.usable_bytes) is None
    assert fastest_that_fits(plan.shape, enough, usable_bytes=plan.usable_bytes) is not None
    text = shown("Llama-3-70B", asked, gpu_memory_gb=40)
    assert f"{plan.enough_gpus} GPUs like these would do" in text
    assert gpus_that_suffice(plan.shape, asked, usable_bytes=10**6) is None


def test_plan_says_so_when_the_reward_model_is_what_does_not_fit() -> None:
    asked = replace(ON_8, num_gpus=1, reward_parameters=70 * GB)
    text = shown("Llama-3-70B", asked)
    assert "The reward model alone takes 140.0 GB of each GPU: --reward api takes none." in text


def test_zero_3_is_proposed_where_it_alone_splits_the_reward_model() -> None:
    asked = RunSettings(num_gpus=64, reward_parameters=70 * GB)
    found = make_plan("Llama-3-70B", asked, gpu_memory_gb=80).suggestion
    assert found is not None
    assert found.sharding == "zero3"
    assert not found.lora_rank


def test_an_exact_reference_that_is_split_is_found_from_a_quantized_one() -> None:
    asked = RunSettings(num_gpus=32, sharding="fsdp", dtype="bfloat16", reference="quantized")
    plan = make_plan("Llama-3-70B", asked, gpu_memory_gb=80)
    assert plan.suggestion is not None
    assert plan.suggestion.reference == "resident"
    assert not plan.suggestion.lora_rank


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"gpu_memory_gb": math.inf}, "--gpu-memory-gb is inf, which no GPU has"),
        ({"gpu_memory_gb": 80, "host_memory_gb": -5}, "--host-memory-gb is -5"),
    ],
)
def test_memory_that_no_machine_has_is_refused(memory: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_plan("Qwen2.5-7B", RunSettings(), **memory)


def test_print_plan_shows_every_stage_both_log_prob_passes_and_what_to_run() -> None:
    text = shown("Qwen2.5-7B", replace(ON_8, reference="streamed"))
    for expected in (
        "ZeRO-1",
        "ZeRO-2",
        "ZeRO-3",
        "FSDP",
        "Log-prob pass of a micro-batch: padded",
        "with shared prefixes",
        "█",
        "host memory",
        "Verdict: Qwen2.5-7B on 8 x 80.0 GB does not fit by",
        "model_name_or_path: Qwen/Qwen2.5-7B",
        "recipes/accelerate/zero3.yaml --num_processes 8 --zero_stage 2",
        "weights 4 bytes, activations and cache 2",
    ):
        assert expected in text


def test_plan_says_what_a_run_needs_that_computes_no_layer_twice() -> None:
    asked = RunSettings()
    keeping = replace(asked, gradient_checkpointing=False)

    def verdict(settings: RunSettings, gpu_memory_gb: float) -> str:
        return make_plan("Qwen2.5-1.5B", settings, gpu_memory_gb=gpu_memory_gb).verdict()

    need = make_plan("Qwen2.5-1.5B", keeping, gpu_memory_gb=400).estimate.total_bytes
    told = f"With {need / GB:.1f} GB it does without `gradient_checkpointing`"
    assert told in verdict(asked, 400)
    assert told in verdict(asked, need / GB / 0.9 + 0.01)  # a tenth of the GPU is not usable
    assert "without" not in verdict(asked, need / GB / 0.9 - 0.01)
    assert "without" not in verdict(keeping, 400)


def test_to_dict_is_json_with_the_same_numbers() -> None:
    plan = make_plan("Llama-3-8B", ON_8, gpu_memory_gb=80)
    read = json.loads(json.dumps(plan.to_dict()))
    assert read["stages"]["none"]["total"] == plan.estimate.total_bytes
    assert read["fits"] is plan.fits
    assert read["comparison"][0]["total"] == 4 * 2 * 8 * GB
    assert read["suggestion"]["recipe"]["num_generations"] == 8


def test_save_plot_writes_a_picture_with_a_bar_a_stage(tmp_path: Path) -> None:
    save_plot(make_plan("Llama-3-70B", ON_8, gpu_memory_gb=80), tmp_path / "plan.png")
    save_plot(make_plan("Llama-3-70B", ON_8, gpu_memory_gb=80), tmp_path / "plan.svg")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "<!-- suggested -->" in (tmp_path / "plan.svg").read_text()


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ({"gpu_memory_gb": 0}, "--gpu-memory-gb is 0"),
        ({"gpu_memory_gb": 80, "reserve": 1.5}, "--reserve is 1.5"),
    ],
)
def test_make_plan_refuses_memory_that_cannot_be(memory: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigurationError, match=expected):
        make_plan("Llama-3-8B", ON_8, **memory)


def test_auto_plans_the_first_reference_that_fits() -> None:
    asked = RunSettings()
    whole = make_plan("Qwen2.5-1.5B", asked, gpu_memory_gb=80).estimate.total_bytes
    room = {"gpu_memory_gb": (whole - GB) / GB, "reserve": 0.0}
    as_asked = make_plan("Qwen2.5-1.5B", asked, **room)
    assert (as_asked.fits, as_asked.asked.reference) == (False, "resident")
    auto = make_plan("Qwen2.5-1.5B", asked, choose_reference=True, **room)
    assert (auto.fits, auto.asked.reference) == (True, "streamed")
    assert auto.verdict().startswith("fits")
    small = make_plan("Qwen2.5-1.5B", asked, choose_reference=True, host_memory_gb=1, **room)
    assert (small.fits, small.asked.reference) == (True, "quantized")
    none = make_plan("Qwen2.5-1.5B", asked, choose_reference=True, gpu_memory_gb=2)
    assert (none.fits, none.asked.reference) == (False, "resident")


@pytest.mark.parametrize("kind", ["resident", "streamed", "quantized"])
def test_an_adapter_needs_no_other_reference(kind: Any) -> None:
    (found,) = settings_problems(replace(ON_8, lora_rank=8, reference=kind))
    assert f"--reference is {kind}, but with its adapter (--lora) switched off" in found


def test_a_configuration_file_stands_for_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    options = recipe_options(str(tmp_path / "config.json"), ON_8)
    assert options["model_name_or_path"] == str(tmp_path)


OFFERED = [
    ON_8,
    replace(ON_8, reference="none"),
    replace(ON_8, reference="quantized", storage=ReferenceFormat(quantization="fp4")),
    replace(ON_8, reference="quantized", storage=ReferenceFormat(quantization="int8", rank=8)),
    replace(ON_8, reference="streamed", dtype="bfloat16"),
    replace(ON_8, lora_rank=8, reference="adapter"),
    replace(ON_8, optimizer="paged_adamw_8bit", micro_batch=2),
    replace(ON_8, sharding="zero3"),
]


@pytest.mark.parametrize("settings", OFFERED, ids=range(len(OFFERED)))
def test_recipe_lines_are_options_of_the_configuration(settings: RunSettings) -> None:
    options = yaml.safe_load(recipe_yaml("Llama-3-8B", settings))
    assert options == recipe_options("Llama-3-8B", settings)
    of_model = {name: options.pop(name) for name in list(options) if hasattr(ModelConfig, name)}
    config = ModelConfig(**of_model)
    assert config.model_name_or_path == "meta-llama/Meta-Llama-3-8B"
    assert config.lora_r == (settings.lora_rank or ModelConfig.lora_r)
    made = ExtGRPOConfig(
        output_dir="unused", use_cpu=True, report_to=[], **options | {"bf16": False}
    )
    assert made.per_device_train_batch_size == settings.micro_batch
    assert made.gradient_accumulation_steps * settings.micro_batch == settings.generation_batch
    assert made.beta == (0 if settings.reference == "none" else 0.02)
    assert not list(_training_problems(config, made))


def test_recipe_lines_of_a_quantized_reference_name_what_is_not_the_default() -> None:
    storage = ReferenceFormat(
        quantization="int8", block_size=128, double_quantization=False, rank=16, embedding_bits=8
    )
    options = recipe_options("x/y", replace(ON_8, reference="quantized", storage=storage))
    assert {name: value for name, value in options.items() if name.startswith("reference")} == {
        "reference": "quantized",
        "reference_quantization": "int8",
        "reference_block_size": 128,
        "reference_double_quantization": False,
        "reference_compensation": "low_rank",
        "reference_rank": 16,
        "reference_embedding_quantization": "int8",
    }


def test_recipe_lines_of_a_budget_are_those_of_layers_in_8_bits() -> None:
    settings = replace(ON_8, reference="quantized", storage=ReferenceFormat(rank=32, bits=4.6))
    options = recipe_options("x/y", settings)
    assert options["reference_compensation"] == "mixed"
    assert options["reference_bits"] == 4.6
    assert "reference_rank" not in options


@pytest.mark.parametrize(
    ("storage", "told"),
    [
        (ReferenceFormat(bits=4.0), "--reference-bits is 4, but nf4 takes some more"),
        (ReferenceFormat(bits=17.0), "--reference-bits is 17"),
        (ReferenceFormat(bits=5.0, quantization="int8"), "but int8 takes 8.13"),
    ],
)
def test_a_budget_that_no_layer_has_is_refused(storage: ReferenceFormat, told: str) -> None:
    (found,) = settings_problems(replace(ON_8, storage=storage))
    assert told in found


@pytest.mark.parametrize(("kind", "expected"), [("resident", "auto"), ("streamed", "streamed")])
def test_recipe_lines_under_zero_3_gather_no_whole_model_to_generate(
    kind: Any, expected: str
) -> None:
    options = recipe_options("x/y", replace(ON_8, sharding="zero3", reference=kind))
    assert options["reference"] == expected
    assert options["ds3_gather_for_generation"] is False


@pytest.mark.parametrize("sharding", ["none", "zero1", "zero2", "zero3", "fsdp"])
@pytest.mark.parametrize("gpus", [1, 8])
def test_launch_command_is_one_that_accelerate_takes(sharding: Any, gpus: int) -> None:
    command = launch_command(RunSettings(num_gpus=gpus, sharding=sharding))
    arguments = command.split()[2:]
    parsed = launch_command_parser().parse_args([*arguments, "recipes/grpo.py"])
    assert (ROOT / parsed.config_file).is_file()
    if gpus > 1:
        assert parsed.num_processes == 8
        assert parsed.zero_stage == {"zero1": 1, "zero2": 2}.get(sharding)
