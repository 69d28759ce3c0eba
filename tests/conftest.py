"""What every test stands on: no network, one thread a process, a tiny model."""

from __future__ import annotations

import gc
import os

# Read when the libraries are imported, so they are set before. Processes that a test starts
# inherit them; for those, which pytest-socket does not reach, they also are the only lock.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("HF_TOKEN", None)
if "PYTEST_XDIST_WORKER" in os.environ:  # the test processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import hypothesis
import pytest
import torch
from tiny import build_tiny_tokenizer, save_tiny_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# The same examples in every run, without time limits. What searches for others:
# `pytest --hypothesis-profile=default`.
hypothesis.settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked gpu where there is no CUDA device, and say so."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; docs/benchmarks.md has what it showed")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _spare_the_collector() -> None:
    """Leave out of each collection what the imports made, which accelerate would go through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, ChatML, padding on the left. Do not change it."""
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and its tokenizer. Do not write into it."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture
def tiny_model(tiny_model_dir: Path) -> LlamaForCausalLM:
    """The model of ``tiny_model_dir``, fresh for each test: float32, in evaluation mode."""
    return LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
