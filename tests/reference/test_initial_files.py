"""A streamed reference on disk links the files of its model instead of writing them again."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trl_grpo_ext.errors import ReferenceModelError
from trl_grpo_ext.reference.initial_files import initial_files, link_initial, map_initial
from trl_grpo_ext.reference.streamed import build_streamed_reference, disk_bytes, open_streamed

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    tie_word_embeddings=True,
)
BUFFERS = {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a model of three layers, in float32."""
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def loaded(source: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model.eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.arange(20)[None]).logits


def written(folder: Path) -> set[str]:
    """Names of the tensors in files of the reference's own."""
    own = [path for path in folder.glob("*.safetensors") if not path.name.startswith("initial")]
    return {name for path in own for name in load_file(path)}


def test_only_what_the_initial_file_does_not_hold_is_written(folder: Path, tmp_path: Path) -> None:
    policy, target = loaded(folder), tmp_path / "reference"
    planned = disk_bytes(policy)
    reference = build_streamed_reference(policy, folder=target)
    assert {path.name for path in target.iterdir()} == {
        "initial-00000.safetensors",
        "initial.json",
        "outside-layers.safetensors",
    }
    assert written(target) == BUFFERS
    assert planned == 2 * 8 * 4  # the angles of 16 dimensions a head, and those it began with
    assert os.path.samefile(target / "initial-00000.safetensors", folder / "model.safetensors")
    assert torch.equal(logits_of(reference), logits_of(policy))


def test_saving_over_the_initial_model_leaves_the_reference_as_it_is(
    folder: Path, tmp_path: Path
) -> None:
    policy = loaded(folder)
    reference = build_streamed_reference(policy, folder=tmp_path / "reference")
    before = logits_of(reference)
    with torch.no_grad():
        policy.get_parameter("model.layers.1.mlp.up_proj.weight").zero_()
    policy.save_pretrained(folder)
    assert torch.equal(logits_of(reference), before)
    again = open_streamed(policy, tmp_path / "reference")
    assert torch.equal(logits_of(again), before)


def test_files_of_the_run_itself_are_not_linked(folder: Path) -> None:
    target = folder / "reference" / "key"  # as where `output_dir` is the model's folder
    reference = build_streamed_reference(loaded(folder), folder=target)
    before = logits_of(reference)
    assert not list(target.glob("initial*"))
    path = folder / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # in place, as shutil.copy does
    assert torch.equal(logits_of(reference), before)


def test_layers_are_mapped_from_the_initial_file(folder: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not show what is mapped")
    reference = build_streamed_reference(loaded(folder), folder=tmp_path / "reference")
    assert str(tmp_path / "reference" / "initial-00000") in Path("/proc/self/maps").read_text()
    del reference
    gc.collect()
    assert str(tmp_path / "reference" / "initial") not in Path("/proc/self/maps").read_text()


def test_a_model_in_several_files(folder: Path, tmp_path: Path) -> None:
    policy = loaded(folder)
    policy.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    policy = loaded(tmp_path / "shards")
    files = initial_files(policy)
    assert len(files) > 2
    assert files == sorted((tmp_path / "shards").glob("model-*.safetensors"))
    reference = build_streamed_reference(policy, folder=tmp_path / "reference")
    links = list((tmp_path / "reference").glob("initial-*"))
    assert len(links) == len(files)
    assert written(tmp_path / "reference") == BUFFERS
    assert torch.equal(logits_of(reference), logits_of(policy))


def test_what_changed_since_loading_is_written(folder: Path, tmp_path: Path) -> None:
    policy, target = loaded(folder), tmp_path / "reference"
    name = "model.layers.1.mlp.up_proj.weight"
    build_streamed_reference(policy, folder=target)
    with torch.no_grad():
        policy.get_parameter(name)[3, 5] += 1.0
    reference = build_streamed_reference(policy, folder=target)
    assert written(target) == {name, *BUFFERS}
    assert (
        name not in json.loads((target / "initial.json").read_text())["initial-00000.safetensors"]
    )
    assert torch.equal(logits_of(reference), logits_of(policy))
    with torch.no_grad():
        policy.get_parameter(name)[3, 5] -= 1.0
    policy = loaded(folder)
    build_streamed_reference(policy, folder=target)
    assert written(target) == BUFFERS  # and the layer's own file is gone


def test_grown_embeddings_are_written_and_the_layers_linked(folder: Path, tmp_path: Path) -> None:
    policy = loaded(folder)
    policy.resize_token_embeddings(40, mean_resizing=False)
    reference = build_streamed_reference(policy, folder=tmp_path / "reference")
    assert written(tmp_path / "reference") == {"model.embed_tokens.weight", *BUFFERS}
    assert torch.equal(logits_of(reference), logits_of(policy))


def test_weights_of_another_type_are_all_written(folder: Path, tmp_path: Path) -> None:
    policy = loaded(folder, torch.bfloat16)
    reference = build_streamed_reference(policy, folder=tmp_path / "reference")
    assert written(tmp_path / "reference") == BUFFERS | {n for n, _ in policy.named_parameters()}
    assert not list((tmp_path / "reference").glob("initial*"))
    assert torch.equal(logits_of(reference), logits_of(policy))


@pytest.mark.parametrize("path", ["", "nobody/has-this-model", "/not/a/folder", "a b c"])
def test_a_model_without_files_here_has_none(
    path: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = loaded(folder)
    policy.config._name_or_path = policy.name_or_path = path
    monkeypatch.chdir(folder)  # no path is not this folder
    assert initial_files(policy) == []


def test_the_cache_of_the_hub_is_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub"
    snapshot = cache / "models--some--model" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    shutil.move(folder, snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    policy = loaded(snapshot)
    policy.name_or_path, policy.config._commit_hash = "some/model", commit
    assert initial_files(policy) == [snapshot / "model.safetensors"]
    policy.config._commit_hash = commit[::-1]
    assert initial_files(policy) == []


def test_the_reference_outlives_the_folder_of_its_model(folder: Path, tmp_path: Path) -> None:
    policy, target = loaded(folder), tmp_path / "reference"
    expected = logits_of(policy)
    build_streamed_reference(policy, folder=target)
    shutil.rmtree(folder)
    assert torch.equal(logits_of(open_streamed(policy, target)), expected)


def test_without_hard_links_there_are_symbolic_ones(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuses)
    policy, target = loaded(folder), tmp_path / "reference"
    reference = build_streamed_reference(policy, folder=target)
    assert (target / "initial-00000.safetensors").is_symlink()
    assert torch.equal(logits_of(reference), logits_of(policy))
    shutil.rmtree(folder)
    with pytest.raises(ReferenceModelError, match=r"which is gone or has changed \(29 of 29"):
        open_streamed(policy, target)


def test_without_links_of_any_kind_all_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise PermissionError("a file system without links")

    monkeypatch.setattr(os, "link", refuses)
    monkeypatch.setattr(os, "symlink", refuses)
    policy, target = loaded(folder), tmp_path / "reference"
    reference = build_streamed_reference(policy, folder=target)
    assert not list(target.glob("initial*"))
    shutil.rmtree(folder)
    assert torch.equal(logits_of(reference), logits_of(policy))


def test_a_damaged_list_of_links_is_told_and_made_again(folder: Path, tmp_path: Path) -> None:
    policy, target = loaded(folder), tmp_path / "reference"
    build_streamed_reference(policy, folder=target)
    (target / "initial.json").write_text("")
    with pytest.raises(ReferenceModelError, match=r"initial\.json is damaged .* start again"):
        map_initial(target)
    again = build_streamed_reference(policy, folder=target)
    assert torch.equal(logits_of(again), logits_of(policy))
    assert map_initial(target).keys() == dict(policy.named_parameters()).keys()


def test_a_whole_file_counts_before_an_index(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert initial_files(loaded(folder)) == [folder / "model.safetensors"]


def test_a_linked_file_that_changed_is_found_by_its_hash(folder: Path, tmp_path: Path) -> None:
    policy, target = loaded(folder), tmp_path / "reference"
    target.mkdir()
    weights = dict(policy.named_parameters())
    assert link_initial(policy, target, weights) == set(weights)
    assert set(map_initial(target, verify=True)) == set(weights)
    path = target / "initial-00000.safetensors"
    changed = load_file(path)
    changed["model.norm.weight"] += 1.0
    path.unlink()
    save_file(changed, path)
    assert set(map_initial(target)) == set(weights)
    with pytest.raises(ReferenceModelError) as error:
        map_initial(target, verify=True)
    assert str(error.value) == (
        f"{path} is a link to one of the files that the model was loaded from, which is gone "
        f"or has changed (1 of {len(weights)} tensors, the first is model.norm.weight), so that "
        "the reference cannot be read from it. Put it back; or start anew from the initial model."
    )


def test_a_link_is_replaced_and_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    policy, target = loaded(folder), tmp_path / "reference"
    target.mkdir()
    weights = dict(policy.named_parameters())
    for _ in range(2):
        link_initial(policy, target, weights)
        assert {path.name for path in target.iterdir()} == {
            "initial-00000.safetensors",
            "initial.json",
        }


@pytest.mark.parametrize("index", [None, "{}", "version https://git-lfs", '{"weight_map": 1}'])
def test_initial_files_that_are_damaged_are_no_initial_files(
    index: str | None, folder: Path, tmp_path: Path
) -> None:
    policy = loaded(folder)
    other = tmp_path / "damaged"
    other.mkdir()
    if index is None:
        (other / "model.safetensors").write_bytes(b"version https://git-lfs")
    else:
        (other / "model.safetensors.index.json").write_text(index)
    policy.name_or_path = str(other)
    build_streamed_reference(policy, folder=tmp_path / "reference")
    assert written(tmp_path / "reference") == BUFFERS | {n for n, _ in policy.named_parameters()}
