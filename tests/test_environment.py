"""What the environment report says when something is missing or wrong."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import bitsandbytes.functional
import huggingface_hub
import pytest
import torch

from trl_grpo_ext.environment import Feature, inspect_environment


def feature(name: str) -> Feature:
    (found,) = [feature for feature in inspect_environment().features if feature.name == name]
    return found


def test_4_bit_reference_is_usable_here() -> None:
    assert feature("4-bit reference").usable


def test_4_bit_reference_is_refused_when_bitsandbytes_gives_wrong_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dequantize_to_zero(packed: torch.Tensor, state: object) -> torch.Tensor:
        return torch.zeros(64, 64)

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", dequantize_to_zero)
    found = feature("4-bit reference")
    assert not found.usable
    assert "an error of 1.00" in found.detail  # the largest weight is 1
    assert "reference: resident" in found.detail


def test_quickstart_names_the_missing_module_and_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    found = feature("quickstart")
    assert not found.usable
    assert found.detail.startswith("gguf not installed")
    assert "pip install reasoning-gym gguf" in found.detail


def test_push_to_hub_never_shows_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert feature("push to Hub").usable
    assert "secret" not in json.dumps(asdict(inspect_environment()))


def test_push_to_hub_says_how_to_log_in_without_a_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", f"{tmp_path}/token")
    found = feature("push to Hub")
    assert not found.usable
    assert "hf auth login" in found.detail


def test_a_feature_whose_package_fails_to_import_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    assert not feature("4-bit reference").usable


def test_cuda_device_is_described_by_memory_and_capability(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = SimpleNamespace(name="Card", total_memory=80 * 2**30, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    device = inspect_environment().devices[1]
    assert device.name == "cuda:0"
    assert device.description == "Card, 80.0 GiB, compute capability 7.5"
    assert device.bf16 is False  # Turing has no bfloat16
