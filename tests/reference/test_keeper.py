"""The reference of a run: built, measured, saved, found again, and moved."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_tiny_model, build_tiny_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference import (
    KLPenalty,
    QuantizedLinear,
    build_reference,
    completion_batches,
    summarize_reference,
)
from trl_grpo_ext.reference.fidelity import ReferenceFidelity
from trl_grpo_ext.reference.keeper import ReferenceKeeper
from trl_grpo_ext.reference.mixed import quantized_linears
from trl_grpo_ext.reference.options import ReferenceSettings
from trl_grpo_ext.reference.sampling import CalibrationData
from trl_grpo_ext.reference.store import ReferenceNote, ReferenceStore, noted
from trl_grpo_ext.reference.store import note as write_note

IDS = torch.arange(4, 24).view(2, 10)
QUICK = ReferenceSettings(compensation="low_rank", rank=2)


MIXED = ReferenceSettings(bits=15.0)  # tiny layers take 11 in 4 bits and 21 in 8: tables count


def policy(seed: int = 0) -> Any:
    return build_tiny_model(build_tiny_tokenizer(), seed=seed)


def data(_: Any) -> CalibrationData:
    """Random tokens: what is calibrated here need not be likely."""
    generator = torch.Generator().manual_seed(5)

    def batches(count: int) -> Any:
        ids = torch.randint(4, 90, (count, 24), generator=generator).tolist()
        return completion_batches(
            [row[:8] for row in ids], [row[8:] for row in ids], max_tokens=256
        )

    return CalibrationData(batches(24), batches(8))


def keeper(store: Path | None = None, **changes: Any) -> ReferenceKeeper:
    given: dict[str, Any] = {"settings": QUICK, "sample": data, "penalty": KLPenalty()}
    root = None if store is None else ReferenceStore(store / "reference")
    return ReferenceKeeper(**{**given, "store": root, **changes})


def note(kept: ReferenceKeeper, checkpoint: Path, reference: PreTrainedModel) -> None:
    """What the trainer does with each checkpoint."""
    if kept.is_unsaved:
        kept.save(reference)
    write_note(checkpoint, ReferenceNote(kept.key))


def resume(kept: ReferenceKeeper, checkpoint: Path, reference: PreTrainedModel) -> None:
    """What the trainer does before it goes on from a checkpoint."""
    kept.check_resume(checkpoint, noted(checkpoint))
    kept.resume(checkpoint, noted(checkpoint).key, reference, device=torch.device("cpu"))


def never(_: Any) -> CalibrationData:
    raise AssertionError("sampled")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def floor(settings: ReferenceSettings) -> float:
    kept = keeper(settings=settings)
    kept.build(policy())
    assert kept.fidelity is not None
    return kept.fidelity.kl_k3


# Built ----------------------------------------------------------------------------------------


def test_each_compensation_lowers_the_floor() -> None:
    plain = floor(ReferenceSettings(compensation="none"))
    rounding = floor(ReferenceSettings(compensation="rounding"))
    mixed = floor(MIXED)
    low_rank = floor(replace(QUICK, rank=4))
    assert plain > rounding > low_rank > 0
    assert rounding > mixed > 0
    assert floor(ReferenceSettings(quantization="int8", compensation="rounding")) < plain / 20


def test_distillation_lowers_the_floor_further() -> None:
    distilled = replace(QUICK, distillation_steps=20)
    assert floor(distilled) < floor(QUICK)


def test_the_default_rank_is_32_or_what_a_layer_has() -> None:
    reference = keeper(settings=ReferenceSettings(compensation="low_rank")).build(policy())
    ranks = {len(m.factor_in) for m in reference.modules() if isinstance(m, QuantizedLinear)}
    assert ranks == {16, 32}  # key and value projections have 16 rows


@pytest.mark.parametrize("bits", [6.0, 8.0])
def test_bits_are_a_budget(bits: float) -> None:
    # Without double quantization a layer of 16 x 32 weights takes 5.5 bits a weight: tables count.
    settings = ReferenceSettings(compensation="low_rank", bits=bits, double_quantization=False)
    reference = keeper(settings=settings).build(policy())
    layers = [m for m in reference.modules() if isinstance(m, QuantizedLinear)]
    assert all(8 * layer.num_bytes / layer.num_weights <= bits for layer in layers)
    assert summarize_reference(reference).bits_per_weight <= bits
    # One rank more would be too much for a layer of 64 x 32.
    layer = reference.model.layers[0].mlp.up_proj
    assert layer.has_low_rank
    assert 8 * (layer.num_bytes + 2 * (64 + 32)) / layer.num_weights > bits


def test_a_rank_larger_than_a_layer_is_refused_before_anything_is_sampled() -> None:
    wide = keeper(settings=replace(QUICK, rank=17), sample=never)
    with pytest.raises(ReferenceModelError, match="Set `reference_rank` to at most 16"):
        wide.build(policy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_part_of_the_settings_reaches_the_reference(dtype: torch.dtype) -> None:
    settings = ReferenceSettings(
        quantization="int8",
        block_size=128,
        compensation="low_rank",
        rank=3,
        double_quantization=False,
        embedding_quantization="int8",
        keep_modules=("down_proj",),
    )
    reference = keeper(settings=settings).build(policy().to(dtype))
    layer = reference.model.layers[0].self_attn.q_proj
    assert (layer.quantization, layer.block_size, len(layer.factor_in)) == ("int8", 128, 3)
    assert layer.nested_absmax is None
    assert isinstance(reference.model.layers[0].mlp.down_proj, torch.nn.Linear)
    assert type(reference.get_input_embeddings()).__name__ == "QuantizedEmbedding"
    assert {p.dtype for p in reference.parameters()} == {dtype}
    assert logits(reference).dtype == dtype


def test_building_leaves_the_random_state_and_the_policy_alone() -> None:
    model = policy().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    keeper(settings=replace(QUICK, distillation_steps=2)).build(model)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_floor_above_its_share_of_the_target_is_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = keeper(settings=ReferenceSettings(compensation="none"))
    kept.build(policy())
    assert kept.fidelity is not None
    found = kept.fidelity.kl_k3
    assert [record.getMessage() for record in caplog.records] == [
        f"The reference shows a KL of {found:.2g} nats a token where the truth is 0, above 0.5 of "
        "the KL expected of the run (`reference_kl_target`=0.01), so a part of the penalty pulls "
        "towards rounding errors. Use `reference: streamed` or `resident` (exact), "
        "`reference_quantization: int8`, or more `reference_bits`; or raise `reference_kl_target` "
        "if the run's `kl` will be larger."
    ]


@pytest.mark.parametrize("share", [0.99, 1.01])
def test_the_warning_starts_at_the_share_that_is_set(
    share: float, caplog: pytest.LogCaptureFixture
) -> None:
    # Rounding to nearest depends on nothing but the weights, so the floor is the same again.
    plain = ReferenceSettings(compensation="none")
    found = floor(plain)
    caplog.clear()
    floor(replace(plain, kl_target=2 * found, max_floor=share / 2))
    assert len(caplog.records) == (share < 1)


@pytest.mark.parametrize(("asked", "told"), [(1152, 0), (1153, 1)])
def test_few_tokens_to_calibrate_on_are_told(
    asked: int, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ReferenceSettings(rank=2, calibration_tokens=asked, kl_target=1e6)
    keeper(settings=settings).build(policy())  # 24 completions of 24 tokens: 576, half of 1,152
    assert len(caplog.records) == told
    assert ("calibrated on 576 tokens" in caplog.text) == bool(told)


def test_without_prompts_a_reference_is_rounded_to_nearest_and_not_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):  # built, then loaded
        kept = keeper(tmp_path, sample=None)
        assert torch.equal(logits(kept.build(policy())), logits(build_reference(policy())))
        assert kept.fidelity is None
    (record,) = caplog.records
    assert "rounded to nearest and not measured" in record.getMessage()


def test_a_policy_without_weights_is_refused_also_where_references_are_saved(
    tmp_path: Path,
) -> None:
    with torch.device("meta"):
        model = policy().to("meta")
    with pytest.raises(ReferenceModelError, match="holds no weights"):
        keeper(tmp_path).build(model)


# Found again ----------------------------------------------------------------------------------


def test_a_saved_reference_is_loaded_and_not_built_again(tmp_path: Path) -> None:
    first = keeper(tmp_path)
    reference = first.build(policy())
    second = keeper(tmp_path, sample=never)
    again = second.build(policy())
    assert torch.equal(logits(reference), logits(again))
    assert second.fidelity == first.fidelity
    assert second.key == first.key
    for changes in ({"rank": 3}, {"calibration_tokens": 5}, {"keep_modules": ("q_proj",)}):
        with pytest.raises(AssertionError, match="sampled"):
            keeper(tmp_path, sample=never, settings=replace(QUICK, **changes)).build(policy())
    with pytest.raises(AssertionError, match="sampled"):
        keeper(tmp_path, sample=never).build(policy(seed=1))


def test_a_reference_that_was_half_written_is_built_again(tmp_path: Path) -> None:
    first = keeper(tmp_path)
    first.build(policy())
    assert first.store is not None
    (first.store.folder(first.key) / "manifest.json").unlink()
    calls = []
    keeper(tmp_path, sample=lambda model: calls.append(1) or data(model)).build(policy())
    assert calls == [1]


def test_a_saved_reference_with_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    first = keeper(tmp_path)
    first.build(policy())
    assert first.store is not None
    (first.store.folder(first.key) / "outside-layers.safetensors").write_bytes(b"no weights")
    with pytest.raises(ReferenceModelError, match="is damaged"):
        keeper(tmp_path).build(policy())


KINDS: dict[str, ReferenceSettings] = {
    "resident": ReferenceSettings(kind="resident"),
    "streamed": ReferenceSettings(kind="streamed"),
    "on disk": ReferenceSettings(kind="streamed", on_disk=True),
    "quantized": QUICK,
    "mixed": MIXED,
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_resume_from_the_weights_of_a_checkpoint_has_the_reference_of_the_start(
    kind: str, tmp_path: Path
) -> None:
    first, checkpoint = keeper(tmp_path, settings=KINDS[kind]), tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    reference = first.build(policy())
    note(first, checkpoint, reference)
    for store in (tmp_path, tmp_path / "elsewhere"):
        resumed = keeper(store, settings=KINDS[kind])
        other = resumed.build(policy(seed=1))
        assert not torch.equal(logits(other), logits(reference))
        resume(resumed, checkpoint, other)
        assert torch.equal(logits(other), logits(reference))
        assert resumed.fidelity == first.fidelity
        assert resumed.key == first.key
        note(resumed, checkpoint, other)
        assert torch.equal(logits(other), logits(reference))
        assert resumed.store is not None
        assert resumed.store.manifest(resumed.key) is not None


def test_a_run_that_saves_nothing_resumes_with_the_reference_of_the_start(tmp_path: Path) -> None:
    first, checkpoint = keeper(tmp_path), tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    reference = first.build(policy())
    note(first, checkpoint, reference)
    resumed = keeper()
    other = resumed.build(policy(seed=1))
    resume(resumed, checkpoint, other)
    assert torch.equal(logits(other), logits(reference))
    note(resumed, checkpoint, other)  # nothing to do


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rank": 3}, "(rank: 2, here 3)"),
        (
            {"rank": None, "compensation": "rounding"},
            "(compensation: 'low_rank', here 'rounding', rank: 2, here None)",
        ),
        ({"kind": "streamed"}, "(kind: 'quantized', here 'streamed')"),
        ({"keep_modules": ("q_proj",)}, "(keep_modules: [], here ['q_proj'])"),
    ],
)
def test_a_resume_with_other_settings_says_what_changed(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    first, checkpoint = keeper(tmp_path), tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    note(first, checkpoint, first.build(policy()))
    other = keeper(tmp_path, settings=replace(QUICK, **changes))
    with pytest.raises(ReferenceModelError) as error:
        resume(other, checkpoint, other.build(policy()))
    assert str(error.value) == (
        f"{checkpoint} was written by a run with another reference {named}, so its KL would jump. "
        "Set the `reference` options to what they were, or start anew from the checkpoint's "
        "weights."
    )


def test_a_resume_that_measures_otherwise_is_the_same_run(tmp_path: Path) -> None:
    first, checkpoint = keeper(tmp_path), tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    note(first, checkpoint, first.build(policy()))
    reference = first.build(policy())
    changes = {"settings": replace(QUICK, kl_target=0.05), "penalty": KLPenalty("k1")}
    other = keeper(tmp_path, **changes)
    found = other.build(policy())
    assert torch.equal(logits(found), logits(reference))  # not calibrated again, but measured
    assert other.fidelity is not None
    assert other.fidelity.kl_target == 0.05
    fresh = keeper(**changes)
    fresh.build(policy())
    assert other.fidelity == fresh.fidelity
    resume(other, checkpoint, found)
    assert other.key == first.key
    again = keeper(tmp_path, **changes, sample=never)
    again.build(policy())
    assert again.fidelity == other.fidelity


def test_other_prompts_make_another_reference(tmp_path: Path) -> None:
    first, other = keeper(tmp_path, drawn_from="a"), keeper(tmp_path, drawn_from="b")
    first.build(policy())
    other.build(policy())
    assert first.key != other.key
    again = keeper(tmp_path, drawn_from="a", sample=never)
    again.build(policy())
    assert again.key == first.key


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_a_mixed_reference_that_is_loaded_is_the_one_that_was_saved(
    quantization: Any, tmp_path: Path
) -> None:
    settings = replace(MIXED, quantization=quantization)
    first = keeper(tmp_path, settings=settings)
    reference = first.build(policy())
    narrow = {layer.quantization for layer in quantized_linears(reference).values()}
    assert narrow == {quantization, "int8"}
    again = keeper(tmp_path, settings=settings, sample=never)
    assert torch.equal(logits(again.build(policy())), logits(reference))


def test_a_resume_whose_reference_is_gone_is_an_error(tmp_path: Path) -> None:
    first, checkpoint = keeper(tmp_path), tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    note(first, checkpoint, first.build(policy()))
    (tmp_path / "reference").rename(tmp_path / "moved away")
    other = keeper(tmp_path)
    with pytest.raises(ReferenceModelError, match="There is no reference in"):
        resume(other, checkpoint, other.build(policy(seed=1)))


def test_a_checkpoint_without_a_note_changes_nothing(tmp_path: Path) -> None:
    kept = keeper(tmp_path)
    reference = kept.build(policy())
    before = logits(reference)
    resume(kept, tmp_path, reference)
    assert torch.equal(before, logits(reference))


@pytest.mark.parametrize("kind", ["streamed", "on disk"])
def test_a_resume_takes_no_more_memory_than_the_start(kind: str, tmp_path: Path) -> None:
    first, checkpoint = keeper(tmp_path, settings=KINDS[kind]), tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    note(first, checkpoint, first.build(policy()))
    resumed = keeper(tmp_path, settings=KINDS[kind])
    reference = resumed.build(policy(seed=1))
    weight = reference.model.layers[0].host.mlp.up_proj.weight
    address = weight.data_ptr()
    resume(resumed, checkpoint, reference)
    # The same host memory, page-locked on CUDA; or the other file, mapped and not copied.
    assert (weight.data_ptr() == address) == (kind == "streamed")


# Moved ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resident", "streamed", "on disk"])
def test_an_exact_reference_moves_a_part_of_the_way(kind: str, tmp_path: Path) -> None:
    kept = keeper(tmp_path, settings=KINDS[kind])
    start, live = policy(), policy(seed=1)
    reference = kept.build(start)
    expected = policy()
    for _ in range(2):
        kept.mix(reference, live, alpha=0.6)
        for target, source in zip(expected.parameters(), live.parameters(), strict=True):
            target.data.mul_(1.0 - 0.6).add_(source.data, alpha=0.6)  # what TRL does
    assert torch.equal(logits(reference), logits(expected))


def test_a_quantized_reference_that_moves_is_built_from_the_policy(tmp_path: Path) -> None:
    kept = keeper(tmp_path)
    reference = kept.build(policy())
    start, fidelity = kept.key, kept.fidelity
    kept.take(kept.build(policy(seed=1).train()), into=reference)
    fresh = keeper()
    assert torch.equal(logits(reference), logits(fresh.build(policy(seed=1))))
    assert kept.fidelity == fresh.fidelity != fidelity
    assert kept.store is not None
    assert kept.key != start
    assert kept.store.manifest(kept.key) is not None


def test_a_mixed_reference_that_moves_keeps_which_layers_have_8_bits(tmp_path: Path) -> None:
    kept = keeper(tmp_path, settings=MIXED)
    reference = kept.build(policy())
    chosen = list(kept.wide or [])
    assert 0 < len(chosen) < len(quantized_linears(reference))
    other = keeper(settings=MIXED)
    other.build(policy(seed=1))
    assert sorted(other.wide or []) != sorted(chosen)
    kept.take(kept.build(policy(seed=1)), into=reference)
    assert kept.wide == chosen
    expected = keeper(settings=MIXED, wide=chosen).build(policy(seed=1))
    assert torch.equal(logits(reference), logits(expected))


@pytest.mark.parametrize("kind", list(KINDS))
def test_checkpoints_before_and_after_a_move_have_their_own_reference(
    kind: str, tmp_path: Path
) -> None:
    kept = keeper(tmp_path, settings=KINDS[kind])
    reference = kept.build(policy())
    expected = []
    for step in range(3):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        note(kept, checkpoint, reference)
        expected.append(logits(reference))
        if kind in ("quantized", "mixed"):
            kept.take(kept.build(policy(seed=step + 1)), into=reference)
        else:
            kept.mix(reference, policy(seed=step + 1), alpha=0.6)
    for step in range(3):
        resumed = keeper(tmp_path, settings=KINDS[kind], sample=never)
        found = resumed.build(policy())
        resume(resumed, tmp_path / f"checkpoint-{step}", found)
        assert torch.equal(logits(found), expected[step])


def test_a_reference_on_disk_moves_also_when_its_first_checkpoint_is_gone(tmp_path: Path) -> None:
    kept = keeper(tmp_path, settings=KINDS["on disk"])
    reference = kept.build(policy())
    checkpoint = tmp_path / "checkpoint-2"  # the only one, as with `save_total_limit: 1`
    checkpoint.mkdir()
    for seed in (1, 2):
        kept.mix(reference, policy(seed=seed), alpha=1.0)
        note(kept, checkpoint, reference)
    assert torch.equal(logits(reference), logits(policy(seed=2)))


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_another_run_in_the_same_folder_does_not_take_the_moved_reference_of_the_first(
    kind: str, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    for seed in (1, 2):  # the policy at the same step of two runs
        kept = keeper(tmp_path, settings=KINDS[kind])
        reference = kept.build(policy())
        kept.mix(reference, policy(seed=seed), alpha=0.6)
        note(kept, checkpoint, reference)
    resumed = keeper(tmp_path, settings=KINDS[kind])
    found = resumed.build(policy())
    resume(resumed, checkpoint, found)
    assert torch.equal(logits(found), logits(reference))


def test_a_reference_on_disk_is_written_once(tmp_path: Path) -> None:
    kept = keeper(tmp_path, settings=KINDS["on disk"])
    reference = kept.build(policy())
    assert kept.store is not None
    files = {path: path.stat().st_ino for path in kept.store.folder(kept.key).glob("*tensors")}
    assert len(files) == 3
    note(kept, tmp_path, reference)
    assert {path: path.stat().st_ino for path in files} == files


def test_fidelity_survives_the_manifest(tmp_path: Path) -> None:
    # NaN where no step reached the target: JSON of Python holds it.
    kept = keeper(tmp_path)
    reference = kept.build(policy())
    assert kept.store is not None
    kept.fidelity = ReferenceFidelity(0.1, 0.2, 0.3, 0.9, math.nan, 0.01, 5)
    kept.store.describe(kept.key, kept._manifest())
    again = keeper(tmp_path, sample=never)
    again.build(policy())
    assert again.fidelity is not None
    assert math.isnan(again.fidelity.gradient_cosine)
    assert again.fidelity.kl_full == 0.3
    assert reference is not None


def test_progress_and_loading_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="trl_grpo_ext")
    keeper(tmp_path).build(policy())
    assert "reference: KL floor" in caplog.text
    assert "reference: quantized, 0.0M parameters" in caplog.text
    caplog.clear()
    keeper(tmp_path).build(policy())
    assert "reference: loaded from" in caplog.text


def test_a_model_without_a_list_of_layers_is_quantized_and_not_measured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    odd = policy()
    odd.model.layers = nn.Sequential(*odd.model.layers)
    kept = keeper(settings=ReferenceSettings(compensation="none"))
    reference = kept.build(odd)
    assert len(quantized_linears(reference)) == len(quantized_linears(keeper().build(policy())))
    assert kept.fidelity is None
    assert "How faithful the reference is cannot be measured" in caplog.text
