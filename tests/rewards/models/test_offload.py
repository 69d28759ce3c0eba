"""Copies on the CPU stand for a GPU: a tensor that is not a copy was not moved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rewards.models.tiny_orm import save_orm
from torch import Tensor, nn

from trl_grpo_ext.rewards.models.offload import moved
from trl_grpo_ext.rewards.models.scoring_model import ModelSettings, ScoringModel

TEXTS = [[5, 6, 7, 8], [9, 10]]


@pytest.fixture(scope="session")
def orm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_orm(tmp_path_factory.mktemp("orm"), hidden_size=128, intermediate_size=256)


def load(folder: Path, quantization: Any) -> ScoringModel:
    settings = ModelSettings(model=str(folder), device="cpu", quantization=quantization)
    return ScoringModel.load(settings, kind="sequence")


def reachable(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that an object holds, in whatever attribute of whatever object."""
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, type) or callable(getattr(value, "mro", None)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    inside = list(vars(value).values()) if hasattr(value, "__dict__") else []
    if isinstance(value, dict):
        inside += value.values()
    elif isinstance(value, list | tuple | set):
        inside += value
    for one in inside:
        yield from reachable(one, seen)


def memory(model: nn.Module) -> dict[int, int]:
    """How often each piece of memory is held, by its address."""
    counts: dict[int, int] = {}
    for tensor in reachable(model):
        counts[tensor.data_ptr()] = counts.get(tensor.data_ptr(), 0) + 1
    return counts


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_all_of_a_model_is_elsewhere_and_then_back(orm_dir: Path, quantization: Any) -> None:
    scoring, copies = load(orm_dir, quantization), []
    expected = torch.stack(load(orm_dir, quantization).logits(TEXTS))
    home = memory(scoring.model)

    def copy(tensor: Tensor) -> Tensor:
        copies.append(tensor.clone())
        return copies[-1]

    for _ in range(2):  # the first pass changes what bitsandbytes keeps
        copies.clear()
        with moved(scoring.model, copy):
            assert set(memory(scoring.model)) == {tensor.data_ptr() for tensor in copies}
            assert len(copies) == len(home)  # what is held twice is moved once
            assert torch.equal(torch.stack(scoring.logits(TEXTS)), expected)
            assert not set(memory(scoring.model)) & set(home)
        assert memory(scoring.model) == home
    assert torch.equal(torch.stack(scoring.logits(TEXTS)), expected)


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_model_scores_with_what_stands_in_its_place(orm_dir: Path, quantization: Any) -> None:
    scoring = load(orm_dir, quantization)
    expected = torch.stack(scoring.logits(TEXTS))
    with moved(scoring.model, torch.zeros_like):
        assert scoring.logits(TEXTS)[0].tolist() == [0.0]
    assert torch.equal(torch.stack(scoring.logits(TEXTS)), expected)


def test_model_is_back_though_the_block_fails(orm_dir: Path) -> None:
    scoring = load(orm_dir, None)
    home = memory(scoring.model)
    with pytest.raises(FloatingPointError), moved(scoring.model, torch.clone):
        raise FloatingPointError
    assert memory(scoring.model) == home


def test_model_is_back_though_the_device_is_full(orm_dir: Path) -> None:
    scoring, num_moved = load(orm_dir, None), iter(range(5))
    home = memory(scoring.model)

    def fill(tensor: Tensor) -> Tensor:
        if next(num_moved, None) is None:
            raise torch.OutOfMemoryError
        return tensor.clone()

    with pytest.raises(torch.OutOfMemoryError), moved(scoring.model, fill):
        raise AssertionError
    assert memory(scoring.model) == home
