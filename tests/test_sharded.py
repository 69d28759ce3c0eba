"""Weights split over two processes, by FSDP2 or DeepSpeed, train as one process does.

accelerate takes FSDP on a GPU only; the script below lets it on a CPU, where gloo carries the same
collectives. What runs is the trainer, accelerate and ``fully_shard`` as they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

RUN = '''
import json, os, sys, warnings
warnings.filterwarnings("ignore")
model, out, kind, per_device, cases = *sys.argv[1:4], int(sys.argv[4]), json.loads(sys.argv[5])
if kind.startswith("fsdp2"):
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "false" if kind == "fsdp2-kept" else "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }
if kind.startswith("zero"):
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": kind[-1], "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    }
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from trl_grpo_ext import ConfigurationError, ExtGRPOConfig, ExtGRPOTrainer

set_up = AcceleratorState.__init__

def shard_on_a_cpu(self, *args, fsdp_plugin=None, **kwargs):
    """accelerate 1.15 reads the plugin on a GPU only."""
    set_up(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if kind.startswith("fsdp2") and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)

AcceleratorState.__init__ = shard_on_a_cpu

def digits(*, completions, **_):
    return [float(sum(c.isdigit() for c in text)) for text in completions]

def run(name, options):
    streams, resumes = options.pop("streams", False), options.pop("resumes", False)
    config = lambda: ExtGRPOConfig(
        f"{out}/{name}", use_cpu=True, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=per_device, per_device_eval_batch_size=per_device,
        max_completion_length=8, logging_steps=1, seed=3,
        gradient_checkpointing=False, save_strategy="steps" if resumes else "no", save_steps=2,
        **dict(num_generations=4, max_steps=2, group_sampler="shared_prefill", bf16=False,
               optim="sgd", learning_rate=1e-2) | options,
    )
    data = Dataset.from_dict({"prompt": [f"{a} + {a} =" for a in range(8)]})
    evaluated, data = data.select(range(4)), data.to_iterable_dataset() if streams else data
    try:
        trainer = ExtGRPOTrainer(model, digits, config(), data, eval_dataset=evaluated)
        trainer.train()
        if resumes:  # once more from its checkpoint
            checkpoint = f"{out}/{name}/checkpoint-2"
            given = checkpoint if resumes == "with its weights" else model
            trainer = ExtGRPOTrainer(given, digits, config(), data)
            trainer.train(resume_from_checkpoint=checkpoint)
    except (ConfigurationError, RuntimeError) as error:  # on each process
        return {"refused": str(error)}
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    keys = ("loss", "reward", "grad_norm", "eval_reward")
    return {
        "sampler": (trainer.group_sampler, trainer.group_sampler_reason),
        "sharded": hasattr(weight, "placements") or hasattr(weight, "ds_id"),
        "completions": list(trainer._logs["completion"]),
        "history": [{k: e[k] for k in keys if k in e} for e in trainer.state.log_history],
        "kl": [entry["kl"] for entry in trainer.state.log_history if "kl" in entry],
        "weights": trainer.accelerator.get_state_dict(trainer.model_wrapped),
    }

def gather():
    """Process 1 runs more passes than process 0, which would not end if they had to be in step."""
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM
    from trl_grpo_ext.sampling.gathered import gathered_weights
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    policy = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(20)[None]
    expected = policy(ids).logits
    expected.sum().backward()
    gradient = policy.model.layers[1].mlp.up_proj.weight.grad
    policy.zero_grad()
    for layer in policy.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(policy, mesh=mesh)
    weight = lambda: policy.model.layers[1].mlp.up_proj.weight
    whole, found = [hasattr(weight(), "placements")], []
    for _ in range(2):
        with gathered_weights(policy), torch.no_grad():
            for _ in range(1 + torch.distributed.get_rank()):
                found.append(torch.equal(policy(ids).logits, expected))
                whole.append(hasattr(weight(), "placements"))
        whole.append(hasattr(weight(), "placements"))
    logits = policy(ids).logits
    whole.append(hasattr(weight(), "placements"))
    logits.sum().backward()
    same = torch.allclose(weight().grad.full_tensor(), gradient, atol=1e-5)
    found = [None, (whole, found, same)]
    torch.distributed.broadcast_object_list(found, src=1)
    return found[1]

found = {name: run(name, options) for name, options in cases.items()}
if kind == "fsdp2":
    found["gather"] = gather()
if os.environ.get("RANK", "0") == "0":
    torch.save(found, out + ".pt")
if torch.distributed.is_initialized():
    torch.distributed.barrier()  # nobody is gone while another one still talks to it
    torch.distributed.destroy_process_group()
'''

MOVES = {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 3}
RESUMES = {
    "resumes": True,
    "optim": "adamw_torch",  # under FSDP2 torch loads no state of SGD, which has none
    "adam_epsilon": 1e-2,  # or the signs of gradients that are all rounding would count
}
CASES: dict[str, dict[str, Any]] = {
    "split-groups": {"num_generations": 8, "beta": 0.1},
    "reused-groups": {"gradient_accumulation_steps": 2, "num_iterations": 2, "beta": 0.1},
    "quantized": {"reference": "quantized", "reference_calibration_tokens": 300, "beta": 0.5},
    "streamed": {"reference": "streamed", "gradient_accumulation_steps": 2, "beta": 0.5},
    "resident": {
        "reference": "resident",
        "beta": 0.5,
        "max_steps": 3,
        **RESUMES,
        "resumes": "with its weights",
    },
    "mixes": {"reference": "resident", "ref_model_mixup_alpha": 0.6, **MOVES, **RESUMES},
    "moves": {"reference": "streamed", "ref_model_mixup_alpha": 0.6, **MOVES, **RESUMES},
    "follows": {
        "reference": "quantized",
        "reference_calibration_tokens": 300,
        "ref_model_mixup_alpha": 1.0,
        **MOVES,
        **RESUMES,
    },
    "streams": {"streams": True, "gradient_accumulation_steps": 2},
    "evaluates": {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
}
HALF: dict[str, dict[str, Any]] = {
    f"half-{kind}": {"reference": kind, "beta": 0.5, "bf16": True, "learning_rate": 0.1}
    for kind in ("quantized", "streamed", "resident")
}
AUTO = {"group_sampler": "auto"}
NOT_GATHERED = {"ds3_gather_for_generation": False}
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs deepspeed; docs/processes.md has what it showed"
)


def launch(kind: str, model: Path, folder: Path, cases: dict[str, Any]) -> dict[str, Any]:
    """Run the cases one after the other, in one process if nothing is sharded, else in two."""
    script = folder / "script.py"
    script.write_text(RUN)
    processes = 1 if kind == "none" else 2
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    given = (script, model, folder / kind, kind, 8 // processes, json.dumps(cases))
    done = subprocess.run(
        [sys.executable, *(torchrun if processes == 2 else []), *map(str, given)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = torch.load(folder / f"{kind}.pt", weights_only=False)
    return found


@pytest.fixture(scope="module")
def one(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch("none", tiny_model_dir, tmp_path_factory.mktemp("one"), CASES)


@pytest.fixture(scope="module")
def fsdp2(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = CASES | HALF | {"auto": AUTO}
    return launch("fsdp2", tiny_model_dir, tmp_path_factory.mktemp("fsdp2"), cases)


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def zero(
    request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any]]:
    kind = str(request.param)
    cases = CASES | HALF | {"auto": AUTO, "in-step": AUTO | NOT_GATHERED, "refused": NOT_GATHERED}
    return kind, launch(kind, tiny_model_dir, tmp_path_factory.mktemp(kind), cases)


def assert_same_training(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert two["completions"] == one["completions"]
    for left, right in zip(one["history"], two["history"], strict=True):
        assert right == pytest.approx(left, rel=1e-3, abs=1e-5)
    assert any(entry.get("grad_norm", 0.0) > 0.1 for entry in one["history"])
    for name, weight in one["weights"].items():
        if name in two["weights"]:  # DeepSpeed keeps a tied weight once
            torch.testing.assert_close(weight, two["weights"][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_fsdp2_gives_what_one_process_gives(
    one: dict[str, Any], fsdp2: dict[str, Any], case: str
) -> None:
    assert fsdp2[case].get("refused") is None
    assert (one[case]["sharded"], fsdp2[case]["sharded"]) == (False, True)
    assert_same_training(one[case], fsdp2[case])


def test_a_reference_moves_that_fsdp2_keeps_whole_between_passes(
    one: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    cases = {case: CASES[case] for case in ("mixes", "follows", "moves")}
    two = launch("fsdp2-kept", tiny_model_dir, tmp_path, cases)
    for case in cases:
        assert two[case].get("refused") is None
        assert_same_training(one[case], two[case])


def test_sampling_is_left_to_trl_under_fsdp2_unless_gathering_is_asked_for(
    fsdp2: dict[str, Any],
) -> None:
    assert fsdp2["split-groups"]["sampler"] == ("shared_prefill", "as configured")
    sampler, reason = fsdp2["auto"]["sampler"]
    assert sampler == "transformers"
    assert "`group_sampler: shared_prefill` would gather them on each" in reason


def test_gathered_weights_need_no_other_process_and_are_split_again(fsdp2: dict[str, Any]) -> None:
    sharded, equal, same_gradient = fsdp2["gather"]  # of process 1, which runs two passes
    around, inside = [True], [False, False]
    assert sharded == [*around, *inside, *around, *inside, *around, *around]
    assert equal == [True] * 4
    assert same_gradient


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_zero_gives_what_one_process_gives(
    one: dict[str, Any], zero: tuple[str, dict[str, Any]], case: str
) -> None:
    kind, two = zero
    assert two[case].get("refused") is None
    assert two[case]["sharded"] == (kind == "zero3")
    assert_same_training(one[case], two[case])


@pytest.mark.parametrize("case", HALF)
def test_fsdp2_trains_in_bfloat16_with_a_reference_of_ours(
    fsdp2: dict[str, Any], case: str
) -> None:
    assert_moves_away(fsdp2[case])


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("case", HALF)
def test_zero_trains_in_bfloat16_with_a_reference_of_ours(
    zero: tuple[str, dict[str, Any]], case: str
) -> None:
    assert_moves_away(zero[1][case])


def assert_moves_away(found: dict[str, Any]) -> None:
    """The policy is the reference, and moves away from it."""
    assert found.get("refused") is None
    first, last = found["kl"]
    assert abs(first) < abs(last) < 0.1


@needs_deepspeed
@pytest.mark.slow
def test_zero_3_samples_in_step_unless_it_gathers(zero: tuple[str, dict[str, Any]]) -> None:
    kind, found = zero
    assert found["auto"]["sampler"][0] == "shared_prefill"
    if kind == "zero3":
        assert found["in-step"]["sampler"][0] == "transformers"
        assert "(`ds3_gather_for_generation` is false)" in found["refused"]["refused"]
