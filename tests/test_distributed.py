"""Two processes give what one gives: same completions, so same advantages, loss and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch

SCRIPT = '''
import json, logging, os, sys, types, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
import psutil, torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.layerwise import decoder_layers, run_layerwise
from trl_grpo_ext.reference import (
    QuantizedLinear, build_reference, build_streamed_reference, streamed_layers,
)
from trl_grpo_ext.reference import KLPenalty
from trl_grpo_ext.reference.keeper import ReferenceKeeper
from trl_grpo_ext.reference.options import ReferenceSettings
from trl_grpo_ext.reference.sharing import of_main
from trl_grpo_ext.reference.store import ReferenceStore, fingerprint

told = []
handler = logging.Handler()
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger("trl_grpo_ext").addHandler(handler)
logging.getLogger("trl_grpo_ext").setLevel(logging.INFO)

model, out, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
several = int(sys.argv[4]) > 1

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

def trainer_of(name, options):
    disk = os.environ["RANK"] if name.endswith("apart") else ""
    config = ExtGRPOConfig(
        f"{out}/{name}{disk}", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
        max_completion_length=8, learning_rate=1e-2, optim="sgd", logging_steps=1, seed=3,
        gradient_checkpointing=False,
        **{"num_generations": 4, "max_steps": 3, "save_strategy": "no", **options},
    )
    dataset = Dataset.from_dict({"prompt": [f"{a} + {a} =" for a in range(8)]})
    given = {"rollout_func": rollout} if config.group_sampler == "transformers" else {}
    return ExtGRPOTrainer(model, digits, config, dataset, **given)

def train(name, options):
    told.clear()
    trainer = trainer_of(name, options)
    trainer.train()
    reference = trainer.ref_model or torch.nn.Module()
    parts = [reference, *(layer.host for layer in streamed_layers(reference))]
    held = {f"{i} {k}": b for i, part in enumerate(parts) for k, b in part.named_buffers()}
    held |= {f"{i} {k}": p for i, part in enumerate(parts) for k, p in part.named_parameters()}
    bits = fingerprint(torch.nn.ParameterDict({
        k.replace(".", "/"): torch.nn.Parameter(t, requires_grad=False) for k, t in held.items()
    }))
    keys = ("loss", "reward", "kl", "grad_norm", "frac_reward_zero_std")
    return {
        "history": [{k: e[k] for k in keys if k in e} for e in trainer.state.log_history[:3]],
        "weights": trainer.accelerator.unwrap_model(trainer.model).state_dict(),
        "advantages": list(trainer._logs["advantages"]),
        "completions": list(trainer._logs["completion"]),
        "references": gather_object([bits]),
        "loads": gather_object([sum("reference: loaded" in text for text in told)]),
        "sent": gather_object([sum("reference: sent" in text for text in told)]),
        "fidelity": gather_object([trainer.reference_keeper and trainer.reference_keeper.fidelity]),
    }

def resume_apart(kind):
    """The run that is resumed had saved another reference, on the disk of the main process."""
    rank = torch.distributed.get_rank()
    keeper = ReferenceKeeper(
        ReferenceSettings(kind=kind, compensation="none"), sample=None, penalty=KLPenalty(),
        store=ReferenceStore(Path(f"{out}-resumed-{kind}-{rank}") / "reference"),
    )
    policy = AutoModelForCausalLM.from_pretrained(model)
    first = keeper.build(policy)
    waited = keeper.waits
    keeper.share(first, device=torch.device("cpu"))
    if rank == 0:
        keeper.save(first)
    key = of_main(keeper.key)
    with torch.no_grad():
        policy.model.layers[0].mlp.up_proj.weight.add_(1)
    other = keeper.build(policy)
    keeper.share(other, device=torch.device("cpu"))
    ids = torch.arange(20)[None]
    moved = not torch.equal(first(ids).logits, other(ids).logits)
    keeper.resume(keeper.store.root.parent / "checkpoint-2", key, other, device=torch.device("cpu"))
    same = torch.equal(first(ids).logits, other(ids).logits)
    return gather_object([(waited, moved, same, keeper.key == key)])

def choose():
    measured = psutil.virtual_memory
    memory = types.SimpleNamespace(available=(10**12, 400_000)[torch.distributed.get_rank()])
    psutil.virtual_memory = lambda: memory
    options = {"beta": 0.1, "per_device_train_batch_size": 4}
    kinds = gather_object([trainer_of("choose", options).reference_kind])
    psutil.virtual_memory = measured
    return kinds

def shard(model):
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

@torch.no_grad()
def shard_quantized():
    reference = build_reference(AutoModelForCausalLM.from_pretrained(model))
    ids = torch.arange(20)[None]
    expected = reference(ids).logits
    shard(reference)
    found = reference(ids).logits
    kept = [m for m in reference.modules() if isinstance(m, QuantizedLinear)]
    whole = all(not hasattr(buffer, "placements") for m in kept for buffer in m.buffers())
    norms = [p for layer in reference.model.layers for p in layer.parameters()]
    sharded = all(hasattr(parameter, "placements") for parameter in norms)
    return torch.equal(expected, found), whole, sharded, len(kept)

@torch.no_grad()
def shard_streamed():
    reference = build_streamed_reference(AutoModelForCausalLM.from_pretrained(model))
    batches = [torch.arange(20)[None], torch.arange(5, 30)[None]]
    passes = [lambda ids=ids: reference(ids).logits for ids in batches]
    expected = [run() for run in passes]
    shard(reference)
    found = run_layerwise(list(decoder_layers(reference)), passes)
    return (
        all(map(torch.equal, expected, found)),
        hasattr(reference.model.embed_tokens.weight, "placements"),
    )

found = {name: train(name, options) for name, options in cases.items()}
if several:
    found |= {"choose": choose(), "shard-quantized": shard_quantized()}
    found |= {"shard-streamed": shard_streamed(), "resume-apart": [
        resume_apart(kind) for kind in ("quantized", "resident", "streamed")
    ]}
if not several or torch.distributed.get_rank() == 0:
    torch.save(found, out + ".pt")
if torch.distributed.is_initialized():
    torch.distributed.barrier()  # nobody is gone while another one still talks to it
    torch.distributed.destroy_process_group()
'''

CASES: dict[str, dict[str, Any]] = {
    "quantized-reference": {
        "beta": 0.5,
        "reference": "quantized",
        "reference_calibration_tokens": 500,
        "kl_clamp": 10.0,
        "loss_type": "dapo",
        "group_sampler": "transformers",
    },
    "batch-scale": {
        "advantage_baseline": "leave_one_out",
        "scale_rewards": "batch",
        "loss_type": "grpo",
        "group_sampler": "transformers",
    },
    "split-groups": {
        "group_sampler": "shared_prefill",
        "shared_prefix": "always",
        "num_generations": 8,
    },
    "reused-groups": {
        "group_sampler": "shared_prefill",
        "shared_prefix": "always",
        "num_iterations": 2,
        "max_steps": 4,
        "beta": 0.1,
    },
    "streamed": {"beta": 0.5, "reference": "streamed", "gradient_accumulation_steps": 2},
}
MICRO_BATCHES = {"group_sampler": "shared_prefill", "shared_prefix": "always"}
MOVES = {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 2, "save_steps": 2}
MOVING: dict[str, dict[str, Any]] = {
    "moves-quantized": {"reference": "quantized", "ref_model_mixup_alpha": 1.0, **MOVES},
    "moves-quantized-apart": {"reference": "quantized", "ref_model_mixup_alpha": 1.0, **MOVES},
    "moves-on-disk": {
        "reference": "streamed",
        "reference_on_disk": True,
        "save_strategy": "steps",
        **MOVES,
    },
}


def run_cases(
    model: Path, folder: Path, cases: dict[str, dict[str, Any]], *, processes: int
) -> dict[str, Any]:
    """Run the cases one after the other, in so many processes; return what each gave."""
    given = (model, folder / "out", json.dumps(cases), processes)
    found: dict[str, Any] = launch(SCRIPT, folder, *given, processes=processes)
    return found


def cases_of(processes: int) -> dict[str, dict[str, Any]]:
    """The same rows for one process and for two."""
    of_8 = {name: {"per_device_train_batch_size": 8 // processes, **CASES[name]} for name in CASES}
    steps = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2 // processes}
    return {**of_8, "micro-batches": {**steps, **MICRO_BATCHES}}


@pytest.fixture(scope="module")
def one(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases(tiny_model_dir, tmp_path_factory.mktemp("one"), cases_of(1), processes=1)


@pytest.fixture(scope="module")
def two(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    moving = {name: {"per_device_train_batch_size": 4, **MOVING[name]} for name in MOVING}
    cases = cases_of(2) | moving
    return run_cases(tiny_model_dir, tmp_path_factory.mktemp("two"), cases, processes=2)


def assert_same_samples_and_weights(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["completions"] == two["completions"]
    assert one["advantages"] == pytest.approx(two["advantages"], abs=1e-6)
    assert any(one["advantages"])
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, two["weights"][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_one_gives(
    one: dict[str, Any], two: dict[str, Any], case: str
) -> None:
    left, right = one[case], two[case]
    assert_same_samples_and_weights(left, right)
    for entry, other in zip(left["history"], right["history"], strict=True):
        for key in entry:
            assert entry[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
    assert right["references"] == left["references"] * 2  # bit for bit, on each process
    quantized = CASES[case].get("reference") == "quantized"
    assert left["loads"] + right["loads"] == [0, 0, int(quantized)]  # one process calibrates


def test_two_processes_give_what_two_micro_batches_give(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    assert_same_samples_and_weights(one["micro-batches"], two["micro-batches"])


@pytest.mark.parametrize(
    ("case", "loads"), [("moves-quantized", [0, 2]), ("moves-on-disk", [0, 0])]
)
def test_two_processes_move_the_reference_to_the_same_place(
    two: dict[str, Any], case: str, loads: list[int]
) -> None:
    first, second = two[case]["references"]
    assert first == second
    assert two[case]["loads"] == loads
    assert len(two[case]["history"]) == 3


def test_a_process_without_the_main_ones_disk_is_sent_its_reference(two: dict[str, Any]) -> None:
    apart, together = two["moves-quantized-apart"], two["moves-quantized"]
    assert apart["references"] == together["references"]
    assert apart["loads"] == [0, 0]
    assert (apart["sent"], together["sent"]) == ([0, 2], [0, 0])
    assert apart["fidelity"] == together["fidelity"]
    assert apart["fidelity"][0] is not None
    assert apart["history"] == together["history"]


def test_what_the_main_process_resumes_is_sent_too(two: dict[str, Any]) -> None:
    quantized, *exact = two["resume-apart"]
    assert quantized == [(False, True, True, True), (True, True, True, True)]
    assert exact == [[(False, True, True, True)] * 2] * 2


def test_two_processes_choose_the_same_reference_where_their_memory_differs(
    two: dict[str, Any],
) -> None:
    assert two["choose"] == ["resident", "resident"]  # of the first process


def test_a_quantized_reference_stays_whole_and_right_under_fsdp2(two: dict[str, Any]) -> None:
    equal, whole, sharded, num_quantized = two["shard-quantized"]
    assert equal
    assert whole
    assert sharded
    assert num_quantized == 14  # 7 linear layers in each of 2 layers


def test_fsdp2_leaves_the_layers_of_a_streamed_reference_alone(two: dict[str, Any]) -> None:
    equal, sharded = two["shard-streamed"]
    assert equal
    assert sharded
