"""Two processes give what one gives: same completions, so same advantages, loss and weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TRAIN = '''
import json, logging, sys, warnings
warnings.filterwarnings("ignore")
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.reference import streamed_layers
from trl_grpo_ext.reference.store import fingerprint

told = []
handler = logging.Handler()
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger("trl_grpo_ext").addHandler(handler)
logging.getLogger("trl_grpo_ext").setLevel(logging.INFO)

model, out, per_device = sys.argv[1], sys.argv[2], int(sys.argv[3])

def rollout(prompts, trainer):
    """Completions that depend on prompt and place in the group only, not on the process."""
    tokenizer, rows = trainer.processing_class, []
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(sum(map(ord, prompt)) * 10 + index % 4)
        length = 3 + int(torch.randint(5, (), generator=generator))
        rows.append(torch.randint(4, 60, (length,), generator=generator).tolist())
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    return {"prompt_ids": ids, "completion_ids": rows, "logprobs": None}

def digits(*, completions, **_):
    scores = [float(sum(c.isdigit() for c in text)) for text in completions]
    return [None if len(text) == 4 else score for text, score in zip(completions, scores)]

config = ExtGRPOConfig(
    out, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
    per_device_train_batch_size=per_device, max_completion_length=8,
    learning_rate=1e-2, optim="sgd", logging_steps=1, seed=3, gradient_checkpointing=False,
    **{"num_generations": 4, "max_steps": 3, "save_strategy": "no", **json.loads(sys.argv[4])},
)
dataset = Dataset.from_dict({"prompt": [f"{a} + {a} =" for a in range(8)]})
given = {"rollout_func": rollout} if config.group_sampler == "transformers" else {}
trainer = ExtGRPOTrainer(model, digits, config, dataset, **given)
trainer.train()
reference = trainer.ref_model or torch.nn.Module()
parts = [reference, *(layer.host for layer in streamed_layers(reference))]
held = {f"{i} {k}": b for i, part in enumerate(parts) for k, b in part.named_buffers()}
held |= {f"{i} {k}": p for i, part in enumerate(parts) for k, p in part.named_parameters()}
bits = fingerprint(torch.nn.ParameterDict(
    {k.replace(".", "/"): torch.nn.Parameter(t, requires_grad=False) for k, t in held.items()}
))
references = gather_object([bits])
loads = gather_object([sum("reference: loaded" in text for text in told)])
if trainer.accelerator.is_main_process:
    keys = ("loss", "reward", "kl", "grad_norm", "frac_reward_zero_std")
    history = [{k: e[k] for k in keys if k in e} for e in trainer.state.log_history[:3]]
    weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    advantages = list(trainer._logs["advantages"])
    completions = list(trainer._logs["completion"])
    result = {"history": history, "weights": weights, "advantages": advantages}
    result |= {"completions": completions, "references": references, "loads": loads}
    torch.save(result, out + ".pt")
trainer.accelerator.end_training()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
'''


SHARD = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from trl_grpo_ext.reference import QuantizedLinear, build_reference

mesh = init_device_mesh("cpu", (2,))
reference = build_reference(AutoModelForCausalLM.from_pretrained(sys.argv[1]))
ids = torch.arange(20)[None]
with torch.no_grad():
    expected = reference(ids).logits
    for layer in reference.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(reference, mesh=mesh)
    found = reference(ids).logits
kept = [m for m in reference.modules() if isinstance(m, QuantizedLinear)]
whole = all(not hasattr(buffer, "placements") for m in kept for buffer in m.buffers())
norms = [p for layer in reference.model.layers for p in layer.parameters()]
sharded = all(hasattr(parameter, "placements") for parameter in norms)
torch.save([torch.equal(expected, found), whole, sharded, len(kept)], sys.argv[2] + ".pt")
torch.distributed.destroy_process_group()
"""


CHOOSE = """
import sys, types, warnings
warnings.filterwarnings("ignore")
import psutil, torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer

config = ExtGRPOConfig(
    sys.argv[2], use_cpu=True, bf16=False, report_to=[], save_strategy="no", beta=0.1,
    per_device_train_batch_size=4, num_generations=4, max_completion_length=8, disable_tqdm=True,
)
rank = torch.distributed.get_rank()
memory = types.SimpleNamespace(available=(10**12, 400_000)[rank])
psutil.virtual_memory = lambda: memory
data = Dataset.from_dict({"prompt": ["1 + 1"] * 4})
trainer = ExtGRPOTrainer(sys.argv[1], lambda completions, **_: [0.0] * 4, config, data)
kinds = gather_object([trainer.reference_kind])
if rank == 0:
    torch.save(kinds, sys.argv[2] + ".pt")
torch.distributed.destroy_process_group()
"""


SHARD_STREAMED = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from trl_grpo_ext.layerwise import decoder_layers, run_layerwise
from trl_grpo_ext.reference import build_streamed_reference

mesh = init_device_mesh("cpu", (2,))
reference = build_streamed_reference(AutoModelForCausalLM.from_pretrained(sys.argv[1]))
batches = [torch.arange(20)[None], torch.arange(5, 30)[None]]
passes = [lambda ids=ids: reference(ids).logits for ids in batches]
with torch.no_grad():
    expected = [run() for run in passes]
    for layer in reference.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(reference, mesh=mesh)
    found = run_layerwise(list(decoder_layers(reference)), passes)
equal = all(map(torch.equal, expected, found))
sharded = hasattr(reference.model.embed_tokens.weight, "placements")
torch.save([equal, sharded], sys.argv[2] + ".pt")
torch.distributed.destroy_process_group()
"""


def launch(script: str, folder: Path, *arguments: object, processes: int) -> Any:
    """Run the script in some processes; return what they saved to ``<second argument>.pt``."""
    path = folder / "script.py"
    path.write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", str(processes), str(path), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(f"{arguments[1]}.pt", weights_only=False)


@pytest.mark.parametrize(
    "options",
    [
        {
            "beta": 0.5,
            "reference": "quantized",
            "reference_calibration_tokens": 500,
            "kl_clamp": 10.0,
            "loss_type": "dapo",
            "group_sampler": "transformers",
        },
        {
            "advantage_baseline": "leave_one_out",
            "scale_rewards": "batch",
            "loss_type": "grpo",
            "group_sampler": "transformers",
        },
        {"group_sampler": "shared_prefill", "shared_prefix": "always", "num_generations": 8},
        {
            "group_sampler": "shared_prefill",
            "shared_prefix": "always",
            "num_iterations": 2,
            "max_steps": 4,
            "beta": 0.1,
        },
        pytest.param(
            {"beta": 0.5, "reference": "streamed", "gradient_accumulation_steps": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["quantized-reference", "batch-scale", "split-groups", "reused-groups", "streamed"],
)
def test_two_processes_give_what_one_gives(
    tiny_model_dir: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    one, two = (
        launch(
            TRAIN,
            tmp_path,
            tiny_model_dir,
            tmp_path / f"out{processes}",
            8 // processes,
            json.dumps(options),
            processes=processes,
        )
        for processes in (1, 2)
    )
    assert one["completions"] == two["completions"]
    assert one["advantages"] == pytest.approx(two["advantages"], abs=1e-6)
    assert any(one["advantages"])
    for left, right in zip(one["history"], two["history"], strict=True):
        for key in left:
            assert left[key] == pytest.approx(right[key], rel=1e-3, abs=1e-5), key
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, two["weights"][name], atol=1e-5, rtol=1e-4)
    assert two["references"] == one["references"] * 2  # bit for bit, on each process
    quantized = options.get("reference") == "quantized"
    assert one["loads"] + two["loads"] == [0, 0, int(quantized)]  # one process calibrates


def test_two_processes_give_what_two_micro_batches_give(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    options = {"group_sampler": "shared_prefill", "shared_prefix": "always"}
    one, two = (
        launch(
            TRAIN,
            tmp_path,
            tiny_model_dir,
            tmp_path / f"out{processes}",
            4,
            json.dumps({**options, "gradient_accumulation_steps": 2 // processes}),
            processes=processes,
        )
        for processes in (1, 2)
    )
    assert one["completions"] == two["completions"]
    assert one["advantages"] == pytest.approx(two["advantages"], abs=1e-6)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, two["weights"][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "loads"),
    [
        ({"reference": "quantized", "ref_model_mixup_alpha": 1.0}, [0, 2]),
        pytest.param(
            {"reference": "streamed", "reference_on_disk": True, "save_strategy": "steps"},
            [0, 0],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["quantized", "on-disk"],
)
def test_two_processes_move_the_reference_to_the_same_place(
    tiny_model_dir: Path, tmp_path: Path, options: dict[str, Any], loads: list[int]
) -> None:
    options = {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 2, **options}
    options |= {"save_steps": 2}
    out = tmp_path / "out"
    two = launch(TRAIN, tmp_path, tiny_model_dir, out, 4, json.dumps(options), processes=2)
    first, second = two["references"]
    assert first == second
    assert two["loads"] == loads
    assert len(two["history"]) == 3


def test_two_processes_choose_the_same_reference_where_their_memory_differs(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    kinds = launch(CHOOSE, tmp_path, tiny_model_dir, tmp_path / "out", processes=2)
    assert kinds == ["resident", "resident"]  # of the first process


def test_a_quantized_reference_stays_whole_and_right_under_fsdp2(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    equal, whole, sharded, num_quantized = launch(
        SHARD, tmp_path, tiny_model_dir, tmp_path / "out", processes=2
    )
    assert equal
    assert whole
    assert sharded
    assert num_quantized == 14  # 7 linear layers in each of 2 layers


@pytest.mark.slow
def test_fsdp2_leaves_the_layers_of_a_streamed_reference_alone(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    equal, sharded = launch(SHARD_STREAMED, tmp_path, tiny_model_dir, tmp_path / "out", processes=2)
    assert equal
    assert sharded
