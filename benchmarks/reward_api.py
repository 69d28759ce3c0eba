"""How much of a slow reward service does a training step still wait for?

    python benchmarks/reward_api.py                    # some ten minutes on 2 cores
    python benchmarks/reward_api.py --steps 1 --json   # does it run; its last line is JSON

A service on this machine answers after 2 seconds (scenario `constant`), or mostly within 1 and
sometimes after 5 and more (`tail`). Three trainers ask it for the rewards of 64 completions a step:
ours with each completion submitted as soon as it is finished, ours that asks when all is generated
and computed, and plain TRL with an asynchronous reward function. What is measured is the time
inside the trainer's call of the rewards: with the service in another process, it is all waiting.
Model, prompts, seed and latencies are the same; the first step of each trainer is left out. The
model is a random Llama over bytes, in which the reference alone takes longer than 2 seconds on 2
cores: what finishes last can hide behind nothing else. What was measured, and on what, stands in
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
from datasets import Dataset
from kill_resume import make_model
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.rewards import APIReward

COMPLETIONS = 64  # a step
SCENARIOS = ("constant", "tail")
ARMS = ("overlap", "no_overlap", "trl")
LABELS = {"overlap": "ours", "no_overlap": "ours, no overlap", "trl": "TRL, async function"}
CONSTANT_S = 2.0
MEDIAN_S, SPREAD, LONGEST_S = 0.5, 1.0, 10.0  # of the tail: a log-normal distribution, cut off


def main() -> None:
    """Measure each scenario with each trainer, and print what they waited for."""
    options = parse()
    if options.serve:
        serve(options.serve)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or make_model(
            Path(scratch), width=options.width, num_layers=4, max_positions=512
        )
        measured = {scenario: measure(scenario, model, options) for scenario in options.scenarios}
    show(measured)
    if options.json:
        print(json.dumps({**measured[options.scenarios[0]], "scenarios": measured}))


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2, help="that are measured, after the first")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--max_completion_length", type=int, default=128)
    parser.add_argument("--width", type=int, default=1280, help="of the random model")
    parser.add_argument("--model", type=Path, help="a local folder, in the place of random weights")
    parser.add_argument("--json", action="store_true", help="print the result as the last line")
    parser.add_argument("--serve", choices=SCENARIOS, help=argparse.SUPPRESS)
    return parser.parse_args()


# The service -------------------------------------------------------------------------------------


def latency_s(scenario: str, text: str) -> float:
    """Return how long the answer takes: always the same for the same text."""
    if scenario == "constant":
        return CONSTANT_S
    draw = random.Random(hashlib.sha256(text.encode()).digest())
    return min(LONGEST_S, MEDIAN_S * math.exp(SPREAD * draw.gauss(0.0, 1.0)))


def serve(scenario: str) -> None:
    """Score texts by their vowels, slowly; print the port first."""

    class Judge(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            """Wait, and answer."""
            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
            time.sleep(latency_s(scenario, text))
            body = json.dumps({"score": sum(letter in "aeiou" for letter in text)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 2 * COMPLETIONS

    with Server(("127.0.0.1", 0), Judge) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


@contextmanager
def service(scenario: str) -> Iterator[str]:
    """Run the service in a process of its own; yield its address."""
    command = [sys.executable, __file__, "--serve", scenario]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


# The trainers ------------------------------------------------------------------------------------


def api_reward(url: str) -> APIReward:
    """Return our reward; its scores are not cached, so that every arm asks for all."""
    return APIReward(
        f"{url}/score",
        protocol="generic_json",
        template={"text": "{completion}"},
        score_path="score",
        cache=False,
        max_concurrent=COMPLETIONS,
    )


def async_reward(url: str) -> Callable[..., Any]:
    """Return what a user of plain TRL writes: all completions asked at once, and awaited."""
    limits = httpx2.Limits(max_connections=COMPLETIONS, max_keepalive_connections=COMPLETIONS)

    async def vowels(*, completions: list[str], **_: Any) -> list[float]:
        async with httpx2.AsyncClient(timeout=60.0, limits=limits) as client:
            asked = [client.post(f"{url}/score", json={"text": text}) for text in completions]
            return [reply.json()["score"] for reply in await asyncio.gather(*asked)]

    return vowels


def build(arm: str, url: str, data: Dataset, model: Path, options: argparse.Namespace) -> Any:
    """Return the trainer of an arm."""
    is_trl = arm == "trl"
    config = (GRPOConfig if is_trl else ExtGRPOConfig)(
        output_dir=f"outputs/reward_api/{arm}",
        use_cpu=os.environ.get("CUDA_VISIBLE_DEVICES", "") == "",
        max_steps=1 + options.steps,
        num_generations=8,
        per_device_train_batch_size=COMPLETIONS // 4,
        gradient_accumulation_steps=4,
        max_completion_length=options.max_completion_length,
        learning_rate=1e-6,
        beta=0.04,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **({} if is_trl else {"overlap_rewards": arm == "overlap"}),
    )
    return (GRPOTrainer if is_trl else ExtGRPOTrainer)(
        model=str(model),
        reward_funcs=async_reward(url) if is_trl else api_reward(url),
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
    )


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return the function, with the seconds of each call noted."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return run


def measure(scenario: str, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the median seconds that each arm waits, and what share of it overlap hides."""
    data = Dataset.from_dict({"prompt": [f"{n} squared is {n * n}, and" for n in range(1000)]})
    waited: dict[str, float] = {}
    others: dict[str, float] = {}
    with service(scenario) as url:
        for arm in ARMS:
            trainer = build(arm, url, data, model, options)
            rewards: list[float] = []
            wholes: list[float] = []
            trainer._calculate_rewards = timed(trainer._calculate_rewards, rewards)
            trainer._generate_and_score_completions = timed(
                trainer._generate_and_score_completions, wholes
            )
            trainer.train()
            waited[arm] = statistics.median(rewards[1:])
            without = [whole - wait for whole, wait in zip(wholes, rewards, strict=True)]
            others[arm] = statistics.median(without[1:])
            print(f"{scenario}, {LABELS[arm]}: waits {waited[arm]:.2f} s a step", file=sys.stderr)
            if arm != "trl":
                trainer.reward_funcs[0].close()
    return {
        **{f"{arm}_s": seconds for arm, seconds in waited.items()},
        "hidden_fraction": 1 - waited["overlap"] / waited["no_overlap"],
        "generation_and_reference_s": others,
    }


def show(measured: dict[str, dict[str, Any]]) -> None:
    """Print a table."""
    table = Table(title=f"Seconds a step waits for the rewards of {COMPLETIONS} completions")
    for column in ("service", *LABELS.values(), "hidden", "generation + reference, ours"):
        table.add_column(column, justify="right")
    for scenario, result in measured.items():
        waits = [f"{result[f'{arm}_s']:.2f}" for arm in ARMS]
        hidden = f"{result['hidden_fraction']:.0%}"
        work = f"{result['generation_and_reference_s']['overlap']:.1f}"
        table.add_row(scenario, *waits, hidden, work)
    Console().print(table)


if __name__ == "__main__":
    main()
