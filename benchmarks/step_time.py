"""How long is a training step, and how much memory does it take? Ours against plain TRL.

    python benchmarks/step_time.py                           # the CPU scenarios, one by one
    python benchmarks/step_time.py --scenario long --json    # one; its last line is JSON
    python benchmarks/step_time.py --scenario gpu --model random:qwen2.5-1.5b --dtype bfloat16 \
        --arms trl trl_continuous ours ours_shared_prefill ours_without_graphs ours_continuous

The trainers run in turn, each time in a process of its own: the same model, prompts, seed, options
and lengths (every completion is forced to the same number of tokens). The first generation of a
process is not counted. A step's seconds are the median over its process; the ratios are taken
repeat by repeat. A trainer that fails is named, and the others go on. Run it with nothing else on
the machine. Writes outputs/step_time/SCENARIO.json; what was measured, and on what, stands in
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.model_cache import prepare_model

OUTPUT = Path("outputs/step_time")
PACKAGED = "smollm2-135m"
PHASES = ("generation", "logprobs", "update", "optimizer", "other")


@dataclass(frozen=True)
class Scenario:
    """What one step consists of; lengths in tokens."""

    prompt_length: int
    completion_length: int = 32
    num_generations: int = 8
    micro_batch: int = 8
    accumulation: int = 2
    num_iterations: int = 1

    @property
    def num_completions(self) -> int:
        """Completions a generation."""
        return self.micro_batch * self.accumulation


SCENARIOS = {
    "short": Scenario(prompt_length=45),
    "long": Scenario(prompt_length=230),
    "multi_step": Scenario(prompt_length=230, num_iterations=2),
    "reasoning": Scenario(prompt_length=1000, num_generations=16, micro_batch=16, accumulation=1),
    "gpu": Scenario(
        prompt_length=1024,
        completion_length=512,
        num_generations=16,
        micro_batch=16,
        accumulation=4,
    ),
}
ON_CPU = ("short", "long", "multi_step", "reasoning")

# Trainers, with what they are given beyond the scenario; the first of --arms is the baseline.
ARMS: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl_continuous": {"use_transformers_continuous_batching": True},
    "ours": {},
    "ours_shared_prefill": {"group_sampler": "shared_prefill"},
    "ours_without_graphs": {"group_sampler": "shared_prefill", "cuda_graphs": False},
    "ours_continuous": {"group_sampler": "continuous_batching"},
    "ours_without_onednn": {"onednn_linear": False},
    "trl_without_checkpointing": {"gradient_checkpointing": False},
    "ours_without_checkpointing": {"gradient_checkpointing": False},
}
NEVER = 10**9  # a stop token that no vocabulary has
TOLERANCE = (
    0.02  # of the mean length: TRL cuts at its own stop token, which random weights may draw
)

# [FLOP/s dense bf16, bytes/s] of the devices that the roofline is known for.
RATES = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}


# One process: a few steps of one trainer ----------------------------------------------------------


class Stopwatch:
    """Seconds and peak memory of each phase; the time of an inner phase is not the outer one's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak_bytes: dict[str, int] = defaultdict(int)
        self._open: list[str] = []
        self._since = 0.0
        if not torch.cuda.is_available():
            threading.Thread(target=self._watch_memory, daemon=True).start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside towards ``name``."""
        self._switch(opening=name)
        try:
            yield
        finally:
            self._switch(opening=None)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, counted."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return run

    def _switch(self, *, opening: str | None) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
            if torch.cuda.is_available():
                self._note_memory(torch.cuda.max_memory_allocated())
                torch.cuda.reset_peak_memory_stats()
        if opening is None:
            self._open.pop()
        else:
            self._open.append(opening)
        self._since = now

    def _watch_memory(self) -> None:
        process = psutil.Process()
        while True:
            self._note_memory(process.memory_info().rss)
            time.sleep(0.01)

    def _note_memory(self, num_bytes: int) -> None:
        for name in self._open[-1:]:
            self.peak_bytes[name] = max(self.peak_bytes[name], num_bytes)


class Steps(TrainerCallback):
    """Keeps the seconds of every optimizer step, phase by phase."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.steps: list[dict[str, float]] = []
        self._start = 0.0

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Count the optimizer's own step."""
        optimizer.step = self.stopwatch.timed("optimizer", optimizer.step)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start to count."""
        self.stopwatch.seconds.clear()
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Keep what was counted; what no phase covers is ``other``."""
        step = {"step": time.perf_counter() - self._start, **self.stopwatch.seconds}
        uncounted = step["step"] - sum(step.get(name, 0.0) for name in PHASES)
        step["other"] = step.get("other", 0.0) + uncounted
        self.steps.append(step)


def measure(arm: str, scenario: Scenario, options: argparse.Namespace) -> None:
    """Run one trainer for a warm-up and some generations, and print what was measured."""
    model, tokenizer = load(options.model, tokenizer=options.tokenizer, dtype=options.dtype)
    stopwatch = Stopwatch()
    steps = Steps(stopwatch)
    config_class, trainer_class = (
        (ExtGRPOConfig, ExtGRPOTrainer) if arm.startswith("ours") else (GRPOConfig, GRPOTrainer)
    )
    use_cpu = not torch.cuda.is_available()
    args = config_class(
        output_dir=str(OUTPUT / "trainer"),
        use_cpu=use_cpu,
        bf16=options.bf16,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        seed=0,
        beta=0.04,
        learning_rate=1e-6,
        max_steps=(1 + options.cycles) * scenario.num_iterations,
        per_device_train_batch_size=scenario.micro_batch,
        gradient_accumulation_steps=scenario.accumulation,
        num_iterations=scenario.num_iterations,
        num_generations=scenario.num_generations,
        max_completion_length=scenario.completion_length,
        generation_kwargs=without_an_end(scenario, random_weights=":" in options.model),
        **ARMS[arm],
    )
    trainer = trainer_class(
        model=model,
        reward_funcs=[number_of_vowels],
        args=args,
        train_dataset=prompts(tokenizer, length=scenario.prompt_length),
        processing_class=tokenizer,
        callbacks=[steps],
    )
    watch(trainer, stopwatch)
    trainer.train()
    counted = steps.steps[scenario.num_iterations :]
    found = {
        "completion_length": trainer.state.log_history[-1]["completions/mean_length"],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "passes": [
            median_step(counted[i :: scenario.num_iterations])
            for i in range(scenario.num_iterations)
        ],
        "peak_bytes": dict(stopwatch.peak_bytes),
        "num_parameters": model.num_parameters(),
        "model": shape_of(model),
    }
    print(json.dumps(found))


def without_an_end(scenario: Scenario, *, random_weights: bool) -> dict[str, int]:
    """Return options of generation that make every completion as long as the scenario says.

    Continuous batching knows no minimum; random weights hardly ever sample the stop token.
    """
    if random_weights:
        return {"eos_token_id": NEVER}
    return {"min_new_tokens": scenario.completion_length}


def watch(trainer: Any, stopwatch: Stopwatch) -> None:
    """Count the phases of a trainer, ours or TRL's, by the methods that both have."""
    logprobs = trainer._get_per_token_logps_and_entropies

    def counted_logprobs(*args: Any, **kwargs: Any) -> Any:
        with stopwatch.phase("update" if torch.is_grad_enabled() else "logprobs"):
            return logprobs(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = counted_logprobs
    trainer._generate = stopwatch.timed("generation", trainer._generate)
    trainer._generate_and_score_completions = stopwatch.timed(
        "other", trainer._generate_and_score_completions
    )
    trainer.training_step = stopwatch.timed("update", trainer.training_step)


def median_step(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each phase, in seconds."""
    return {
        name: statistics.median(step.get(name, 0.0) for step in steps) for name in ("step", *PHASES)
    }


def load(
    name: str, *, tokenizer: str, dtype: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return model and tokenizer: of a folder, packaged, or random weights of a known shape."""
    given = AutoTokenizer.from_pretrained(packaged(tokenizer))
    folder = random_model(name, given, dtype=dtype) if ":" in name else packaged(name)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)), given


def packaged(name: str) -> str | Path:
    """Return the folder of the packaged model, or the one that was named."""
    if name != PACKAGED:
        return name
    return prepare_model("HuggingFaceTB/SmolLM2-135M-Instruct", source="package")


def random_model(name: str, tokenizer: PreTrainedTokenizerBase, *, dtype: str) -> Path:
    """Write random weights of a known shape to a folder, from which TRL loads its reference too."""
    shape = SHAPES[name.removeprefix("random:")]
    config = Qwen2Config(**shape, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    folder = OUTPUT / f"{name.replace(':', '_')}_{dtype}"
    if not (folder / "config.json").exists():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(folder)
    return folder


SHAPES = {
    "qwen2.5-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}


def shape_of(model: PreTrainedModel) -> dict[str, int]:
    """Return what the roofline needs of a model."""
    config = model.config
    head_width = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    embedding = config.vocab_size * config.hidden_size
    tied = 1 if config.tie_word_embeddings else 2
    return {
        "body_parameters": model.num_parameters() - tied * embedding,
        "head_parameters": embedding,
        "attention_width": config.num_hidden_layers * config.num_attention_heads * head_width,
        "cache_width": 2 * config.num_hidden_layers * config.num_key_value_heads * head_width,
        "bytes_a_number": torch.finfo(model.dtype).bits // 8,
    }


def number_of_vowels(*, completions: list[str], **_: Any) -> list[float]:
    """Return a reward that differs within a group of random text."""
    return [float(sum(character in "aeiou" for character in text)) for text in completions]


def prompts(tokenizer: PreTrainedTokenizerBase, *, length: int) -> Dataset:
    """Return 64 different prompts of ``length`` tokens, where a word is one token."""
    words = ["the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on"]
    texts = []
    for i in range(64):
        text = f"{i:02d}"
        while len(tokenizer(text).input_ids) < length:
            text += " " + words[(len(text) * 7 + i) % len(words)]
        texts.append(text)
    return Dataset.from_dict({"prompt": texts})


# All processes ------------------------------------------------------------------------------------


def main() -> None:
    """Run the scenarios that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", choices=list(SCENARIOS))
    parser.add_argument("--model", default=PACKAGED, help="a folder, or random:SHAPE")
    parser.add_argument("--tokenizer", default=PACKAGED, help="a folder")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--bf16", action="store_true", help="compute in it, by autocast")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each trainer")
    parser.add_argument("--cycles", type=int, default=1, help="generations counted a process")
    parser.add_argument("--completion_length", type=int)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["trl", "ours"])
    parser.add_argument("--json", action="store_true", help="print the result as the last line")
    parser.add_argument("--measure", choices=list(ARMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    failed = False
    for name in [options.scenario] if options.scenario else ON_CPU:
        scenario = SCENARIOS[name]
        if options.completion_length:
            scenario = replace(scenario, completion_length=options.completion_length)
        if options.measure:
            measure(options.measure, scenario, options)
            continue
        result = compare(name, scenario, options)
        show(result)
        OUTPUT.mkdir(parents=True, exist_ok=True)
        file = f"{name}_bf16.json" if options.bf16 else f"{name}.json"
        (OUTPUT / file).write_text(json.dumps(result, indent=2))
        if options.json:
            print(json.dumps(result))
        failed = failed or bool(result["failed"])
    if failed:
        sys.exit(1)


def compare(name: str, scenario: Scenario, options: argparse.Namespace) -> dict[str, Any]:
    """Run the trainers in turn and return seconds, ratios and peaks."""
    packaged(options.tokenizer)  # so that its download is no part of a run
    runs, failed = run_in_turn(name, scenario, options)
    if len(runs) < 2:
        sys.exit("Nothing can be compared: fewer than two trainers came to their end.")
    seconds = {
        arm: [mean(p["step"] for p in run["passes"]) for run in found]
        for arm, found in runs.items()
    }
    baseline = next(iter(runs))
    ours = "ours" if "ours" in seconds else list(seconds)[-1]
    ratios = {
        arm: [b / o for b, o in zip(seconds[baseline], values, strict=True)]
        for arm, values in seconds.items()
    }
    tokens = scenario.num_completions * scenario.completion_length / scenario.num_iterations
    result = {
        "scenario": name,
        **{f"{arm}_s": statistics.median(values) for arm, values in seconds.items()},
        "ratio": statistics.median(ratios[ours]),
        "ratio_range": [min(ratios[ours]), max(ratios[ours])],
        "ratios": {
            arm: [min(values), statistics.median(values), max(values)]
            for arm, values in ratios.items()
        },
        "failed": failed,
        "completion_length": {arm: found[0]["completion_length"] for arm, found in runs.items()},
        "pass_ratios": pass_ratios(runs[baseline], runs[ours]),
        "tokens_a_second": {
            arm: tokens / statistics.median(values) for arm, values in seconds.items()
        },
        "phases": {arm: phases_of(found) for arm, found in runs.items()},
        "peak_bytes": {arm: peaks_of(found) for arm, found in runs.items()},
        "repeats": options.repeats,
        "model": options.model,
        "dtype": options.dtype,
        "bf16": options.bf16,
        "device": runs[ours][0]["device"],
        "settings": asdict(scenario),
    }
    for label, rate in RATES.items():
        if label in result["device"]:
            result["roofline"] = {
                arm: roofline(scenario, runs[arm][0]["model"], phases, rate)
                for arm, phases in result["phases"].items()
            }
    return result


def run_in_turn(
    name: str, scenario: Scenario, options: argparse.Namespace
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Run the trainers in turn; return what each measured, and why those failed that did."""
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    failed: dict[str, str] = {}
    for repeat in range(options.repeats):
        for arm in [arm for arm in runs if arm not in failed]:
            print(f"{name}, repeat {repeat + 1} of {options.repeats}: {arm} ...", flush=True)
            try:
                runs[arm].append(checked(run_arm(arm, name, options), scenario))
            except RuntimeError as error:
                failed[arm] = str(error)
                print(f"{arm} failed: {error}", flush=True)
    return {arm: found for arm, found in runs.items() if arm not in failed}, failed


def checked(found: dict[str, Any], scenario: Scenario) -> dict[str, Any]:
    """Return what was measured, if the completions had their length.

    Raises:
        RuntimeError: They had not, so that the times cannot be compared.
    """
    mean_length = found["completion_length"]
    if abs(mean_length - scenario.completion_length) > TOLERANCE * scenario.completion_length:
        wanted = scenario.completion_length
        raise RuntimeError(f"its completions had {mean_length:.1f} tokens, not {wanted}")
    return found


def run_arm(arm: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one trainer in a process of its own and return what it measured.

    Raises:
        RuntimeError: It ended with an error, whose last lines are the message.
    """
    command = [sys.executable, __file__, "--measure", arm, "--scenario", name]
    for key in ("model", "tokenizer", "dtype", "cycles"):
        command += [f"--{key}", str(getattr(options, key))]
    if options.completion_length:
        command += ["--completion_length", str(options.completion_length)]
    if options.bf16:
        command.append("--bf16")
    ran = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if ran.returncode:
        said = f"{ran.stdout[-1000:]}\n{ran.stderr[-4000:]}"
        raise RuntimeError(f"exit code {ran.returncode}\n{said}")
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


def mean(values: Iterator[float]) -> float:
    """Return the mean."""
    return statistics.fmean(list(values))


def pass_ratios(baseline: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[float]:
    """Return the ratio of the first pass over a generation, of the second, and so on."""
    return [
        statistics.median(
            b["passes"][i]["step"] / o["passes"][i]["step"]
            for b, o in zip(baseline, ours, strict=True)
        )
        for i in range(len(ours[0]["passes"]))
    ]


def phases_of(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of each phase, a step, median over the runs."""
    return {
        name: statistics.median(mean(p[name] for p in run["passes"]) for run in runs)
        for name in PHASES
    }


def peaks_of(runs: list[dict[str, Any]]) -> dict[str, int]:
    """Return the peak of each phase and of all, the largest over the runs."""
    names = {name for run in runs for name in run["peak_bytes"]}
    peaks = {name: max(run["peak_bytes"].get(name, 0) for run in runs) for name in sorted(names)}
    return {**peaks, "all": max(peaks.values())}


def roofline(
    scenario: Scenario, model: dict[str, int], phases: dict[str, float], rate: tuple[float, float]
) -> dict[str, float]:
    """Return the share of the device's rate that the needed work of each phase would take.

    Needed are the tokens of a packed row, prompts once: 2 FLOP a parameter and token forward, twice
    that backward, without the second forward pass of gradient checkpointing. Decoding is held
    against the bandwidth: the weights, and the cache with the prompt once a group, once a token.
    """
    flop_s, bytes_s = rate
    prompt, own = scenario.prompt_length, scenario.completion_length
    groups = scenario.num_completions // scenario.num_generations
    tokens = groups * prompt + scenario.num_completions * own
    seen = groups * prompt * prompt / 2 + scenario.num_completions * own * (prompt + own / 2)
    forward = (
        2 * model["body_parameters"] * tokens
        + 2 * model["head_parameters"] * scenario.num_completions * own
        + 4 * model["attention_width"] * seen
    )
    cached = groups * prompt + scenario.num_completions * own / 2
    decode = own * (
        (model["body_parameters"] + model["head_parameters"]) + model["cache_width"] * cached
    )
    return {
        "logprobs": forward / scenario.num_iterations / flop_s / phases["logprobs"],
        "update": 3 * forward / flop_s / phases["update"],
        "generation": decode
        * model["bytes_a_number"]
        / scenario.num_iterations
        / bytes_s
        / phases["generation"],
    }


def show(result: dict[str, Any]) -> None:
    """Print the table of one scenario."""
    arms = list(result["phases"])
    table = Table(title=f"{result['scenario']}: {result['settings']}", title_justify="left")
    table.add_column("a step")
    for arm in arms:
        table.add_column(f"{arm}, s", justify="right")
    for arm in arms:
        table.add_column(f"{arm}, peak GB", justify="right")
    for phase in (*PHASES, "all"):
        seconds = [
            result[f"{arm}_s"] if phase == "all" else result["phases"][arm][phase] for arm in arms
        ]
        peaks = [result["peak_bytes"][arm].get(phase) for arm in arms]
        table.add_row(
            phase,
            *(f"{value:.2f}" for value in seconds),
            *("" if peak is None else f"{peak / 1e9:.2f}" for peak in peaks),
        )
    console = Console(width=110)
    console.print(table)
    low, high = result["ratio_range"]
    passes = ", ".join(f"{ratio:.1f}" for ratio in result["pass_ratios"])
    console.print(
        f"{arms[0]} / ours: {result['ratio']:.2f} ({low:.2f} to {high:.2f}), "
        f"pass by pass {passes}; "
        + ", ".join(f"{arm} {result['tokens_a_second'][arm]:.0f} tokens/s" for arm in arms)
    )
    for arm, (least, middle, most) in result["ratios"].items():
        console.print(f"{arms[0]} / {arm}: {middle:.2f} ({least:.2f} to {most:.2f})")
    for arm, shares in result.get("roofline", {}).items():
        console.print(f"share of the roofline, {arm}: {shares}")


if __name__ == "__main__":
    main()
