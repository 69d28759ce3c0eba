"""A real judge: SmolLM2 behind ``transformers serve``, asked by ``openai_chat``.

A model of 135M parameters copies the request instead of judging, so a bias towards the few tokens
of a verdict (``logit_bias``, which this server knows) makes it write some that can be read.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rewards.serve.client import Client, until
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from trl_grpo_ext.errors import ModelPreparationError, RewardError
from trl_grpo_ext.model_cache import prepare_model
from trl_grpo_ext.rewards.api.check import CheckedRequest, check_reward
from trl_grpo_ext.rewards.api.reward import APIReward

pytestmark = pytest.mark.slow

SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT, ANSWERS = "What is 2 + 2?", ["4", "2 + 2 is 4.", "5", "I would rather not say."]
YES_OR_NO = {
    "verdict": "pattern",
    "verdict_pattern": r"^\s*(\w+)\s*$",
    "labels": {"yes": 1, "no": 0},
    "score_range": [0, 1],
}
DIGITS = {"verdict": "pattern", "verdict_pattern": r"^\s*(\d+)\s*$", "score_range": [0, 10]}


@dataclass(frozen=True)
class Judge:
    """The server, and what it needs to be asked."""

    url: str
    model: str

    def reward(self, **options: Any) -> APIReward:
        rubric = "Is the response right?"
        given = {"model": self.model, "rubric": rubric, "max_tokens": 4, "cache": False} | options
        return APIReward(self.url, protocol="openai_chat", max_attempts=2, backoff_s=0.0, **given)

    def checked(self, **options: Any) -> list[CheckedRequest]:
        with self.reward(**options) as reward:
            return check_reward(reward, prompt=PROMPT, completions=ANSWERS)

    def bias(self, words: Sequence[str]) -> dict[str, Any]:
        """Let the judge write these words and the end of its turn, each of them a token."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokens = [tokenizer.encode(word, add_special_tokens=False) for word in words]
        assert all(len(ids) == 1 for ids in tokens)
        allowed = [ids[0] for ids in tokens] + [tokenizer.eos_token_id]
        # transformers 5.23 answers a bias that is a whole number with HTTP 500.
        return {"logit_bias": {str(token): 100.0 for token in allowed}}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    if not is_serve_available():
        pytest.skip("no server to talk to: pip install 'transformers[serving]'")
    try:
        model = prepare_model(SMOLLM, source="package")
    except ModelPreparationError as error:
        pytest.skip(f"no judge to serve: {error}")
    port, log = _free_port(), tmp_path_factory.mktemp("serve") / "log.txt"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as to, subprocess.Popen(command, stdout=to, stderr=to) as server:
        try:
            until(lambda: _is_up(Client(port), server, log), timeout_s=180)
            yield Judge(f"http://127.0.0.1:{port}/v1", model)
        finally:
            server.kill()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _is_up(client: Client, server: subprocess.Popen[bytes], log: Path) -> bool:
    assert server.poll() is None, log.read_text()[-3000:]
    try:
        return client.get("/health").status == 200
    except OSError:
        return False


def _body(checked: CheckedRequest) -> Any:
    """The reply, with all that the protocol relies on."""
    assert checked.status == 200
    body = json.loads(checked.reply)
    (choice,) = body["choices"]
    assert isinstance(choice["message"]["content"], str)
    assert choice["finish_reason"] in ("stop", "length")
    used = body["usage"]
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"] > 0
    return choice


def test_verdicts_in_words_of_a_real_judge_are_read(judge: Judge) -> None:
    checked = judge.checked(**YES_OR_NO, extra=judge.bias(["yes", "no"]))
    for one in checked:
        choice = _body(one)
        assert choice["finish_reason"] == "stop"
        assert list(one.scores) == [{"yes": 1.0, "no": 0.0}[choice["message"]["content"]]]
        assert one.problem == ""
    with judge.reward(**YES_OR_NO, extra=judge.bias(["yes", "no"])) as reward:
        scores = reward(prompts=[PROMPT] * len(ANSWERS), completions=ANSWERS)
        assert scores == [one.scores[0] for one in checked]
        assert reward.statistics.tokens == sum(
            json.loads(one.reply)["usage"]["total_tokens"] for one in checked
        )


def test_numbers_of_a_real_judge_are_read_or_left_alone(judge: Judge) -> None:
    for one in judge.checked(**DIGITS, extra=judge.bias([str(digit) for digit in range(10)])):
        choice = _body(one)
        written = choice["message"]["content"]
        if choice["finish_reason"] == "length" or not 0 <= int(written) <= 10:
            assert (list(one.scores), bool(one.problem)) == ([], True)
        else:
            assert list(one.scores) == [int(written) / 10]


@pytest.mark.parametrize("verdict", ["mark", "json_schema"])
def test_judge_that_is_cut_off_scores_nothing(judge: Judge, verdict: str) -> None:
    (first, *_) = judge.checked(verdict=verdict, max_tokens=8)
    assert _body(first)["finish_reason"] == "length"
    assert first.problem == "the judge did not finish: raise `max_tokens`"
    with judge.reward(verdict=verdict, max_tokens=8) as reward:
        assert reward(prompts=[PROMPT] * 2, completions=ANSWERS[:2]) == [None, None]
        assert reward.statistics.unscored_fraction == 1
        assert (reward.statistics.requests, reward.statistics.retries) == (4, 2)


@pytest.mark.parametrize(
    ("verdict", "problem"),
    [("mark", "there are 0 verdicts"), ("json_schema", "is not JSON")],
)
def test_word_without_the_form_of_a_verdict_scores_nothing(
    judge: Judge, verdict: str, problem: str
) -> None:
    # `response_format` of json_schema is taken by this server, and has no effect.
    (first, *_) = judge.checked(verdict=verdict, extra=judge.bias(["yes", "no"]))
    assert _body(first)["finish_reason"] == "stop"
    assert problem in first.problem
    assert list(first.scores) == []


def test_model_that_is_not_served_is_refused(judge: Judge) -> None:
    with (
        judge.reward(model="gpt-9") as reward,
        pytest.raises(RewardError, match=r"HTTP 400.*pinned"),
    ):
        reward(prompts=[PROMPT], completions=["4"])
