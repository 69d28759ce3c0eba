"""The benchmark of references runs, and what it computes itself agrees with the package."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import build_tiny_model, build_tiny_tokenizer
from torch import nn
from transformers import LlamaForCausalLM

from trl_grpo_ext.reference import build_reference
from trl_grpo_ext.reference.completions import (
    CompletionBatch,
    completion_batches,
)
from trl_grpo_ext.reference.fidelity import measure_fidelity

FOLDER = Path(__file__).parents[1] / "benchmarks"
ROWS = [([1, 5 + i, 9], [20 + i, 30 + i, 40, 12 + i, 2]) for i in range(6)]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return __import__("reference")


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return __import__("reference_methods")


@pytest.fixture(scope="module")
def wide_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama wide enough for the default rank."""
    tokenizer = build_tiny_tokenizer()
    config = build_tiny_model(tokenizer).config
    config.update({"hidden_size": 128, "head_dim": 32, "initializer_range": 0.1})
    folder = tmp_path_factory.mktemp("wide")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def batches(max_tokens: int = 24) -> list[CompletionBatch]:
    prompts, completions = zip(*ROWS, strict=True)
    return completion_batches(prompts, completions, max_tokens=max_tokens)


def run(model: Path, cache: Path, arms: Sequence[str], *options: str) -> dict[str, Any]:
    command = [sys.executable, str(FOLDER / "reference.py"), "--model", str(model), "--json"]
    command += ["--cache", str(cache), "--task", "chain_sum", "--device", "cpu", *options]
    command += ["--calibration-tokens", "600", "--heldout-tokens", "100", "--arms", *arms]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
def test_every_arm_is_measured_and_drawn(
    wide_model_dir: Path, tmp_path: Path, benchmark: ModuleType
) -> None:
    picture = tmp_path / "images" / "frontier.png"
    result = run(wide_model_dir, tmp_path, benchmark.ARMS, "--plot", str(picture))
    kinds = result["kinds"]
    assert set(kinds) == set(benchmark.ARMS)
    assert result["default"] in kinds
    assert result["width_4096_layer_bytes_ratio"] < 0.31
    for kind in kinds.values():
        assert kind["floor_ratio"] == pytest.approx(kind["kl_k3"] / kinds["nf4"]["kl_k3"])
    alone, both = (kinds["streamed"][key] for key in ("copy_seconds", "logprob_seconds"))
    compute = kinds["streamed"]["resident_seconds"]
    assert kinds["streamed"]["copy_overlap"] == pytest.approx(
        (alone + compute - both) / min(alone, compute)
    )
    for exact in ("resident", "streamed"):
        assert kinds[exact]["kl_k3"] == 0
        assert kinds[exact]["gradient_cosine"] == pytest.approx(1)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on_from_its_folder(wide_model_dir: Path, tmp_path: Path) -> None:
    run(wide_model_dir, tmp_path, ["nf4"])
    kept = json.loads((tmp_path / "nf4.json").read_text())
    kept["result"]["build_seconds"] = 123.0
    (tmp_path / "nf4.json").write_text(json.dumps(kept))
    result = run(wide_model_dir, tmp_path, ["int8"])
    assert result["kinds"]["nf4"]["build_seconds"] == 123.0
    assert result["kinds"]["int8"]["floor_ratio"] < 0.1


def test_yardstick_measures_what_the_package_measures(
    benchmark: ModuleType, tiny_model: LlamaForCausalLM
) -> None:
    reference = build_reference(tiny_model)
    found = benchmark.Yardstick(tiny_model, batches()).measure(reference)
    expected = measure_fidelity(
        tiny_model, reference, batches(), parameters=list(tiny_model.parameters())
    )
    assert found == pytest.approx({name: getattr(expected, name) for name in found}, rel=1e-4)


def test_split_measures_on_the_same_rows_however_many_are_calibrated_on(
    benchmark: ModuleType,
) -> None:
    few = Namespace(heldout_tokens=6, calibration_tokens=9)
    more = Namespace(heldout_tokens=6, calibration_tokens=32)
    assert benchmark.split(ROWS, few) == (ROWS[2:4], ROWS[:2])
    assert benchmark.split(ROWS, more) == (ROWS[2:], ROWS[:2])
    assert benchmark.split(ROWS[:5], more) is None


def test_sizes_count_two_streamed_layers(
    benchmark: ModuleType, tiny_model: LlamaForCausalLM
) -> None:
    sizes = benchmark.sizes(benchmark.build_arm("streamed", tiny_model, []))
    # The model has two layers, so all of it is on the device; 2 bytes a weight.
    assert sizes["bytes"] == 2 * tiny_model.num_parameters()
    assert sizes["bytes_ratio"] == 1
    assert sizes["layer_bytes_ratio"] == 1


@pytest.mark.parametrize("size", [1, 8, 576])
def test_hadamard_is_orthogonal(methods: ModuleType, size: int) -> None:
    turn = methods.hadamard(size, seed=0)
    torch.testing.assert_close(turn @ turn.T, torch.eye(size), atol=1e-5, rtol=0)


def test_rotated_layer_multiplies_with_the_weight_turned_back(methods: ModuleType) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 8)
    rotated = methods.RotatedLinear(layer.weight, layer.bias)
    inputs = torch.randn(5, 96)
    weight = rotated.effective_weight(torch.float32) @ rotated.turn_II.T
    expected = inputs @ weight.T + layer.bias
    torch.testing.assert_close(rotated(inputs), expected, atol=1e-5, rtol=0)
    assert (weight - layer.weight).norm() < 0.15 * layer.weight.norm()


def test_spread_puts_labels_above_their_values_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    plot = __import__("reference_plot")
    gap = plot.LABEL_GAP
    assert plot.spread([1.0, 2.0, 4.0]) == pytest.approx([gap, 2.0, 4.0])
    assert plot.spread([1.0, 1.0, 1.0]) == pytest.approx([gap, gap**2, gap**3])
    assert plot.spread([1.0, 1.5, 8.0]) == pytest.approx([gap, gap**2, 8.0])
    assert plot.spread([]) == []
