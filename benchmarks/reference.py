"""How far is each kind of reference from the exact one, and what does it take?

    python benchmarks/reference.py                             # every arm, one by one
    python benchmarks/reference.py --arms nf4 nf4_rank32 --json    # two; its last line is JSON
    python benchmarks/reference.py --plot docs/images/reference_frontier.png

The policy is SmolLM2-135M-Instruct; completions are its own, of grade-school problems. Each arm is
built, calibrated on some of them and measured on others: bytes, KL floor, gradient cosine, seconds
to build, seconds of log-probs against the resident reference. With `--cache` the completions and
the result of each arm are kept in a folder, so that a run that was ended goes on from there.

The arms of the package are `resident`, `streamed` and those of ``PACKAGE``; the others stand in
reference_methods.py. What was measured, and on what, stands in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import reasoning_gym
import torch
from reference_methods import METHODS
from reference_plot import plot
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_grpo_ext import group_sample
from trl_grpo_ext import reference as reference_package
from trl_grpo_ext.cpu_linear import use_onednn
from trl_grpo_ext.losses import kl_estimate, masked_mean
from trl_grpo_ext.model_cache import prepare_model
from trl_grpo_ext.reference import (
    CompletionBatch,
    KLPenalty,
    QuantizedLinear,
    build_reference,
    build_streamed_reference,
    calibrate,
    calibrate_mixed,
    completion_batches,
    distill,
    streamed_layers,
    summarize_reference,
)
from trl_grpo_ext.reference.build import EmbeddingQuantization
from trl_grpo_ext.reference.completions import completion_logits
from trl_grpo_ext.reference.layer_stream import StreamedLayer
from trl_grpo_ext.reference.mixed import bytes_within
from trl_grpo_ext.reference.options import DEFAULT_RANK, Compensation, ReferenceSettings
from trl_grpo_ext.reference.quantized import QuantizationType

PACKAGED = "smollm2-135m"
MAX_NEW_TOKENS = 128
MAX_BATCH_TOKENS = 1024
SAMPLED_AT_A_TIME = 32
KL_TARGET = 0.01  # nats a token: how far the policy has drifted where gradients are compared
SETTINGS = ("model", "task", "dtype", "device", "calibration_tokens", "heldout_tokens")


@dataclass(frozen=True)
class Stored:
    """A quantized reference by the package's options.

    Attributes:
        quantization: Of the linear layers.
        compensation: ``"none"``, ``"rounding"`` (error feedback), ``"mixed"`` (and layers in 8
            bits) or ``"low_rank"`` (and factors).
        rank: Of the factors; the bytes of such factors are what ``"mixed"`` takes.
        bits: That ``"mixed"`` takes instead.
        distillation_steps: That the factors are trained for.
        embedding_quantization: Of embedding and LM head.
    """

    quantization: QuantizationType = "nf4"
    compensation: Compensation = "low_rank"
    rank: int = 0
    distillation_steps: int = 0
    embedding_quantization: EmbeddingQuantization | None = None
    bits: float | None = None

    @classmethod
    def by_default(cls) -> Stored:
        """Return what the package's defaults are."""
        settings = ReferenceSettings()
        return cls(
            settings.quantization,
            settings.compensation,
            settings.storage.rank,
            settings.distillation_steps,
            settings.embedding_quantization,
        )

    def build(self, policy: PreTrainedModel, batches: Sequence[CompletionBatch]) -> PreTrainedModel:
        """Return the reference, calibrated on these completions."""
        bars = sys.stderr.isatty()
        reference = build_reference(
            policy,
            quantization=self.quantization,
            embedding_quantization=self.embedding_quantization,
        )
        use_onednn(reference)
        if self.compensation == "mixed":
            calibrate_mixed(reference, policy, batches, bits=self.bits, progress=bars)
        elif self.compensation != "none":
            calibrate(reference, policy, batches, rank=self.rank, progress=bars)
        if self.distillation_steps:
            distill(reference, policy, batches, num_steps=self.distillation_steps, progress=bars)
        return reference


PACKAGE = {
    "nf4": Stored(compensation="none"),
    "nf4_mixed": Stored(compensation="mixed", rank=DEFAULT_RANK),
    "nf4_rounded": Stored(compensation="rounding"),
    "int8": Stored(quantization="int8", compensation="none"),
    "nf4_mixed_4.5": Stored(compensation="mixed", bits=4.51),
    "nf4_mixed_4.9": Stored(compensation="mixed", bits=4.88),
    "nf4_mixed_7.1": Stored(compensation="mixed", bits=7.09),
    "nf4_mixed_embeddings8": Stored(
        compensation="mixed", rank=DEFAULT_RANK, embedding_quantization="int8"
    ),
    "nf4_rank8": Stored(rank=8),
    "nf4_rank16": Stored(rank=16),
    "nf4_rank32": Stored(rank=32),
    "nf4_rank64": Stored(rank=64),
    "nf4_rank32_distilled": Stored(rank=32, distillation_steps=60),
    "int8_rounded": Stored(quantization="int8", compensation="rounding"),
    "fp4": Stored(quantization="fp4", compensation="none"),
}
ARMS = ("nf4", "resident", "streamed", *(name for name in PACKAGE if name != "nf4"), *METHODS)


def default_arm() -> str:
    """Return the name of the arm that the package's defaults make."""
    return next(name for name, stored in PACKAGE.items() if stored == Stored.by_default())


def build_arm(
    name: str, policy: PreTrainedModel, batches: Sequence[CompletionBatch]
) -> PreTrainedModel:
    """Return the reference of an arm."""
    if name == "resident":
        return build_reference(policy, kind="resident")
    if name == "streamed":
        return build_streamed_reference(policy)
    if name in PACKAGE:
        return PACKAGE[name].build(policy, batches)
    return METHODS[name](policy, batches, Stored.by_default().rank)


# Completions --------------------------------------------------------------------------------------

Row = tuple[list[int], list[int]]  # tokens of a prompt, and of the policy's completion


def completions(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> tuple[list[Row], list[Row]]:
    """Return rows to calibrate on, and rows to measure on; no question is in both."""
    path = options.cache / "completions.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    rows: list[Row] = kept.setdefault(f"{options.model} {options.task} {options.dtype}", [])
    while (parts := split(rows, options)) is None:
        indices = range(len(rows), len(rows) + SAMPLED_AT_A_TIME)
        questions = itertools.islice(distinct_questions(options.task), indices.start, indices.stop)
        samples = group_sample(
            policy,
            tokenizer,
            [[{"role": "user", "content": question}] for question in questions],
            num_generations=1,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=0,
            prompt_indices=indices,
        )
        rows += zip(samples.prompt_ids, samples.completion_ids, strict=True)
        path.write_text(json.dumps(kept))
        print(f"sampled {len(rows)} completions", flush=True)
    return parts


def distinct_questions(task: str) -> Iterator[str]:
    """Return the questions of a task of reasoning_gym, each once."""
    seen = set()
    for item in reasoning_gym.create_dataset(task, seed=0, size=10_000):
        if item["question"] not in seen:
            seen.add(item["question"])
            yield item["question"]


def split(rows: Sequence[Row], options: argparse.Namespace) -> tuple[list[Row], list[Row]] | None:
    """Return rows to calibrate and to measure on, or None if there are too few.

    The held-out ones come first: they are the same for any number of calibration tokens.
    """
    heldout: list[Row] = []
    calibration: list[Row] = []
    for row in rows:
        if sum(len(completion) for _, completion in heldout) < options.heldout_tokens:
            heldout.append(row)
        elif num_tokens(calibration) < options.calibration_tokens:
            calibration.append(row)
    enough = num_tokens(calibration) >= options.calibration_tokens
    return (calibration, heldout) if enough else None


def num_tokens(rows: Sequence[Row]) -> int:
    """Return the tokens of prompts and completions."""
    return sum(len(prompt) + len(completion) for prompt, completion in rows)


# What is measured ---------------------------------------------------------------------------------


class Yardstick:
    """The exact side of each comparison, computed once for all arms.

    It measures what `trl_grpo_ext.reference.fidelity.measure_fidelity` does over all parameters.

    Args:
        policy: In evaluation mode.
        batches: Completions that no arm was calibrated on.
    """

    def __init__(self, policy: PreTrainedModel, batches: Sequence[CompletionBatch]) -> None:
        self.policy, self.batches = policy, batches
        self.num_tokens = sum(batch.num_completion_tokens for batch in batches)

    def measure(self, reference: PreTrainedModel) -> dict[str, float]:
        """Return floors, agreement and gradient cosine of a reference."""
        totals, found = torch.zeros(4, dtype=torch.float64), []
        for batch, exact_BTV in zip(self.batches, self.exact_all, strict=True):
            with torch.no_grad():
                found_BTV = all_logprobs(reference, batch)
            exact_BT, found_BT = of_labels(exact_BTV, batch), of_labels(found_BTV, batch)
            per_token = (
                kl_estimate(exact_BT, found_BT, estimator="k1"),
                kl_estimate(exact_BT, found_BT, estimator="k3"),
                (exact_BTV.exp() * (exact_BTV - found_BTV)).sum(-1),
                exact_BTV.argmax(-1) == found_BTV.argmax(-1),
            )
            found.append(found_BT)
            totals += torch.stack([(x * batch.mask_BT).sum().double().cpu() for x in per_token])
        names = ("kl_k1", "kl_k3", "kl_full", "top_token_agreement")
        means = dict(zip(names, (totals / self.num_tokens).tolist(), strict=True))
        return {**means, "gradient_cosine": cosine(self.exact_pull, self.pull(found))}

    def pull(self, ref_logprobs: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient of the KL penalty on the drifted policy, all parameters."""
        penalty = KLPenalty()
        return self.gradient(
            self.drifted,
            lambda i, logprobs_BT: penalty(logprobs_BT, ref_logprobs[i], self.batches[i].mask_BT),
        )

    @cached_property
    def exact_all(self) -> list[Tensor]:
        """Log-probabilities of the policy, shape ``(B, T, V)`` each."""
        with torch.no_grad():
            return [all_logprobs(self.policy, batch) for batch in self.batches]

    @cached_property
    def exact(self) -> list[Tensor]:
        """Those of the completion tokens, shape ``(B, T)`` each."""
        return list(map(of_labels, self.exact_all, self.batches))

    @cached_property
    def exact_pull(self) -> list[Tensor]:
        """The gradient of the penalty with the exact reference."""
        return self.pull(self.exact)

    @cached_property
    def drifted(self) -> PreTrainedModel:
        """The policy after a step along random advantages, ``KL_TARGET`` away by k3."""
        drifted = copy.deepcopy(self.policy).requires_grad_(True)
        direction = self.gradient(drifted, self.push)
        start = [p.detach().clone() for p in drifted.parameters()]
        scale = 0.01 * norm(start) / norm(direction)
        kl = 0.0
        while abs(kl / KL_TARGET - 1) > 0.1:
            with torch.no_grad():
                for p, origin, d in zip(drifted.parameters(), start, direction, strict=True):
                    p.copy_(origin - scale * d)
            kl = self.mean_k3(drifted)
            # It grows with the square of the step.
            scale *= min(max(math.sqrt(KL_TARGET / max(kl, 1e-12)), 0.1), 10.0)
        return drifted

    def push(self, index: int, logprobs_BT: Tensor) -> Tensor:
        """Return a policy-gradient loss: completions in turn get the advantages 1 and -1."""
        places_B = index + torch.arange(len(logprobs_BT), device=logprobs_BT.device)
        signs_B = 1.0 - 2.0 * (places_B % 2)
        return -masked_mean(logprobs_BT * signs_B[:, None], self.batches[index].mask_BT)

    @torch.no_grad()
    def mean_k3(self, model: PreTrainedModel) -> float:
        """Return the mean k3 of a model to the policy, nats a token."""
        total = 0.0
        for batch, exact_BT in zip(self.batches, self.exact, strict=True):
            logprobs_BT = of_labels(all_logprobs(model, batch), batch)
            total += float(kl_estimate(logprobs_BT, exact_BT, estimator="k3").sum())
        return total / self.num_tokens

    def gradient(
        self, model: PreTrainedModel, loss: Callable[[int, Tensor], Tensor]
    ) -> list[Tensor]:
        """Return that of a loss's mean over all tokens, but for a factor."""
        parameters = list(model.parameters())
        totals = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        for index, batch in enumerate(self.batches):
            mean = loss(index, of_labels(all_logprobs(model, batch), batch))
            grads = torch.autograd.grad(mean * batch.num_completion_tokens, parameters)
            for total, grad in zip(totals, grads, strict=True):
                total += grad
        return totals


def all_logprobs(model: PreTrainedModel, batch: CompletionBatch) -> Tensor:
    """Return log-probabilities over the vocabulary, shape ``(B, T, V)``."""
    return completion_logits(model, batch).float().log_softmax(dim=-1)


def of_labels(logprobs_BTV: Tensor, batch: CompletionBatch) -> Tensor:
    """Return those of the completion tokens, shape ``(B, T)``; 0 on padding."""
    return logprobs_BTV.gather(-1, batch.labels_BT[..., None])[..., 0] * batch.mask_BT


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the norm of all of them together."""
    return math.sqrt(sum(float(tensor.float().square().sum()) for tensor in tensors))


def cosine(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the cosine between them, all together."""
    dot = sum(float((a * b).sum()) for a, b in zip(left, right, strict=True))
    return dot / (norm(left) * norm(right))


def sizes(reference: PreTrainedModel) -> dict[str, float]:
    """Return the bytes on the device; weights that are not quantized count 16 bits each.

    A streamed reference has two layers there at a time.
    """
    summary = summarize_reference(reference)
    num_bytes = summary.quantized_bytes + 2 * (summary.num_parameters - summary.num_quantized)
    num_parameters = summary.num_parameters
    linears = [m for m in reference.modules() if isinstance(m, QuantizedLinear)]
    num_weights = sum(linear.num_weights for linear in linears)
    layer_bytes = sum(linear.num_bytes for linear in linears)
    streamed = [
        sum(p.numel() for p in layer.host.parameters()) for layer in streamed_layers(reference)
    ]
    if streamed:
        num_weights, layer_bytes = sum(streamed), 2 * 2 * max(streamed)
        num_parameters, num_bytes = num_parameters + num_weights, num_bytes + layer_bytes
    elif not linears:
        num_weights, layer_bytes = num_parameters, num_bytes
    return {
        "bytes": num_bytes,
        "bytes_ratio": num_bytes / (2 * num_parameters),
        "layer_bytes": layer_bytes,
        "layer_bytes_ratio": layer_bytes / (2 * num_weights),
        "bits_per_weight": 8 * layer_bytes / num_weights if linears else 16.0,
    }


@torch.no_grad()
def timings(
    reference: PreTrainedModel, policy: PreTrainedModel, batch: CompletionBatch
) -> dict[str, float]:
    """Return the seconds of log-probs of a batch, against those of the policy, in turn with it.

    Of a streamed reference also those of its copies alone, and how much of the shorter of the two,
    copies or compute, the longer one hides: 1 for all of it, 0 for none.
    """
    seconds: dict[PreTrainedModel, list[float]] = {policy: [], reference: []}
    for repeat in range(4):
        for model, found in seconds.items():
            start = now()
            of_labels(all_logprobs(model, batch), batch)
            if repeat:  # the first one is a warm-up
                found.append(now() - start)
    ours, exact = statistics.median(seconds[reference]), statistics.median(seconds[policy])
    timed = {"logprob_seconds": ours, "resident_seconds": exact, "logprob_ratio": ours / exact}
    if layers := streamed_layers(reference):
        copies = copy_seconds(layers, device=policy.device)
        timed |= {
            "streamed_bytes_per_second": layers[0].stream.host_bytes / ours,
            "copy_seconds": copies,
            "copy_overlap": (copies + exact - ours) / min(copies, exact),
        }
    return timed


def copy_seconds(layers: Sequence[StreamedLayer], *, device: torch.device) -> float:
    """Return the seconds of bringing all layers to the device, with nothing to compute."""
    stream, seconds = layers[0].stream, []
    for _ in range(3):
        stream.forget()
        start = now()
        for index in range(len(layers)):
            stream.weights(index, device=device)
        seconds.append(now() - start)
    return statistics.median(seconds)


def now() -> float:
    """Return the time in seconds, when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_gpu_bytes() -> dict[str, int]:
    """Return the peak since the last call, where there is a GPU."""
    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return {"peak_gpu_bytes": peak}


# The arms -----------------------------------------------------------------------------------------


class Benchmark:
    """The policy with its completions, and what was found.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.settings = {key: str(getattr(options, key)) for key in SETTINGS}
        self.settings["code"] = code_hash()
        options.cache.mkdir(parents=True, exist_ok=True)
        folder = options.model
        if folder == PACKAGED:
            folder = prepare_model("HuggingFaceTB/SmolLM2-135M-Instruct", source="package")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        policy = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
        self.policy: PreTrainedModel = policy.to(options.device).requires_grad_(True).eval()
        use_onednn(self.policy)
        calibration, heldout = completions(self.policy, tokenizer, options)
        self.calibration, self.heldout = self.batches(calibration), self.batches(heldout)
        self.yardstick = Yardstick(self.policy, self.heldout)

    def batches(self, rows: Sequence[Row]) -> list[CompletionBatch]:
        """Return batches of these rows on the device."""
        prompts, answers = zip(*rows, strict=True)
        return completion_batches(
            prompts, answers, max_tokens=MAX_BATCH_TOKENS, device=self.options.device
        )

    def result(self, name: str) -> dict[str, float]:
        """Return what an arm shows, from the cache if it has the same settings and code."""
        path = self.options.cache / f"{name}.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("settings") != self.settings:
            kept = {"settings": self.settings, "result": self.measured(name)}
            path.write_text(json.dumps(kept))
        found: dict[str, float] = kept["result"]
        return found

    def measured(self, name: str) -> dict[str, float]:
        """Build an arm and measure it."""
        print(f"{name} ...", flush=True)
        start = now()
        reference = build_arm(name, self.policy, self.calibration)
        build_seconds = now() - start
        build_peak = peak_gpu_bytes()
        timed = timings(reference, self.policy, max(self.heldout, key=lambda b: b.mask_BT.numel()))
        return {
            **sizes(reference),
            "build_seconds": build_seconds,
            **{f"build_{key}": value for key, value in build_peak.items()},
            **timed,
            **peak_gpu_bytes(),
            **self.yardstick.measure(reference),
        }


def code_hash() -> str:
    """Return a hash of the code that the figures depend on, so that no other code's are kept."""
    digest = hashlib.sha256()
    for path in (*sorted(Path(reference_package.__file__).parent.rglob("*.py")), Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def layer_ratio(width: int) -> float:
    """Return the bytes that square layers take by default, over those in bfloat16."""
    linear = QuantizedLinear(torch.randn(width, width))
    return bytes_within(linear, None) / (2 * linear.num_weights)


def main() -> None:
    """Run the arms that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--model", default=PACKAGED, help="a folder with model and tokenizer")
    parser.add_argument("--task", default="gsm_symbolic", help="of reasoning_gym")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--heldout-tokens", type=int, default=1500, help="of completions")
    parser.add_argument("--cache", type=Path, default=Path("outputs/reference"), help="a folder")
    parser.add_argument("--plot", type=Path, help="write the frontier to this PNG")
    parser.add_argument("--json", action="store_true", help="print the result as the last line")
    options = parser.parse_args()
    torch.manual_seed(0)
    benchmark = Benchmark(options)
    arms = list(dict.fromkeys(["nf4", *options.arms]))  # the floors are shares of plain NF4's
    kinds: dict[str, dict[str, float]] = {}
    for name in arms:
        kinds[name] = benchmark.result(name)
        kinds[name]["floor_ratio"] = kinds[name]["kl_k3"] / kinds["nf4"]["kl_k3"]
        print(line(name, kinds[name]), flush=True)
    result = {
        "kinds": kinds,
        "default": default_arm(),
        "width_4096_layer_bytes_ratio": layer_ratio(4096),
        **benchmark.settings,
        "num_heldout_tokens": benchmark.yardstick.num_tokens,
    }
    show(result)
    (options.cache / "result.json").write_text(json.dumps(result, indent=2))
    if options.plot:
        plot(result, options.plot)
    if options.json:
        print(json.dumps(result))


# What is shown ------------------------------------------------------------------------------------


def line(name: str, kind: Mapping[str, float]) -> str:
    """Return an arm in a line."""
    return (
        f"{name}: {kind['bits_per_weight']:.2f} bits, k3 {kind['kl_k3']:.4f} "
        f"({kind['floor_ratio']:.3f} of nf4), k1 {kind['kl_k1']:.4f}, full {kind['kl_full']:.4f}, "
        f"cosine {kind['gradient_cosine']:.3f}, built in {kind['build_seconds']:.0f} s, "
        f"log-probs {kind['logprob_ratio']:.2f} of resident"
    )


COLUMNS = {  # header: key, format
    "bits a weight": ("bits_per_weight", ".2f"),
    "layers / bf16": ("layer_bytes_ratio", ".3f"),
    "model / bf16": ("bytes_ratio", ".3f"),
    "k3": ("kl_k3", ".4f"),
    "/ nf4": ("floor_ratio", ".3f"),
    "k1": ("kl_k1", ".4f"),
    "full": ("kl_full", ".4f"),
    "top token": ("top_token_agreement", ".1%"),
    "cosine": ("gradient_cosine", ".3f"),
    "build, s": ("build_seconds", ".0f"),
    "log-probs / resident": ("logprob_ratio", ".2f"),
}


def show(result: Mapping[str, Any]) -> None:
    """Print the table."""
    table = Table("reference", title="KL floors in nats a token", title_justify="left")
    for header in COLUMNS:
        table.add_column(header, justify="right")
    for name, kind in result["kinds"].items():
        label = f"{name} (default)" if name == result["default"] else name
        table.add_row(label, *(format(kind[key], spec) for key, spec in COLUMNS.values()))
    console = Console(width=140)
    console.print(table)
    console.print(
        f"{result['num_heldout_tokens']} held-out tokens; a layer of width 4096 takes "
        f"{result['width_4096_layer_bytes_ratio']:.3f} of its bfloat16 bytes by default"
    )


if __name__ == "__main__":
    main()
