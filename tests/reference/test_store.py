"""Saved references: the same bits back, whole or not at all, for as long as they are needed."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import build_tiny_model, build_tiny_tokenizer
from torch import Tensor, nn

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference import build_reference, build_streamed_reference
from trl_grpo_ext.reference.store import (
    NOTE,
    ReferenceNote,
    ReferenceStore,
    fingerprint,
    note,
    noted,
    reference_key,
)

IDS = torch.arange(4, 24).view(2, 10)


def policy(seed: int = 0) -> Any:
    return build_tiny_model(build_tiny_tokenizer(), seed=seed)


def with_factors(model: Any) -> Any:
    """A quantized reference, one layer of which has low-rank factors."""
    reference = build_reference(model)
    layer = reference.model.layers[1].mlp.up_proj
    generator = torch.Generator().manual_seed(3)
    layer.set_low_rank(
        torch.randn(5, 32, generator=generator), torch.randn(64, 5, generator=generator)
    )
    return reference


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


BUILD = {
    "resident": lambda model: build_reference(model, kind="resident"),
    "streamed": build_streamed_reference,
    "quantized": build_reference,
}


@pytest.mark.parametrize("kind", list(BUILD))
def test_a_reference_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    store, saved = ReferenceStore(tmp_path / "reference"), BUILD[kind](policy())
    store.save("a", saved, {"settings": {}})
    other = BUILD[kind](policy(seed=1))
    before = logits(other)
    store.restore("a", other)
    assert torch.equal(logits(other), logits(saved))
    assert not torch.equal(logits(other), before)
    shutil.rmtree(tmp_path / "reference")  # nothing is read from there any more
    assert torch.equal(logits(other), logits(saved))


def test_low_rank_factors_come_back_into_a_fresh_reference(tmp_path: Path) -> None:
    store, saved = ReferenceStore(tmp_path), with_factors(policy())
    store.save("a", saved, {})
    fresh = build_reference(policy(seed=1))
    store.restore("a", fresh)
    assert torch.equal(logits(fresh), logits(saved))
    assert fresh.model.layers[1].mlp.up_proj.factor_in.shape == (5, 32)
    assert not fresh.model.layers[0].mlp.up_proj.has_low_rank


def test_a_streamed_reference_reads_saved_files_where_it_is_asked_to(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    saved = build_streamed_reference(policy(), folder=tmp_path / "own")
    store.save("a", saved, {})
    other = build_streamed_reference(policy(seed=1), folder=tmp_path / "other")
    logits(other)  # its layers lie on the device
    weight = other.model.layers[0].host.mlp.up_proj.weight
    address = weight.data_ptr()
    store.restore("a", other, mapped=True)
    assert weight.data_ptr() != address
    assert torch.equal(logits(other), logits(policy()))
    own = build_streamed_reference(policy(seed=1), folder=tmp_path / "other")
    assert torch.equal(logits(own), logits(policy(seed=1)))  # its files are what they were


def test_host_memory_of_a_streamed_reference_stays_where_it_is(tmp_path: Path) -> None:
    # It is page-locked on CUDA: another tensor in its place would not be.
    store = ReferenceStore(tmp_path)
    store.save("a", build_streamed_reference(policy()), {})
    other = build_streamed_reference(policy(seed=1))
    weight = other.model.layers[0].host.mlp.up_proj.weight
    address = weight.data_ptr()
    store.restore("a", other)
    assert weight.data_ptr() == address
    assert torch.equal(weight, policy().model.layers[0].mlp.up_proj.weight)


def test_restoring_what_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    with pytest.raises(
        ReferenceModelError, match=r"There is no reference in .*gone.*Put the folder"
    ):
        store.restore("gone", build_reference(policy()))


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "other model"])
def test_a_damaged_reference_is_refused_and_nothing_changes(damage: str, tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    store.save("a", build_streamed_reference(policy()), {})
    file = tmp_path / "a" / "layer-00001.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "other model":
        shutil.copy(tmp_path / "a" / "layer-00000.safetensors", file)
    else:
        file.write_bytes(file.read_bytes()[: 1000 if damage == "cut" else 0])
    other = build_streamed_reference(policy(seed=1))
    before = logits(other)
    with pytest.raises(ReferenceModelError, match=r"(is damaged|reference whole).*[Dd]elete the f"):
        store.restore("a", other)
    assert torch.equal(logits(other), before)


def test_a_reference_of_another_shape_is_refused(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    store.save("a", build_reference(policy(), block_size=128), {})
    with pytest.raises(ReferenceModelError, match="or of another shape"):
        store.restore("a", build_reference(policy()))


def test_a_reference_without_its_manifest_counts_as_not_there(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    store.save("a", build_reference(policy()), {"settings": {"kind": "quantized"}})
    assert store.manifest("a") == {"settings": {"kind": "quantized"}}
    (tmp_path / "a" / "manifest.json").write_text("{")
    assert store.manifest("a") is None
    assert store.manifest("b") is None


def test_a_full_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=30_000))
    with pytest.raises(ReferenceModelError) as error:
        ReferenceStore(tmp_path).save("a", build_reference(policy()), {})
    assert str(error.value) == (
        f"The reference takes 0.00 GB in {tmp_path / 'a'}, where 0.00 GB are free, so that a "
        "resume could not have it back. Make room, or set `output_dir` to a disk with that much, "
        "or `save_strategy: no`."
    )
    assert list((tmp_path / "a").iterdir()) == []


# Keys -----------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_weights_alone() -> None:
    model = policy()
    same = fingerprint(model)
    assert same == fingerprint(policy())
    assert same == fingerprint(copy.deepcopy(model).requires_grad_(False).train())
    assert same != fingerprint(policy().bfloat16())
    assert same != fingerprint(policy(seed=1))
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))  # the last bit
    assert same != fingerprint(model)


def test_a_key_depends_on_policy_and_settings_and_on_no_order() -> None:
    key = reference_key("abc", {"kind": "quantized", "keep_modules": ("a",)})
    assert key == reference_key("abc", {"keep_modules": ["a"], "kind": "quantized"})
    assert key != reference_key("abd", {"kind": "quantized", "keep_modules": ("a",)})
    assert key != reference_key("abc", {"kind": "quantized", "keep_modules": ()})


# Checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_notes_its_reference(tmp_path: Path) -> None:
    assert noted(tmp_path) == ReferenceNote(None, None)
    for written in (ReferenceNote(key="abc"), ReferenceNote(path="some/model")):
        note(tmp_path, written)
        assert noted(tmp_path) == written
    (tmp_path / NOTE).write_text('{"reference": "abc"}')  # as it was written at first
    assert noted(tmp_path) == ReferenceNote(key="abc")


@pytest.mark.parametrize("text", ["", "{}", "[]"])
def test_a_damaged_note_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / NOTE).write_text(text)
    with pytest.raises(ReferenceModelError, match="is damaged, so nothing says which reference"):
        noted(tmp_path)


def test_pruning_keeps_what_checkpoints_note_and_what_is_asked_for(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path / "reference")
    noted, also, moved, stale = (digit * 16 for digit in "012a")
    for key in (noted, also, moved, stale, "somebody's"):
        (store.root / key).mkdir(parents=True)
    for step, key in ((2, noted), (4, also)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        note(tmp_path / f"checkpoint-{step}", ReferenceNote(key))
    store.prune(tmp_path, keep={moved})
    kept = {noted, also, moved, "somebody's"}
    assert {folder.name for folder in store.root.iterdir()} == kept


def test_nothing_is_pruned_where_a_note_cannot_be_read(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path / "reference")
    (store.root / ("a" * 16)).mkdir(parents=True)
    (tmp_path / "checkpoint-2").mkdir()
    note(tmp_path / "checkpoint-2", ReferenceNote("b" * 16))
    (next((tmp_path / "checkpoint-2").iterdir())).write_text("")
    store.prune(tmp_path, keep=())
    assert (store.root / ("a" * 16)).exists()


def test_there_is_nothing_to_prune_where_nothing_was_saved(tmp_path: Path) -> None:
    ReferenceStore(tmp_path / "reference").prune(tmp_path, keep={"sent"})
    assert not (tmp_path / "reference").exists()
