"""Is a run that is killed again and again the run that was left alone?

    python benchmarks/kill_resume.py --kills 20 --json         # its last line is JSON
    python benchmarks/kill_resume.py --kills 5 --processes 2   # two processes, gloo

A small random model is trained once without a disturbance. Then the same run is ended at random
moments and resumed from its last good checkpoint, until it is through: two kills out of four are
`kill -9` at any moment, one is `kill -9` while a checkpoint is being written, one is SIGTERM, which
saves first. The run has every kind of state that a resume could lose: data loader workers, gradient
accumulation, generations that are used for several steps and iterations, dynamic sampling, a reward
from a service with its scores cached on disk, logs that span a checkpoint, evaluations, several
epochs. After each kill every checkpoint is read and compared with its manifest. Final weights and
all logged metrics but times are compared, bit for bit. Runs on the CPU in float32, one thread a
process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trl_grpo_ext.checkpointing import UNFINISHED, damage

TERMINATED = 128 + signal.SIGTERM
KINDS = ("anywhere", "while saving", "anywhere", "SIGTERM")
LONGEST_S = 600.0  # that an attempt may take


@dataclass(frozen=True)
class Run:
    """One training run: its model, output and reward service, steps and processes."""

    model: Path
    output: Path
    service: str
    num_steps: int
    num_processes: int

    @property
    def began(self) -> Path:
        """Is there once the trainer is built."""
        return self.output / "began"

    @property
    def result(self) -> Path:
        """Weights and log, written when the run is through."""
        return self.output / "result.pt"

    def last_words(self) -> str:
        """Return the end of what its first process printed; its folder may not stay."""
        return (self.output / "log_0.txt").read_text()[-3000:]


def make_model(folder: Path, *, width: int, num_layers: int = 2, max_positions: int = 128) -> Path:
    """Write a random Llama, and a tokenizer of single bytes, and return their folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    symbols = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(symbols),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def letters(*, completions: list[str], **_: object) -> list[float]:
    """Score the share of letters, coarsely, so that some groups are silent."""
    return [float(sum(c.isalpha() for c in text) > len(text) / 3) for text in completions]


class Digits(BaseHTTPRequestHandler):
    """Scores like an OpenRLHF reward server: whether there is a digit, after a while."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Score the completions of one request."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pairs = zip(asked["query"], asked["prompts"], strict=True)
        texts = [query.removeprefix(prompt) for query, prompt in pairs]
        time.sleep(0.02 * (sum(map(ord, "".join(texts))) % 3))
        scores = [0.5 * any(c.isdigit() for c in text) for text in texts]
        reply = json.dumps({"rewards": scores}).encode()
        with suppress(ConnectionError):  # the run was killed
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving() -> Iterator[str]:
    """Serve the reward on this machine; yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Digits)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def train(run: Run, rank: int, port: int) -> None:
    """Train as one process of the run, from its last good checkpoint; write the result."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if run.num_processes > 1:
        world = str(run.num_processes)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": world}
    multiprocessing.set_start_method("fork", force=True)  # of the data loader's workers, as usual
    os.setpgrp()  # so that a signal reaches the data loader's workers too, as a scheduler's does
    log = os.open(run.output / f"log_{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch
    from datasets import Dataset

    from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
    from trl_grpo_ext.rewards import APIReward

    torch.set_num_threads(1)
    rows = Dataset.from_dict({"prompt": [f"{a} and {a * a} make" for a in range(17)]})
    config = ExtGRPOConfig(
        str(run.output),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        seed=11,
        beta=0.02,
        learning_rate=1e-3,
        max_steps=run.num_steps,
        per_device_train_batch_size=8 // run.num_processes,
        per_device_eval_batch_size=8 // run.num_processes,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_iterations=2,
        num_generations=4,
        max_completion_length=12,
        dynamic_sampling=True,
        dataloader_num_workers=2,
        gradient_checkpointing=False,
        logging_steps=3,
        save_steps=2,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=5,
        eval_on_start=True,
    )
    digits = APIReward(
        run.service, protocol="openrlhf", log_as="digits", cache_dir=run.output / "scores"
    )
    rewards = [letters, digits]
    trainer = ExtGRPOTrainer(str(run.model), rewards, config, rows, rows.select(range(5)))
    run.began.touch()
    trainer.train(resume_from_checkpoint="last-good")
    if rank == 0:
        history = [untimed(entry) for entry in trainer.state.log_history[:-1]]
        result = {"weights": trainer.model.state_dict(), "history": history}
        torch.save(result, run.result.with_suffix(".part"))
        run.result.with_suffix(".part").rename(run.result)


def untimed(entry: dict[str, Any]) -> dict[str, Any]:
    """Return what a log says but for times and what was asked, which no run repeats."""
    timed = ("time", "runtime", "per_second", "latency", "requests", "retries", "cache_hits")
    return {k: v for k, v in entry.items() if not any(word in k for word in timed)}


def start(run: Run) -> list[BaseProcess]:
    """Start the processes of the run; their imports are done already."""
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    workers = [
        context.Process(target=train, args=(run, rank, port)) for rank in range(run.num_processes)
    ]
    for worker in workers:
        worker.start()
    return workers


def finish(workers: list[BaseProcess]) -> list[int | None]:
    """Wait for the processes, and return their exit codes."""
    end = time.monotonic() + LONGEST_S
    for worker in workers:
        worker.join(max(end - time.monotonic(), 0.0))
        if worker.is_alive():
            raise SystemExit(f"a process of the run hangs; see {workers[0].name}'s log")
    return [worker.exitcode for worker in workers]


def kill(run: Run, workers: list[BaseProcess], *, kind: str, delay_s: float) -> bool:
    """End the run at a moment of this kind; whether it was still there to be ended.

    The delay counts from when the trainer is built, so that it falls into training or resuming.
    """

    def runs() -> bool:
        return all(worker.is_alive() for worker in workers)

    while not run.began.exists() and runs():
        time.sleep(0.005)
    end = time.monotonic() + delay_s
    while time.monotonic() < end and runs():
        time.sleep(0.005)
    while kind == "while saving" and not any((run.output / UNFINISHED).glob("*/*")) and runs():
        time.sleep(0.0005)
    if not runs():
        return False
    for worker in workers:
        if worker.pid is not None:
            os.killpg(worker.pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
    codes = finish(workers)
    if kind == "SIGTERM" and not set(codes) <= {TERMINATED, -signal.SIGTERM, 0}:
        raise SystemExit(f"SIGTERM ended the run with {codes}:\n{run.last_words()}")
    return True


def unusable(run: Run) -> Iterator[str]:
    """Yield the checkpoints that a resume would have to pass over."""
    for checkpoint in run.output.glob("*checkpoint-*"):
        if problem := damage(checkpoint):
            yield f"{checkpoint.name}: {problem}"


def disturb(run: Run, alone: Run, *, kills: int, longest_s: float, seed: int) -> tuple[bool, int]:
    """Kill and resume the run, again from the start when it is through.

    Returns:
        Whether each that got through is the undisturbed run, and how many checkpoints were damaged.
    """
    moments, same, damaged, done = random.Random(seed), True, 0, 0
    with tqdm(total=kills, desc="kills", unit="kill") as bar:
        while done < kills or not run.result.exists():
            if run.result.exists():
                same &= is_same(alone, run)
                shutil.rmtree(run.output)
            run.output.mkdir(exist_ok=True)
            run.began.unlink(missing_ok=True)
            workers = start(run)
            killed = done < kills and kill(
                run,
                workers,
                kind=KINDS[done % len(KINDS)],
                delay_s=moments.uniform(0.0, longest_s),
            )
            done += killed
            bar.update(int(killed))
            if any(codes := finish(workers)) and not killed:
                raise SystemExit(f"an attempt ended with {codes}:\n{run.last_words()}")
            for problem in unusable(run):
                damaged += 1
                print(problem)
    return is_same(alone, run) and same, damaged


def is_same(run: Run, other: Run) -> bool:
    """Whether weights and logs are equal, bit for bit."""
    import torch

    one, two = (torch.load(each.result, weights_only=True) for each in (run, other))
    weights = one["weights"].keys() == two["weights"].keys() and all(
        torch.equal(value, two["weights"][name]) for name, value in one["weights"].items()
    )
    first, second = (json.dumps(each["history"], sort_keys=True) for each in (one, two))
    logs = first == second  # as text, in which NaN equals NaN
    print(f"final weights {'equal' if weights else 'DIFFER'}, logs {'equal' if logs else 'DIFFER'}")
    return weights and logs


def main() -> None:
    """Run it once undisturbed and once disturbed, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--keep", type=Path, help="a new folder for models, logs and checkpoints")
    parser.add_argument("--json", action="store_true", help="print the result as the last line")
    asked = parser.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["trl_grpo_ext.trainer"])
    with tempfile.TemporaryDirectory() as scratch, serving() as service:
        folder = asked.keep or Path(scratch)
        model = make_model(folder / "model", width=asked.width)
        alone = Run(model, folder / "alone", service, asked.steps, asked.processes)
        killed = Run(model, folder / "killed", service, asked.steps, asked.processes)
        for run in (alone, killed):
            run.output.mkdir()
        if set(codes := finish(start(alone))) != {0}:
            raise SystemExit(f"the undisturbed run ended with {codes}:\n{alone.last_words()}")
        training_s = alone.result.stat().st_mtime - alone.began.stat().st_mtime
        print(f"undisturbed: {asked.steps} steps in {training_s:.0f} s")
        same, damaged = disturb(
            killed, alone, kills=asked.kills, longest_s=0.4 * training_s, seed=asked.seed
        )
    result = {
        "kills": asked.kills,
        "bit_identical": same,
        "unusable_checkpoints": damaged,
    }
    print(f"{asked.kills} kills, {asked.processes} process(es): {result}")
    if asked.json:
        print(json.dumps(result))
    if not same or damaged:
        sys.exit(1)


if __name__ == "__main__":
    main()
