"""The reference of a training run: of each kind, chosen, resumed, and moved."""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from runs import series, settings, train
from runs import vowels as vowels_of
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl.trainer.callbacks import SyncRefModelCallback

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext._trl import own_reference
from trl_grpo_ext.errors import ConfigurationError, ReferenceModelError
from trl_grpo_ext.reference import QuantizedLinear, choice, streamed_layers, summarize_reference
from trl_grpo_ext.reference.sampling import CalibrationSampler

PROMPTS = Dataset.from_dict({"prompt": [f"{a} + {a} =" for a in range(8)]})
CHATS = Dataset.from_dict(
    {"prompt": [[{"role": "user", "content": f"{a} + {a}"}] for a in range(8)]}
)
LONG = Dataset.from_dict({"prompt": [f"{a} + {a} = " * 8 for a in range(8)]})
FLOOR = [
    "reference/kl_floor",
    "reference/kl_floor_k1",
    "reference/kl_floor_full",
    "reference/top_token_agreement",
    "reference/gradient_cosine",
]
QUICK = {"reference": "quantized", "reference_rank": 4, "reference_calibration_tokens": 400}
MIXED = {"reference": "quantized", "reference_bits": 15.0, "reference_calibration_tokens": 400}


def vowels(*, completions: list[Any], **_: Any) -> list[float]:
    """The reward of plain texts, also for conversations."""
    return vowels_of(
        completions=[c if isinstance(c, str) else c[0]["content"] for c in completions]
    )


def ext_trainer(model: Any, tmp_path: Path, *, data: Any = PROMPTS, **changes: Any) -> Any:
    given = {name: changes.pop(name) for name in ("processing_class",) if name in changes}
    return ExtGRPOTrainer(
        model=str(model) if isinstance(model, Path) else model,
        reward_funcs=vowels,
        args=ExtGRPOConfig(**settings(tmp_path, **changes)),
        train_dataset=data,
        **given,
    )


def tensors(reference: Any) -> dict[str, torch.Tensor]:
    """All that a reference computes with, by name."""
    held = dict(itertools.chain(reference.named_parameters(), reference.named_buffers()))
    for layer in streamed_layers(reference):
        host = itertools.chain(layer.host.named_parameters(), layer.host.named_buffers())
        held |= {layer.prefix + name: tensor for name, tensor in host}
    return {name: tensor.detach().clone() for name, tensor in held.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def deep_llama(tokenizer: Any, *, num_layers: int = 4) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).float()


def mixture(tokenizer: Any) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).float()


# Quantized ------------------------------------------------------------------------------------


def test_a_quantized_reference_is_calibrated_and_its_floor_logged_once(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    floors = {}
    for compensation in ("none", "low_rank", "mixed"):
        changes = {"reference": "quantized", "reference_compensation": compensation}
        trainer = ext_trainer(tiny_model_dir, tmp_path, **changes)
        history, _ = train(trainer)
        assert trainer.reference_kind == "quantized"
        assert {name: len(series(history, name)) for name in FLOOR} == dict.fromkeys(FLOOR, 1)
        assert "reference/kl_floor" in history[0]
        cosine = series(history, "reference/gradient_cosine")[0]
        (floors[compensation],) = series(history, "reference/kl_floor")
        # On-policy, the first step's KL is the floor, on other completions.
        assert series(history, "kl")[0] == pytest.approx(floors[compensation], rel=1.0, abs=1e-5)
    assert max(floors["low_rank"], floors["mixed"]) < floors["none"] / 20
    assert cosine > 0.9


def test_a_floor_that_is_too_high_is_a_warning_with_what_to_change(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for compensation, warned in (("none", True), ("low_rank", False), ("mixed", False)):
        caplog.clear()
        changes = {"reference": "quantized", "reference_compensation": compensation}
        ext_trainer(tiny_model_dir, tmp_path, **changes)
        assert ("pulls towards rounding errors" in caplog.text) == warned


@pytest.mark.parametrize(
    "changes",
    [
        {"reference_quantization": "int8"},
        {"reference_quantization": "fp4", "reference_block_size": 128},
        {"reference_embedding_quantization": "int8"},
        {"reference_rank": 4, "reference_distillation_steps": 3},
        {"reference_bits": 7.0, "reference_double_quantization": False},
        MIXED,
        {"model_init_kwargs": {"dtype": "bfloat16"}, "reference_rank": 4},
        {"bf16": True, "reference_rank": 4},
    ],
    ids=["int8", "fp4", "embeddings", "distilled", "few bits", "bits", "bfloat16", "autocast"],
)
def test_a_run_trains_against_each_form_of_it(
    tiny_model_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = {"reference": "quantized", "reference_calibration_tokens": 400, **changes}
    trainer = ext_trainer(tiny_model_dir, tmp_path, max_steps=2, **changes)
    history, _ = train(trainer)
    assert all(math.isfinite(value) for value in series(history, "kl"))
    assert 0 < series(history, "reference/kl_floor_full")[0] < 0.2  # k3 may round to 0 here
    layer = trainer.ref_model.model.layers[0].mlp.up_proj
    assert layer.has_low_rank == ("reference_rank" in changes)
    if "reference_bits" in changes:
        bits = summarize_reference(trainer.ref_model).bits_per_weight
        assert bits <= changes["reference_bits"]


def test_a_mixture_of_experts_has_a_calibrated_reference(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    policy = mixture(tiny_tokenizer)
    trainer = ext_trainer(policy, tmp_path, processing_class=tiny_tokenizer, max_steps=1, **QUICK)
    experts = trainer.ref_model.model.layers[0].mlp.experts
    layers = [module for module in experts.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 8
    assert all(layer.has_low_rank for layer in layers)
    history, _ = train(trainer)
    assert 0 < series(history, "reference/kl_floor")[0] < 0.2


@pytest.mark.parametrize(
    "data",
    [CHATS, PROMPTS.to_iterable_dataset(), CHATS.to_iterable_dataset()],
    ids=["chats", "stream", "chats-stream"],
)
def test_prompts_of_all_forms_calibrate(tiny_model_dir: Path, tmp_path: Path, data: Any) -> None:
    trainer = ext_trainer(tiny_model_dir, tmp_path, data=data, max_steps=1, **QUICK)
    history, _ = train(trainer)
    assert 0 < series(history, "reference/kl_floor")[0] < 0.2


def test_a_stream_is_not_used_up_by_calibration(tiny_model_dir: Path, tmp_path: Path) -> None:
    completions = []
    for changes in (QUICK, {"reference": "resident"}):
        stream = PROMPTS.to_iterable_dataset()
        trainer = ext_trainer(tiny_model_dir, tmp_path, data=stream, max_steps=2, **changes)
        train(trainer)
        completions.append(list(trainer._logs["prompt"]))
    assert completions[0] == completions[1]


def test_without_prompts_the_run_stops_as_in_trl(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        ext_trainer(tiny_model_dir, tmp_path, data=None, **QUICK)


def test_a_rank_larger_than_a_layer_stops_the_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ReferenceModelError, match="Set `reference_rank` to at most 16"):
        ext_trainer(tiny_model_dir, tmp_path, reference="quantized", reference_rank=17)


def test_calibration_leaves_the_random_state_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = ext_trainer(tiny_model_dir, tmp_path, reference_distillation_steps=2, **QUICK)
    state = torch.get_rng_state()
    trainer.make_reference(trainer.model)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("sampler", ["transformers", "shared_prefill"])
def test_calibration_changes_no_completion(
    sampler: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    found = []
    for changes in (QUICK, {"reference": "quantized", "reference_compensation": "none"}):
        trainer = ext_trainer(
            tiny_model_dir, tmp_path, group_sampler=sampler, max_steps=1, **changes
        )
        train(trainer)
        found.append(list(trainer._logs["completion"]))
    assert found[0] == found[1]


# Streamed -------------------------------------------------------------------------------------

IN_STEP = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "beta": 0.5,
    "max_steps": 3,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared_prefix": "never"},
        {"data": LONG, "gradient_accumulation_steps": 2, "verify_shared_prefix": False},
        {"reference_on_disk": True},
        {"gradient_checkpointing": True},
        {"group_sampler": "transformers", "onednn_linear": False, "kl_clamp": 10.0},
    ],
    ids=["shared", "never", "long prompts", "on disk", "checkpointing", "clamp"],
)
def test_a_streamed_reference_gives_the_run_of_a_resident_one_bit_for_bit(
    tiny_tokenizer: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    runs = []
    for kind in ("resident", "streamed"):
        policy = deep_llama(tiny_tokenizer)
        given = IN_STEP | changes
        if kind == "resident":
            given.pop("reference_on_disk", None)
        trainer = ext_trainer(
            policy, tmp_path, reference=kind, processing_class=tiny_tokenizer, **given
        )
        runs.append(train(trainer))
    for key in ("kl", "loss", "grad_norm"):
        assert series(runs[0][0], key) == series(runs[1][0], key)
    assert series(runs[0][0], "kl")[-1] > 1e-4
    assert same(runs[0][1], runs[1][1])
    layers = streamed_layers(trainer.ref_model)
    assert len(layers) == 4
    # 4 layers a generation batch of 4 micro-batches, and the first one fetched ahead. The first
    # batch is compared with padded rows, micro-batch after micro-batch, before it shares prompts.
    assert layers[0].stream.num_copies <= 3 * 4 + 1 + (
        5 * 4 if "shared_prefix" not in changes else 0
    )


def test_micro_batches_share_each_copy_of_a_layer(tiny_tokenizer: Any, tmp_path: Path) -> None:
    policy = deep_llama(tiny_tokenizer, num_layers=5)
    trainer = ext_trainer(
        policy,
        tmp_path,
        reference="streamed",
        processing_class=tiny_tokenizer,
        verify_shared_prefix=False,
        **IN_STEP,
    )
    train(trainer)
    stream = streamed_layers(trainer.ref_model)[0].stream
    assert stream.num_copies == 3 * 5 + 1  # not 4 micro-batches times that


def test_a_reference_on_disk_has_a_folder_also_where_nothing_else_is_saved(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    changes = {"reference": "streamed", "reference_on_disk": True}
    trainer = ext_trainer(tiny_model_dir, tmp_path, **changes)
    (link,) = (tmp_path / "out" / "reference").glob("*/initial-*.safetensors")
    assert link.samefile(tiny_model_dir / "model.safetensors")
    assert trainer.reference_keeper.settings.on_disk


# Chosen ---------------------------------------------------------------------------------------


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says about the kind of the reference."""
    texts = [record.getMessage() for record in caplog.records]
    return [text for text in texts if text.startswith("reference: ") and "(" in text]


def test_auto_takes_trls_own_where_memory_is_plenty_and_says_so_once(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trl_grpo_ext")
    trainer = ext_trainer(tiny_model_dir, tmp_path)
    assert trainer.reference_kind == "resident"
    assert trainer.reference_keeper is None
    assert told(caplog) == [f"reference: resident ({trainer.reference_reason})"]
    assert "fits into" in trainer.reference_reason


def test_auto_takes_four_bits_where_memory_is_short(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(available=200_000)  # the policy takes 120 kB, training it more
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    trainer = ext_trainer(tiny_model_dir, tmp_path)
    assert trainer.reference_kind == "quantized"
    assert "does not fit" in trainer.reference_reason
    assert isinstance(trainer.ref_model.model.layers[0].mlp.up_proj, QuantizedLinear)


@pytest.mark.parametrize("on_disk", [None, True, False])
def test_auto_reads_from_disk_before_it_takes_four_bits(
    on_disk: bool | None, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deeper = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model_dir, num_hidden_layers=6))
    folder = shutil.copytree(tiny_model_dir, tmp_path / "deeper")
    deeper.save_pretrained(folder)
    memory = SimpleNamespace(available=4 * deeper.num_parameters() - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(choice, "estimate_run", lambda *_: SimpleNamespace(parts={}))
    trainer = ext_trainer(folder, tmp_path, reference_on_disk=on_disk, **SAVING)
    if on_disk is False:
        assert trainer.reference_kind == "quantized"
        return
    assert trainer.reference_kind == "streamed"
    assert "its layers are read from disk" in trainer.reference_reason
    assert trainer.reference_keeper.settings.on_disk
    history, _ = train(trainer)
    assert series(history, "kl")[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["streamed", "quantized", "resident"])
def test_auto_stays_what_it_was_where_a_run_may_be_resumed(
    kind: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = choice.ReferenceChoice(kind, "chosen")  # type: ignore[arg-type]
    monkeypatch.setattr(own_reference, "choose_kind", lambda *_, **__: chosen)
    whole = ext_trainer(tiny_model_dir, tmp_path, **SAVING)
    history, weights = train(whole)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    later = choice.ReferenceChoice("resident" if kind != "resident" else "streamed", "now")
    monkeypatch.setattr(own_reference, "choose_kind", lambda *_, **__: later)
    for model in (tiny_model_dir, checkpoint):
        resumed = ext_trainer(model, tmp_path, **SAVING)
        assert resumed.reference_kind == kind
        assert resumed.reference_reason.startswith(f"as for {checkpoint}; an empty")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert series(resumed.state.log_history, "kl") == series(history, "kl")
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    other = ext_trainer(shutil.copytree(tiny_model_dir, tmp_path / "other"), tmp_path, **SAVING)
    assert other.reference_kind == later.kind


def test_auto_stays_streamed_wherever_its_layers_lie(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_disk = {"reference": "streamed", "reference_on_disk": True}
    history, _ = train(ext_trainer(tiny_model_dir, tmp_path, **SAVING | on_disk))
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    monkeypatch.chdir(tiny_model_dir.parent)
    for model in (tiny_model_dir.name, f"{tiny_model_dir}/"):
        resumed = ext_trainer(model, tmp_path, **SAVING)
        assert resumed.reference_kind == "streamed"
        assert resumed.reference_keeper.settings.on_disk
    resumed = ext_trainer(tiny_model_dir, tmp_path, **SAVING, reference_on_disk=False)
    assert resumed.reference_kind == "streamed"
    assert not resumed.reference_keeper.settings.on_disk
    resumed.train(resume_from_checkpoint=True)
    assert series(resumed.state.log_history, "kl") == series(history, "kl")


def test_files_of_another_type_are_not_read_layer_by_layer(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    changes = SAVING | {"reference": "streamed", "reference_on_disk": True}
    train(ext_trainer(tiny_model_dir, tmp_path, **changes))
    changes |= {"model_init_kwargs": {"dtype": "bfloat16"}, "max_steps": 5}
    with pytest.raises(ReferenceModelError, match=r"in torch\.float32, .* in torch\.bfloat16"):
        ext_trainer(tiny_model_dir, tmp_path, **changes).train(resume_from_checkpoint=True)
    resumed = ext_trainer(tiny_model_dir, tmp_path, **changes | {"reference_on_disk": False})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5


def test_stages_of_deepspeed_are_counted_as_they_are(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    trainer = ExtGRPOTrainer(
        str(tiny_model_dir), [reward], ExtGRPOConfig(**settings(tmp_path)), PROMPTS
    )
    planned = trainer._run_settings(trainer.model)
    assert (planned.sharding, planned.reward_parameters) == ("none", reward.num_parameters())
    for stage in (1, 2, 3):
        plugin = SimpleNamespace(zero_stage=stage)
        monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
        assert trainer._run_settings(trainer.model).sharding == f"zero{stage}"


def test_auto_does_not_come_to_four_bits_that_would_move_a_part_of_the_way(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(available=200_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(ConfigurationError, match=r"`ref_model_mixup_alpha: 1\.0`"):
        ext_trainer(tiny_model_dir, tmp_path, sync_ref_model=True)


@pytest.mark.parametrize("kind", ["streamed", "quantized"])
@pytest.mark.parametrize(("version", "refused"), [(1, True), (2, False)])
def test_fsdp1_cannot_move_a_whole_reference(
    version: int,
    refused: bool,
    kind: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = KINDS[kind] | SYNC | {"ref_model_mixup_alpha": 1.0}
    trainer = ext_trainer(tiny_model_dir, tmp_path, **changes)
    trainer.is_fsdp_enabled = True
    plugin = SimpleNamespace(fsdp_version=version)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    if refused:
        with pytest.raises(ConfigurationError, match="FSDP1 flattens the policy's weights"):
            trainer.make_reference(trainer.model)
    else:
        assert trainer.make_reference(trainer.model) is not None


@pytest.mark.parametrize("asked", ["auto", "adapter"])
def test_an_adapter_is_its_own_reference(
    asked: str, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trl_grpo_ext")
    trainer = ExtGRPOTrainer(
        str(tiny_model_dir),
        vowels,
        ExtGRPOConfig(**settings(tmp_path, reference=asked, beta=0.5)),
        PROMPTS,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
    )
    assert trainer.ref_model is None
    assert trainer.reference_kind == "adapter"
    assert told(caplog) == [f"reference: adapter ({trainer.reference_reason})"]
    history, _ = train(trainer)
    assert series(history, "kl")[0] == pytest.approx(0.0, abs=1e-6)
    assert series(history, "kl")[-1] > 0


@pytest.mark.parametrize("asked", ["auto", "none"])
def test_without_a_penalty_there_is_no_reference(
    asked: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = ext_trainer(tiny_model_dir, tmp_path, reference=asked, beta=0.0)
    assert (trainer.reference_kind, trainer.reference_reason) == ("none", "`beta` is 0")
    assert trainer.ref_model is None


def test_without_extensions_the_reference_is_trls_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = ext_trainer(tiny_model_dir, tmp_path, extensions=False)
    assert trainer.reference_kind == "resident"
    assert "TRL's own" in trainer.reference_reason
    assert trainer.reference_keeper is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "adapter"}, "the policy has none to switch off. Pass a `peft_config`"),
        ({"reference": "none"}, "`reference` is 'none', but `beta` is 0.04"),
        (
            {"reference": "quantized", "sync_ref_model": True},
            "cannot be moved a part of the way towards the policy",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_loads(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ext_trainer("a-model-that-must-not-be-loaded", tmp_path, **changes)


# Resumed --------------------------------------------------------------------------------------

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "beta": 0.5}
KINDS: dict[str, dict[str, Any]] = {
    "resident": {"reference": "resident"},
    "streamed": {"reference": "streamed"},
    "on disk": {"reference": "streamed", "reference_on_disk": True},
    "quantized": QUICK,
    "mixed": MIXED,
}


def notes(tmp_path: Path) -> dict[str, str]:
    files = (tmp_path / "out").glob("checkpoint-*/reference.json")
    return {path.parent.name: json.loads(path.read_text())["reference"] for path in files}


def saved(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "out" / "reference").iterdir()}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("start", ["initial model", "checkpoint"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    kind: str, start: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    changes = SAVING | KINDS[kind]
    whole = ext_trainer(tiny_model_dir, tmp_path, **changes)
    history, weights = train(whole)
    (key,) = set(notes(tmp_path).values())
    assert set(notes(tmp_path)) == {"checkpoint-2", "checkpoint-4"}
    assert saved(tmp_path) == {key}
    checkpoint = tmp_path / "out" / "checkpoint-2"
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")

    resumed = ext_trainer(
        tiny_model_dir if start == "initial model" else checkpoint, tmp_path, **changes
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(tensors(resumed.ref_model), tensors(whole.ref_model))
    log = resumed.state.log_history
    assert series(log, "kl") == series(history, "kl")
    assert series(log, "loss") == series(history, "loss")
    assert same(resumed.model.state_dict(), weights)
    assert notes(tmp_path) == {"checkpoint-2": key, "checkpoint-4": key}
    for name in FLOOR if kind in ("quantized", "mixed") else []:
        assert series(log, name) == series(history, name)


def test_a_resume_by_true_finds_the_last_checkpoint(tiny_model_dir: Path, tmp_path: Path) -> None:
    changes = SAVING | QUICK
    whole = ext_trainer(tiny_model_dir, tmp_path, **changes)
    train(whole)
    checkpoint = tmp_path / "out" / "checkpoint-4"
    resumed = ext_trainer(checkpoint, tmp_path, **changes | {"max_steps": 5})
    resumed.train(resume_from_checkpoint=True)
    assert same(tensors(resumed.ref_model), tensors(whole.ref_model))
    assert resumed.state.global_step == 5


def test_a_resume_with_the_initial_model_samples_nothing(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = SAVING | QUICK
    train(ext_trainer(tiny_model_dir, tmp_path, **changes))

    def samples(*_: Any) -> Any:
        raise AssertionError("it samples")

    monkeypatch.setattr(CalibrationSampler, "__call__", samples)
    trainer = ext_trainer(tiny_model_dir, tmp_path, **changes)
    assert trainer.reference_keeper.fidelity is not None
    for other in ({"reference_rank": 3}, {"seed": 8}, {"temperature": 0.5}):
        with pytest.raises(AssertionError, match="it samples"):
            ext_trainer(tiny_model_dir, tmp_path, **changes | other)


def test_auto_copies_a_model_that_has_no_path(tiny_model_dir: Path, tmp_path: Path) -> None:
    policy = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model_dir))
    policy.config.name_or_path = policy.name_or_path = ""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    trainer = ext_trainer(policy, tmp_path, processing_class=tokenizer)
    assert trainer.reference_keeper.settings.kind == "resident"
    assert series(train(trainer)[0], "kl")[0] == 0.0


def test_a_resume_with_other_settings_of_the_reference_stops(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(ext_trainer(tiny_model_dir, tmp_path, **SAVING | QUICK))
    assert "another reference" not in caplog.text
    checkpoint = tmp_path / "out" / "checkpoint-2"
    other = ext_trainer(tiny_model_dir, tmp_path, **SAVING | QUICK | {"reference_rank": 3})
    assert "If you resume: " in caplog.text
    assert "another reference (rank: 4, here 3)" in caplog.text
    with pytest.raises(ReferenceModelError, match=r"another reference \(rank: 4, here 3\)"):
        other.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("asked", ["last-good", "checkpoint-2"])
def test_a_resume_that_is_asked_for_stops_before_anything_is_sampled(
    asked: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(ext_trainer(tiny_model_dir, tmp_path, **SAVING | QUICK))
    monkeypatch.delattr(CalibrationSampler, "__call__")
    asked = str(tmp_path / "out" / asked) if asked != "last-good" else asked
    changes = SAVING | QUICK | {"reference_rank": 3, "resume_from_checkpoint": asked}
    with pytest.raises(ReferenceModelError, match=r"another reference \(rank: 4, here 3\)"):
        ext_trainer(tiny_model_dir, tmp_path, **changes)


def test_checkpoints_that_are_rotated_away_take_their_reference_with_them(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    changes = SAVING | {"save_steps": 1, "save_total_limit": 1, "max_steps": 3}
    changes |= {"reference": "resident", "sync_ref_model": True, "ref_model_sync_steps": 1}
    train(ext_trainer(tiny_model_dir, tmp_path, **changes))
    (key,) = notes(tmp_path).values()
    assert saved(tmp_path) == {key}
    assert list(notes(tmp_path)) == ["checkpoint-3"]


# Moved ----------------------------------------------------------------------------------------

SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 5, "beta": 0.5}


@pytest.mark.parametrize("kind", ["resident", "streamed", "on disk"])
def test_an_exact_reference_moves_as_trls_does_bit_for_bit(
    kind: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = SYNC | {"ref_model_mixup_alpha": 0.6}
    trainer = ext_trainer(tiny_model_dir, tmp_path, **changes | KINDS[kind])
    callbacks = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert SyncRefModelCallback.__name__ not in callbacks
    assert callbacks.count("ReferenceCallback") == 1
    ours = train(trainer)
    monkeypatch.setattr(ExtGRPOTrainer, "_copies", lambda *_: False)
    plain = ext_trainer(tiny_model_dir, tmp_path, **changes)
    assert plain.reference_keeper is None  # TRL's own reference, and its callback
    theirs = train(plain)
    still = train(ext_trainer(tiny_model_dir, tmp_path, **changes | {"sync_ref_model": False}))
    for key in ("kl", "loss", "grad_norm"):
        assert series(ours[0], key) == series(theirs[0], key)
    assert series(theirs[0], "kl") != series(still[0], "kl")
    assert same(ours[1], theirs[1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_quantized_reference_that_moves_is_built_from_the_policy_of_that_step(
    checkpointing: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    changes = SYNC | QUICK | {"ref_model_mixup_alpha": 1.0, "gradient_checkpointing": checkpointing}
    saving = {"save_strategy": "steps", "save_steps": 4}
    trainer = ext_trainer(tiny_model_dir, tmp_path, **changes | saving)
    history, _ = train(trainer)
    assert [len(series(history, name)) for name in FLOOR] == [3] * 5  # start, steps 2 and 4
    assert len(set(series(history, "reference/kl_floor"))) == 3
    fresh = ext_trainer(tmp_path / "out" / "checkpoint-4", tmp_path / "other", **changes)
    assert same(tensors(trainer.ref_model), tensors(fresh.ref_model))
    assert set(notes(tmp_path).values()) == {trainer.reference_keeper.key}


@pytest.mark.parametrize("kind", [*KINDS, "auto"])
def test_a_run_resumed_after_a_move_has_the_moved_reference(
    kind: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    alpha = 1.0 if kind in ("quantized", "mixed") else 0.6
    changes = SYNC | {"ref_model_mixup_alpha": alpha, "save_strategy": "steps", "save_steps": 3}
    changes |= KINDS.get(kind, {})
    whole = ext_trainer(tiny_model_dir, tmp_path, **changes)
    history, _ = train(whole)
    resumed = ext_trainer(tiny_model_dir, tmp_path, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert series(resumed.state.log_history, "kl") == series(history, "kl")
    assert same(tensors(resumed.ref_model), tensors(whole.ref_model))


@pytest.mark.parametrize(("steps", "told"), [(2, True), (4, False)])
def test_a_resume_without_the_moved_reference_says_so(
    steps: int,
    told: bool,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(ExtGRPOTrainer, "_copies", lambda *_: False)  # as where it cannot be saved
    changes = SYNC | {"ref_model_sync_steps": steps, "save_strategy": "steps", "save_steps": 3}
    train(ext_trainer(tiny_model_dir, tmp_path, **changes))
    resumed = ext_trainer(tiny_model_dir, tmp_path, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert ("had moved the reference by this step" in caplog.text) is told


def test_moving_a_quantized_reference_leaves_the_random_state_alone(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    trainer = ext_trainer(tiny_model_dir, tmp_path, **QUICK)
    state = torch.get_rng_state()
    trainer.move_reference(trainer.reference_keeper)
    assert torch.equal(state, torch.get_rng_state())
