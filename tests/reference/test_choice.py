"""Which reference a run gets by itself: the first exact one that fits into memory."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trl_grpo_ext.memory import RunSettings, estimate_run, model_shape, reference_bytes
from trl_grpo_ext.reference.choice import choose_kind

CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
)
SETTINGS = RunSettings(dtype="float32", micro_batch=8, generation_batch=8, completion_tokens=16)
LATER = ("optimizer", "gradients", "activations", "kv_cache")


def policy(device: str) -> LlamaForCausalLM:
    """On the device ``meta``, a policy that is not on the host's CPU."""
    with torch.device(device):
        return LlamaForCausalLM(CONFIG).float()


def copy_bytes() -> int:
    return 4 * policy("meta").num_parameters()


def reserved_bytes() -> int:
    parts = estimate_run(model_shape(CONFIG), SETTINGS).parts
    return sum(parts[name] for name in LATER)


def set_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    memory = SimpleNamespace(available=num_bytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_a_copy_is_chosen_without_an_estimate_where_memory_is_plenty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_free(monkeypatch, 16 * copy_bytes() + 1)
    choice = choose_kind(policy("cpu"), SETTINGS, device=torch.device("cpu"))
    assert choice.kind == "resident"
    assert "fits into" in choice.reason


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
    choice = choose_kind(policy("meta"), SETTINGS, device=torch.device("meta"))
    assert choice.kind == "streamed"
    assert "does not fit" in choice.reason
    assert "stream from" in choice.reason


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
    choice = choose_kind(policy("cpu"), SETTINGS, device=torch.device("cpu"))
    assert choice.kind == "quantized"
    assert "the host's memory too" in choice.reason


def test_processes_share_the_memory_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, 2 * (copy_bytes() + reserved_bytes()))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose_kind(policy("cpu"), SETTINGS, device=torch.device("cpu")).kind == "resident"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert choose_kind(policy("cpu"), SETTINGS, device=torch.device("cpu")).kind == "quantized"


def test_sharded_weights_leave_the_reference_to_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, 1)
    settings = RunSettings(num_gpus=2, sharding="fsdp")
    choice = choose_kind(policy("cpu"), settings, device=torch.device("cpu"))
    assert choice.kind == "resident"
    assert choice.reason == "each process holds a part of it"


def test_a_policy_that_is_not_yet_on_its_device_needs_room_there_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("meta")
    set_free(monkeypatch, 2 * copy_bytes() + reserved_bytes())
    assert choose_kind(policy("cpu"), SETTINGS, device=device).kind == "resident"
    set_free(monkeypatch, 2 * copy_bytes() + reserved_bytes() - 1)
    assert choose_kind(policy("cpu"), SETTINGS, device=device).kind == "streamed"
