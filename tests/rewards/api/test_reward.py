"""The reward as a user has it, with a real service on this machine."""

from __future__ import annotations

import copy
import gc
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rewards.api.services import Lengths, Service, right, serving

from trl_grpo_ext.errors import ConfigurationError, RewardError
from trl_grpo_ext.rewards.api.reward import APIReward
from trl_grpo_ext.rewards.api.settings import APISettings
from trl_grpo_ext.rewards.api.statistics import RewardStatistics
from trl_grpo_ext.rewards.registry import required_columns

KEY = "sk-tell-nobody"
FAST: dict[str, Any] = {"backoff_s": 0.01, "max_attempts": 2, "cache": False}


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as running:
        yield running


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("reward ")]


def test_reward_is_called_as_trl_calls_it(service: Service) -> None:
    logged: dict[str, float] = {}
    with APIReward(
        service.url, protocol=Lengths(), log_as="length", price_per_million_tokens=1e5, **FAST
    ) as reward:
        chat = [{"role": "user", "content": "p"}]
        scores = reward(
            prompts=[chat, chat, ["q"]],
            completions=[
                [{"role": "assistant", "content": "four"}],
                [{"role": "assistant", "content": "a"}],
                "as text",
            ],
            completion_ids=[[1], [2], [3]],
            answer=["x", "y", "z"],
            trainer_state=object(),
            log_extra=print,
            log_metric=logged.__setitem__,
        )
    assert scores == [4.0, 1.0, 7.0]
    assert logged["rewards/length/requests"] == 3
    assert logged["rewards/length/tokens"] == 30
    assert logged["rewards/length/cost"] == pytest.approx(3.0)
    assert logged["rewards/length/unscored_fraction"] == 0
    assert 0 < logged["rewards/length/latency_p50_s"] <= logged["rewards/length/latency_p95_s"]
    assert reward.statistics.requests == 3


def test_no_completions_have_no_scores(service: Service) -> None:
    with APIReward(service.url, protocol=Lengths(), **FAST) as reward:
        assert reward(prompts=[], completions=[]) == []
    assert service.asked == []


def test_statistics_are_of_the_last_call(service: Service) -> None:
    with APIReward(service.url, protocol=Lengths(), **FAST) as reward:
        assert reward.statistics == RewardStatistics()
        reward(prompts=["p", "p"], completions=["a", "b"])
        reward(prompts=["p"], completions=["c"])
        assert reward.statistics.requests == 1


def test_outage_is_none_and_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with (
        serving(lambda _: (503, {}, b"")) as service,
        APIReward(service.url, protocol=Lengths(), log_as="helpful", **FAST) as reward,
        caplog.at_level(logging.WARNING),
    ):
        assert reward(prompts=["p", "p"], completions=["a", "b"]) == [None, None]
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("trl_grpo_ext")]
    assert "reward 'helpful' got no score for 2 of 2 completions from http://127.0.0.1" in message
    assert "(mostly: HTTP 503)" in message
    assert "Their score is None, not 0." in message
    assert reward.statistics.unscored_fraction == 1
    assert reward.statistics.retries == 2


def test_service_that_is_not_there_takes_bounded_time() -> None:
    with serving() as service:
        address = service.url
    started = time.monotonic()
    options = {**FAST, "max_attempts": 10**6, "deadline_s": 1.0}
    with APIReward(address, protocol=Lengths(), **options) as reward:
        assert reward(prompts=["p"] * 20, completions=list("abcdefghijklmnopqrst")) == [None] * 20
    assert time.monotonic() - started < 5


def test_wrong_key_raises_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def refuse(asked: Any) -> Any:
        return 401, {}, f"no such key: {asked.headers['Authorization']}".encode()

    with (
        serving(refuse) as service,
        APIReward(service.url, protocol=Lengths(), api_key_env="JUDGE_KEY", **FAST) as reward,
        pytest.raises(RewardError) as caught,
    ):
        reward(prompts=["p"], completions=["a"])
    assert "no such key: Bearer ***" in str(caught.value)
    assert service.asked[0].headers["Authorization"] == f"Bearer {KEY}"


def test_key_is_in_no_text_and_no_pickle(monkeypatch: pytest.MonkeyPatch, service: Service) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with APIReward(service.url, protocol=Lengths(), api_key_env="JUDGE_KEY", **FAST) as reward:
        reward(prompts=["p"], completions=["a"])
        assert KEY not in repr(reward) + repr(vars(reward))
        assert "JUDGE_KEY" in repr(reward)
        assert KEY.encode() not in pickle.dumps(reward)


def test_all_problems_are_said_before_any_request() -> None:
    with pytest.raises(ConfigurationError) as caught:
        APIReward(
            "http://judge.example",
            protocol="openai_chatt",
            max_attempts=0,
            api_key_env="NOT_SET_ANYWHERE",
        )
    found = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for part in ("not encrypted", "max_attempts", "NOT_SET_ANYWHERE", "openai_chatt"):
        assert part in found


def test_options_beside_a_protocol_object_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="the options model are neither"):
        APIReward("https://judge.example", protocol=Lengths(), model="m")


def test_protocol_is_chosen_by_name_with_its_options() -> None:
    reward = APIReward(
        "https://judge.example/v1", protocol="openai_chat", model="judge-70b", deadline_s=9.0
    )
    assert reward.settings == APISettings(("https://judge.example/v1",), deadline_s=9.0)
    assert reward.protocol.requests([]) == []
    assert reward.__name__.startswith("openai_chat")


class Named(Lengths):
    """No other test has rewards of this name."""


def test_names_of_living_rewards_differ() -> None:
    first = APIReward("https://a.example", protocol=Named())
    second = APIReward("https://b.example", protocol=Named())
    assert (first.__name__, second.__name__) == ("Named", "Named_2")
    del first
    gc.collect()
    third = APIReward("https://c.example", protocol=Named())
    assert third.__name__ == "Named"
    assert APIReward("https://c.example", protocol=Named(), log_as="mine").__name__ == "mine"
    assert second.__name__ == "Named_2"


def test_columns_that_the_protocol_needs_are_known() -> None:
    assert required_columns(APIReward("https://a.example", protocol=Lengths())) == frozenset()


def test_columns_of_another_length_are_refused(service: Service) -> None:
    with (
        APIReward(service.url, protocol=Lengths(), **FAST) as reward,
        pytest.raises(RewardError, match="got 1 values of the column 'answer' for 2 completions"),
    ):
        reward(prompts=["p", "p"], completions=["a", "b"], answer=["x"])


def test_submitted_completions_are_only_collected(service: Service) -> None:
    with APIReward(service.url, protocol=Lengths(), **FAST) as reward:
        row = {"prompt": "p", "answer": "x"}
        for _ in range(2):
            for index, text in enumerate(["a", "bb"]):
                reward.submit(row=row, completion=text, completion_ids=[1], group_index=index)
        until = time.monotonic() + 20
        while len(service.asked) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        scores = reward(prompts=["p", "p"], completions=["a", "bb"], answer=["x", "x"])
    assert scores == [1.0, 2.0]
    assert len(service.asked) == 2


def test_scores_are_kept_for_the_next_process(service: Service, tmp_path: Path) -> None:
    def figures(**options: Any) -> tuple[int, int]:
        settings = {**FAST, "cache": None, "cache_dir": tmp_path, **options}
        protocol = settings.pop("protocol", Lengths())
        with APIReward(service.url, protocol=protocol, **settings) as reward:
            assert reward(prompts=["p"], completions=["abc"]) == [3.0]
            return reward.statistics.requests, reward.statistics.cache_hits

    assert figures() == (1, 0)
    assert figures() == (0, 1)
    assert figures(cache=False) == (1, 0)
    assert figures(protocol=Lengths(rubric="other")) == (1, 0)
    assert figures(protocol=Lengths(is_sampled=True)) == (1, 0)
    assert figures(protocol=Lengths(is_sampled=True)) == (1, 0)
    assert figures(protocol=Lengths(is_sampled=True), cache=True) == (1, 0)
    assert figures(protocol=Lengths(is_sampled=True), cache=True) == (0, 1)
    assert KEY.encode() not in (tmp_path / "cache.db").read_bytes()


def test_threads_share_one_reward(service: Service) -> None:
    found: dict[int, list[float | None]] = {}
    with APIReward(service.url, protocol=Lengths(), **FAST) as reward:

        def call(number: int) -> None:
            texts = ["a" * (number + extra) for extra in range(5)]
            found[number] = reward(prompts=["p"] * 5, completions=texts)

        callers = [threading.Thread(target=call, args=(number,)) for number in range(8)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(threads()) == 1
    assert found == {n: [float(n + extra) for extra in range(5)] for n in range(8)}


def test_thread_and_sockets_end_with_close_and_with_the_object(service: Service) -> None:
    def sockets() -> int:
        connections = psutil.Process().net_connections(kind="inet")
        port = int(service.url.rpartition(":")[2])
        return sum(bool(c.raddr) and c.raddr.port == port for c in connections)

    reward = APIReward(service.url, protocol=Lengths(), **FAST)
    for end in (reward.close, lambda: None):
        assert reward(prompts=["p"], completions=["a"]) == [1.0]
        assert len(threads()) == 1
        assert sockets() == 1
        end()
    del reward, end
    gc.collect()
    assert threads() == []
    assert sockets() == 0


def test_copies_and_unpickled_rewards_ask_on_their_own(service: Service) -> None:
    with APIReward(service.url, protocol=Lengths(), log_as="mine", **FAST) as reward:
        reward(prompts=["p"], completions=["a"])
        for other in (pickle.loads(pickle.dumps(reward)), copy.deepcopy(reward)):
            with other:
                assert other(prompts=["p"], completions=["bb"]) == [2.0]
                assert other.__name__ == "mine"
        assert reward(prompts=["p"], completions=["ccc"]) == [3.0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_process_asks_on_its_own_and_leaves_the_parent_alone(service: Service) -> None:
    with APIReward(service.url, protocol=Lengths(), **FAST) as reward:
        assert reward(prompts=["p"], completions=["a"]) == [1.0]
        results = multiprocessing.get_context("fork").SimpleQueue()

        def child() -> None:
            results.put(reward(prompts=["p"], completions=["bb"]))
            reward.close()
            gc.collect()

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(60)
        assert process.exitcode == 0
        assert results.get() == [2.0]
        assert reward(prompts=["p"] * 9, completions=["ccc"] * 9) == [3.0] * 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_clean_up_in_a_forked_process_does_not_reach_the_parent(service: Service) -> None:
    with APIReward(service.url, protocol=Lengths(), **FAST) as reward:
        assert reward(prompts=["p"], completions=["a"]) == [1.0]
        session = reward.session()
        watched = list(session._selector.get_map())

        def child() -> None:
            for descriptor in watched:  # as freeing the loop and its sockets would do
                session._loop.remove_reader(descriptor)
            assert reward(prompts=["p"], completions=["bb"]) == [2.0]

        process = multiprocessing.get_context("fork").Process(target=child)
        with reward._lock:  # as if another thread was about to ask
            process.start()
        process.join(20)
        process.kill()
        assert process.exitcode == 0
        future = session.start(lambda scorer: scorer.collect([]))
        assert future.result(timeout=20).scores == []


EXIT = """
import sys, os
sys.path[:0] = sys.argv[2:]
from rewards.api.services import Lengths
from trl_grpo_ext.rewards.api.reward import APIReward
reward = APIReward(sys.argv[1], protocol=Lengths(), cache=False)
print(reward(prompts=["p"], completions=["four"]))
reward.submit(row={"prompt": "p"}, completion="under way")
if os.fork() == 0:
    sys.exit()  # runs the clean-up of the interpreter, with what it got from the parent
assert os.wait()[1] == 0
print(reward(prompts=["p"], completions=["a"]))
"""


def test_process_ends_at_once_and_silently(service: Service) -> None:
    def slow(asked: Any) -> Any:
        time.sleep(3.0 if "under way" in asked.payload["texts"][0] else 0)
        return right(asked)

    service.answer = slow
    root = Path(__file__).parents[3]
    started = time.monotonic()
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning"]
    ran = subprocess.run(
        [*command, "-c", EXIT, service.url, str(root), str(root / "tests")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "[4.0]\n[1.0]\n", "")
    assert time.monotonic() - started < 30


def test_reward_runs_in_the_plain_trainer(
    service: Service, tiny_model_dir: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with APIReward(service.url, protocol=Lengths(), log_as="length", **FAST) as reward:
        trainer = GRPOTrainer(
            str(tiny_model_dir),
            reward_funcs=reward,
            processing_class=tiny_tokenizer,
            train_dataset=Dataset.from_dict({"prompt": ["2 + 2 ="] * 4, "answer": ["4"] * 4}),
            args=GRPOConfig(
                output_dir=str(tmp_path),
                max_steps=1,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=4,
                report_to=[],
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                bf16=False,
            ),
        )
        trainer.train()
    (logged,) = [line for line in trainer.state.log_history if "rewards/length/requests" in line]
    assert logged["rewards/length/unscored_fraction"] == 0
    assert (
        logged["rewards/length/mean"]
        == pytest.approx(
            sum(len(a.payload["texts"][0].partition("|")[2]) for a in service.asked) / 4
        )
        or logged["rewards/length/requests"] < 4
    )  # equal completions are asked once
    assert json.dumps(service.asked[0].payload["texts"]).startswith('["2 + 2 =|')
