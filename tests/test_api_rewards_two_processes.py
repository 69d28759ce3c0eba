"""A service's reward with two processes: groups that are split, an outage, the end of both."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rewards.api.services import Asked, serving

TRAIN = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import torch
from datasets import Dataset
from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.rewards import APIReward

model, out, processes, url, asked = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:6])
config = ExtGRPOConfig(
    out, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, beta=0.04, max_steps=3,
    per_device_train_batch_size=8 // processes, max_completion_length=8, save_strategy="no",
    learning_rate=1e-2, logging_steps=1, seed=3, gradient_checkpointing=False,
    group_sampler="shared_prefill", **asked["options"],
)
reward = APIReward(url, cache=False, backoff_s=0.001, max_attempts=2, **asked["reward"])
dataset = Dataset.from_dict({"prompt": [f"{a} + {a} =" for a in range(8)]})
trainer = ExtGRPOTrainer(model, reward, config, dataset)
trainer.train(resume_from_checkpoint="last-good")
if trainer.accelerator.is_main_process:
    result = {"weights": trainer.accelerator.unwrap_model(trainer.model).state_dict()}
    result["completions"] = list(trainer._logs["completion"])
    result["advantages"] = list(trainer._logs["advantages"])
    torch.save(result, out + ".pt")
trainer.accelerator.end_training()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""

LENGTHS = {"protocol": "openrlhf", "log_as": "longest"}
RANKING = {"protocol": "openai_ranking", "model": "judge", "rubric": "the longer", "votes": 1}
RANKING |= {"judge_by": "scores", "verdict": "json_schema"}


def launch(
    folder: Path, model: Path, out: str, url: str, *, processes: int, **asked: Any
) -> tuple[int, str]:
    """Run the script in some processes; return exit code and what they printed."""
    path = folder / "script.py"
    path.write_text(TRAIN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = [str(model), str(folder / out), str(processes), json.dumps(url), json.dumps(asked)]
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", str(processes), str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
    )
    return done.returncode, done.stderr


def reply(body: Any) -> tuple[int, Mapping[str, str], bytes]:
    return 200, {}, json.dumps(body).encode()


class LongestServer:
    """Scores the length of each text, as OpenRLHF's server; breaks off after some answers."""

    def __init__(self, after: float = float("inf")) -> None:
        self.left, self.given = after, list[str]()
        self._lock = threading.Lock()

    def __call__(self, asked: Asked) -> tuple[int, Mapping[str, str], bytes]:
        with self._lock:
            self.left -= 1
            if self.left < 0:
                return 503, {}, b"maintenance"
            self.given += asked.payload["query"]
        return reply({"rewards": [float(len(query)) for query in asked.payload["query"]]})


def judge(asked: Asked) -> tuple[int, Mapping[str, str], bytes]:
    """Scores each response of a ranking by its number of different letters."""
    text = asked.payload["messages"][-1]["content"]
    parts = re.findall(r"<response_\d+-\w{16}>\n(.*?)\n</response_", text, re.DOTALL)
    groups.append(len(parts))
    content = json.dumps({"scores": [min(10.0, len(set(part)) / 4) for part in parts]})
    return reply({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})


groups: list[int] = []  # texts in each request to the judge


def test_a_split_group_is_ranked_as_a_whole(tiny_model_dir: Path, tmp_path: Path) -> None:
    """With two processes each has half of the one group."""
    asked = {"options": {"num_generations": 8}, "reward": RANKING}
    found = []
    with serving(judge) as service:
        for processes in (1, 2):
            groups.clear()
            code, told = launch(
                tmp_path, tiny_model_dir, f"{processes}", service.url, processes=processes, **asked
            )
            assert code == 0, told[-3000:]
            assert groups == [8, 8, 8]
            found.append(torch.load(tmp_path / f"{processes}.pt"))
    one, two = found
    assert one["completions"] == two["completions"]
    assert one["advantages"] == pytest.approx(two["advantages"], abs=1e-6)
    assert any(one["advantages"])
    for name, weight in one["weights"].items():
        torch.testing.assert_close(weight, two["weights"][name], atol=1e-5, rtol=1e-4)


def test_an_outage_ends_both_processes_and_the_resume_asks_for_the_rest(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    asked = {"options": {"num_generations": 4}, "reward": LENGTHS}
    longest = LongestServer(after=11)
    with serving(longest) as service:
        code, told = launch(tmp_path, tiny_model_dir, "out", service.url, processes=2, **asked)
        assert code != 0
        assert told.count("RewardOutageError: After step 1") == 1, told
        assert "'longest' 5 (HTTP 503)" in told
        assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
        longest.left = float("inf")
        code, told = launch(tmp_path, tiny_model_dir, "out", service.url, processes=2, **asked)
        assert code == 0, told[-3000:]
        assert len(longest.given) == 24
        code, told = launch(tmp_path, tiny_model_dir, "alone", service.url, processes=2, **asked)
        assert code == 0, told[-3000:]
    resumed, alone = (torch.load(tmp_path / f"{name}.pt") for name in ("out", "alone"))
    assert resumed["advantages"] == alone["advantages"]
    for name, weight in alone["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name


def test_a_refusal_to_the_one_that_asks_ends_both(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The first process asks about the group that both have; the second one asks nobody."""
    asked = {"options": {"num_generations": 8}, "reward": RANKING}
    with serving(lambda _: (401, {}, b"who are you?")) as service:
        code, told = launch(tmp_path, tiny_model_dir, "out", service.url, processes=2, **asked)
    assert code != 0
    assert told.count("RewardOutageError: After step 0") == 1, told[-3000:]
    assert "HTTP 401: who are you?" in told
