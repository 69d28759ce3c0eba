"""Which reference a run gets by itself: the first exact one that fits into memory."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from trl_grpo_ext.memory import (
    ReferenceChoice,
    RunSettings,
    estimate_run,
    model_shape,
    reference_bytes,
)
from trl_grpo_ext.reference import choice
from trl_grpo_ext.reference.choice import choose_kind
from trl_grpo_ext.reference.streamed import disk_bytes

CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SETTINGS = RunSettings(dtype="float32", micro_batch=8, generation_batch=8, completion_tokens=16)
LATER = ("casts", "optimizer", "buckets", "gathered", "gradients", "activations", "kv_cache")


def own(reason: str) -> ReferenceChoice:
    """TRL's own copy."""
    return ReferenceChoice("resident", reason)


def policy(device: str) -> LlamaForCausalLM:
    """On the device ``meta``, a policy that is not on the host's CPU."""
    with torch.device(device):
        return LlamaForCausalLM(CONFIG).float()


def copy_bytes() -> int:
    return 4 * policy("meta").num_parameters()


def reserved_bytes(settings: RunSettings = SETTINGS) -> int:
    parts = estimate_run(model_shape(CONFIG), settings).parts
    return sum(parts[name] for name in LATER)


def set_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    memory = SimpleNamespace(available=num_bytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_a_copy_is_chosen_without_an_estimate_where_memory_is_plenty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_free(monkeypatch, 16 * copy_bytes() + 1)
    found = choose_kind(policy("cpu"), SETTINGS, device=torch.device("cpu"))
    assert found.kind == "resident"
    assert "fits into" in found.reason


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_copy_is_chosen_where_it_just_fits_beside_what_the_run_will_take(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free(monkeypatch, copy_bytes() + reserved_bytes())
    assert choose_kind(policy(device), SETTINGS, device=torch.device(device)).kind == "resident"


def test_a_device_streams_from_the_host_when_a_copy_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_free(monkeypatch, copy_bytes() + reserved_bytes() - 1)
    found = choose_kind(policy("meta"), SETTINGS, device=torch.device("meta"))
    assert found.kind == "streamed"
    assert "does not fit" in found.reason
    assert "stream from" in found.reason


def test_four_bits_are_chosen_when_not_even_two_layers_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streamed = reference_bytes(model_shape(CONFIG), kind="streamed", dtype_bytes=4)
    set_free(monkeypatch, streamed.device + reserved_bytes())
    assert choose_kind(policy("meta"), SETTINGS, device=torch.device("meta")).kind == "streamed"
    set_free(monkeypatch, streamed.device + reserved_bytes() - 1)
    assert choose_kind(policy("meta"), SETTINGS, device=torch.device("meta")).kind == "quantized"


def test_a_cpu_has_nowhere_to_stream_from(monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, copy_bytes() + reserved_bytes() - 1)
    found = choose_kind(policy("cpu"), SETTINGS, device=torch.device("cpu"))
    assert found.kind == "quantized"
    assert found.reason.endswith("that are left on the device")


def test_processes_share_the_memory_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, 2 * (copy_bytes() + reserved_bytes()))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose_kind(policy("cpu"), SETTINGS, device=torch.device("cpu")).kind == "resident"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert choose_kind(policy("cpu"), SETTINGS, device=torch.device("cpu")).kind == "quantized"


SPLIT = dataclasses.replace(SETTINGS, num_gpus=4, sharding="fsdp")


def test_of_a_split_copy_each_process_needs_room_for_its_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part, device = copy_bytes() // 4, torch.device("meta")
    set_free(monkeypatch, part + reserved_bytes(SPLIT))
    assert choose_kind(policy("meta"), SPLIT, device=device).kind == "resident"
    set_free(monkeypatch, part + part + reserved_bytes(SPLIT))
    assert choose_kind(policy("cpu"), SPLIT, device=device).kind == "resident"  # and the policy's
    set_free(monkeypatch, part + reserved_bytes(SPLIT) - 1)
    found = choose_kind(policy("meta"), SPLIT, device=device)
    assert found.kind == "streamed"
    assert found.reason.startswith("a part of 0.0 GB does not fit into")


def test_a_split_copy_is_taken_where_nothing_fits_and_four_bits_are_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "available_host_bytes", lambda: 0)
    set_free(monkeypatch, 1)
    device = torch.device("meta")
    many, two = (dataclasses.replace(SPLIT, num_gpus=number) for number in (16, 2))
    found = choose_kind(policy("meta"), many, device=device)
    assert found == own("each process holds a part of it, less than in 4 bits")
    assert choose_kind(policy("meta"), two, device=device).kind == "quantized"


# From disk ----------------------------------------------------------------------------------------


def set_free_disk(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=num_bytes))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_are_read_from_disk_where_host_memory_is_too_small(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "available_host_bytes", lambda: copy_bytes() - 1)
    monkeypatch.setattr(choice, "available_memory_bytes", lambda: copy_bytes() - 1)
    monkeypatch.setattr(choice, "estimate_run", lambda *_: SimpleNamespace(parts={}))
    written = disk_bytes(policy(device))
    set_free_disk(monkeypatch, written)
    place = {"device": torch.device(device), "disk": tmp_path / "to be" / "made"}
    found = choose_kind(policy(device), SETTINGS, **place)
    assert (found.kind, found.on_disk) == ("streamed", True)
    assert found.reason.endswith("its layers are read from disk, of which they take 0.0 GB")
    set_free_disk(monkeypatch, written - 1)
    assert choose_kind(policy(device), SETTINGS, **place).kind == "quantized"
    place["disk"] = None
    assert choose_kind(policy(device), SETTINGS, **place).kind == "quantized"


def test_files_of_the_model_itself_take_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy("cpu").save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    set_free(monkeypatch, copy_bytes() - 1)
    monkeypatch.setattr(choice, "estimate_run", lambda *_: SimpleNamespace(parts={}))
    set_free_disk(monkeypatch, 10_000)  # for the angles of the positions
    found = choose_kind(loaded, SETTINGS, device=torch.device("cpu"), disk=tmp_path)
    assert (found.kind, found.on_disk) == ("streamed", True)


def test_host_memory_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, copy_bytes() + reserved_bytes() - 1)
    found = choose_kind(
        policy("meta"),
        SETTINGS,
        device=torch.device("meta"),
        disk=tmp_path,
        in_host_memory=False,
    )
    assert (found.kind, found.on_disk) == ("streamed", True)


def test_a_model_whose_memory_cannot_be_estimated_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2)  # no attention heads
    set_free(monkeypatch, 2 * copy_bytes())
    with torch.device("meta"):
        mamba = MambaForCausalLM(config)
    monkeypatch.setattr(choice, "_SURELY", 10**9)
    found = choose_kind(mamba, SETTINGS, device=torch.device("meta"))
    assert found == own("the memory of such a model cannot be estimated")


def test_a_model_whose_layers_cannot_be_told_apart_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    odd = policy("meta")
    odd.model.layers = nn.Sequential(*odd.model.layers)
    set_free(monkeypatch, copy_bytes())
    found = choose_kind(odd, SETTINGS, device=torch.device("meta"))
    assert found == own("its layers cannot be told apart")


def test_where_nothing_fits_the_smallest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    many = LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": 40})
    with torch.device("meta"):
        deep = LlamaForCausalLM(many).float()
    set_free(monkeypatch, 1)
    monkeypatch.setattr(choice, "available_host_bytes", lambda: 10**10)
    found = choose_kind(deep, SETTINGS, device=torch.device("meta"))
    assert found.kind == "streamed"  # two layers are less than forty in 4 bits
    assert "and two layers of it take 0.0 GB, four bits 0.0 GB; its layers stream" in found.reason


def test_a_model_that_cannot_be_streamed_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = policy("meta")
    shared.model.layers[2].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    set_free(monkeypatch, copy_bytes() + reserved_bytes() - 10**6)
    found = choose_kind(shared, SETTINGS, device=torch.device("meta"), disk=tmp_path)
    assert found.kind == "quantized"
    assert found.reason.endswith("and the model cannot be streamed")


def test_a_policy_that_is_not_yet_on_its_device_needs_room_there_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("meta")
    set_free(monkeypatch, 2 * copy_bytes() + reserved_bytes())
    assert choose_kind(policy("cpu"), SETTINGS, device=device).kind == "resident"
    set_free(monkeypatch, 2 * copy_bytes() + reserved_bytes() - 1)
    assert choose_kind(policy("cpu"), SETTINGS, device=device).kind == "streamed"
