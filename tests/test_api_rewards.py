"""A reward that a service gives is the reward that a function would give, early, late or not."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rewards.api.services import Asked, Lengths, Service, serving
from runs import series, settings, train, vowels

from trl_grpo_ext import ExtGRPOConfig, ExtGRPOTrainer
from trl_grpo_ext.checkpointing import damage
from trl_grpo_ext.errors import ConfigurationError, RewardOutageError
from trl_grpo_ext.rewards import APIReward
from trl_grpo_ext.signals import TrainingInterrupted

FAST: dict[str, Any] = {"backoff_s": 0.001, "max_attempts": 2, "cache": False}
UNCERTAIN = ("time", "runtime", "per_second", "train_loss", "latency", "retries", "requests")
ENGINES = ("shared_prefill", "continuous_batching", "transformers")

Answer = tuple[int, Mapping[str, str], bytes]


def scored(asked: Asked) -> Answer:
    """The reward `vowels`, of a service; the prompt stands before the first bar."""
    texts = [text.partition("|")[2] for text in asked.payload["texts"]]
    return 200, {}, json.dumps({"scores": vowels(completions=texts)}).encode()


def reward_of(service: Service, **options: Any) -> APIReward:
    return APIReward(service.url, protocol=Lengths(), **{**FAST, "log_as": "vowels", **options})


def build(model: Path, out: Path, rewards: Any, **changes: Any) -> ExtGRPOTrainer:
    config = ExtGRPOConfig(**settings(out, **{"output_dir": str(out)} | changes))
    prompts: list[Any] = [f"{a} + {a} =" for a in range(8)]
    if changes.get("chat_template_kwargs"):
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    evaluated = None
    if config.eval_strategy != "no":
        evaluated = Dataset.from_dict({"prompt": prompts[:2]})
    return ExtGRPOTrainer(
        str(model), rewards, config, Dataset.from_dict({"prompt": prompts}), evaluated
    )


def outcome(trainer: ExtGRPOTrainer) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in UNCERTAIN)}
        for entry in trainer.state.log_history
    ]


def assert_same_weights(trainer: ExtGRPOTrainer, other: ExtGRPOTrainer) -> None:
    for name, weight in other.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], weight), name


class Broken:
    """Breaks off after ``after`` answers, until it is mended."""

    def __init__(self, after: int) -> None:
        self.left: float = after
        self.given: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, asked: Asked) -> Answer:
        with self._lock:
            self.left -= 1
            if self.left < 0:
                return 503, {}, b"maintenance"
            self.given += asked.payload["texts"]
        return scored(asked)


# Overlap ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *({"group_sampler": engine} for engine in ENGINES),
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"dynamic_sampling": True},
        {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 5},
        {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4},
    ],
    ids=str,
)
def test_a_service_trains_as_a_function_does(
    tiny_model_dir: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    def trained(name: str, reward: Any, **more: Any) -> ExtGRPOTrainer:
        trainer = build(tiny_model_dir, tmp_path / name, reward, **options, **more)
        trainer.train()
        return trainer

    with serving(scored) as service:
        local = trained("local", lambda **columns: vowels(**flat(columns)))
        early = trained("early", reward_of(service))
        late = trained("late", reward_of(service), overlap_rewards=False)
    losses = series(local.state.log_history, "loss")
    assert len(set(losses)) > 1
    assert losses == series(early.state.log_history, "loss")
    assert losses == series(late.state.log_history, "loss")
    assert_same_weights(early, local)
    assert_same_weights(late, local)


def flat(columns: dict[str, Any]) -> dict[str, Any]:
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in columns["completions"]]
    return {"completions": texts}


def noted(prompt: Any, completion: Any, ids: list[int], place: int) -> tuple[str, ...]:
    return str(prompt), str(completion), str(ids), str(place)


class Observer:
    """A reward with `submit`, which notes what happens when."""

    __name__ = "observer"

    def __init__(self) -> None:
        self.events: list[Any] = []

    def submit(self, *, row: Any, completion: Any, completion_ids: Any, group_index: int) -> None:
        self.events.append(noted(row["prompt"], completion, completion_ids, group_index))

    def __call__(
        self, *, prompts: Any, completions: Any, completion_ids: Any, **_: Any
    ) -> list[float]:
        rows = enumerate(zip(prompts, completions, completion_ids, strict=True))
        self.events.append([noted(*row, index % 4) for index, row in rows])
        return vowels(**flat({"completions": completions}))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("chat", [False, True])
def test_completions_are_submitted_before_they_are_collected(
    tiny_model_dir: Path, tmp_path: Path, engine: str, chat: bool
) -> None:
    """While others are sampled where our sampler runs, and again when all are there."""
    observer = Observer()
    options = {"group_sampler": engine, "max_steps": 1, "max_completion_length": 24}
    options |= {"chat_template_kwargs": {"enable_thinking": False}} if chat else {}
    trainer = build(tiny_model_dir, tmp_path, observer, **options)
    sample = trainer.sample_completions

    def sampled(*args: Any) -> Any:
        found = sample(*args)
        observer.events.append("sampled")
        return found

    trainer.sample_completions = sampled  # type: ignore[method-assign]
    trainer.train()
    *events, called = observer.events
    assert len(called) == 8
    if engine != "transformers":
        while_sampling, events = events[:8], events[9:]
        assert observer.events[8] == "sampled"
        assert sorted(while_sampling) == sorted(called)
        if engine == "shared_prefill":
            assert while_sampling != called  # the short ones first
    assert events == called


def test_nothing_is_submitted_without_overlap(tiny_model_dir: Path, tmp_path: Path) -> None:
    observer = Observer()
    build(tiny_model_dir, tmp_path, observer, max_steps=1, overlap_rewards=False).train()
    assert [type(event) for event in observer.events] == [list]


def test_the_group_is_that_of_training(tiny_model_dir: Path, tmp_path: Path) -> None:
    """While it samples, the model is in evaluation mode; its groups may have another size there."""
    observer = Observer()
    options = {"num_generations": 8, "num_generations_eval": 4, "max_steps": 1}
    build(tiny_model_dir, tmp_path, observer, **options).train()
    places = {event[3] for event in observer.events[:8]}
    assert places == {str(place) for place in range(8)}


def test_columns_of_any_name_reach_a_reward(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Also those that are called like our own arguments."""
    seen = []

    def noting(*, prompts: list[str], reward: list[int], known: list[int], **_: Any) -> list[float]:
        seen.extend(zip(prompts, reward, known, strict=True))
        return [0.0] * len(prompts)

    rows = {"prompt": ["a", "b"], "reward": [1, 2], "known": [3, 4], "gather": [5, 6]}
    config = ExtGRPOConfig(**settings(tmp_path, max_steps=1))
    ExtGRPOTrainer(str(tiny_model_dir), noting, config, Dataset.from_dict(rows)).train()
    assert set(seen) == {("a", 1, 3), ("b", 2, 4)}


class GroupObserver(Observer):
    needs_group = True

    def submit_group(self, *, row: Any, completions: list[Any]) -> None:
        self.events.append((row["prompt"], *completions))


def test_groups_are_submitted_whole(tiny_model_dir: Path, tmp_path: Path) -> None:
    observer = GroupObserver()
    build(tiny_model_dir, tmp_path, observer, max_steps=1).train()
    *submitted, called = observer.events
    groups = [(called[at][0], *(row[1] for row in called[at : at + 4])) for at in (0, 4)]
    assert set(submitted) == set(groups)


def test_a_group_reward_need_not_be_early(tiny_model_dir: Path, tmp_path: Path) -> None:
    class WholeGroups:
        __name__ = "whole_groups"
        needs_group = True

        def __call__(self, *, completions: list[str], **_: Any) -> list[float]:
            return vowels(completions=completions)

    trainer = build(tiny_model_dir, tmp_path, WholeGroups(), max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


# Outages ------------------------------------------------------------------------------------------


@contextmanager
def undisturbed(model: Path, out: Path, **options: Any) -> Iterator[ExtGRPOTrainer]:
    with serving(scored) as service:
        trainer = build(model, out, reward_of(service), **options)
        trainer.train()
        yield trainer


@pytest.mark.parametrize(
    ("options", "after"),
    [
        ({}, 13),
        ({}, 3),
        ({"overlap_rewards": False}, 13),
        ({"dynamic_sampling": True}, 13),
        ({"steps_per_generation": 2, "num_iterations": 2, "max_steps": 5}, 21),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, 21),
    ],
    ids=str,
)
def test_an_outage_stops_the_run_and_the_resume_asks_for_the_rest(
    tiny_model_dir: Path, tmp_path: Path, options: dict[str, Any], after: int
) -> None:
    broken = Broken(after)
    with (
        undisturbed(tiny_model_dir, tmp_path / "alone", **options) as alone,
        serving(broken) as service,
    ):
        first = build(tiny_model_dir, tmp_path / "ended", reward_of(service), **options)
        with pytest.raises(RewardOutageError) as ended:
            first.train()
        message = str(ended.value)
        assert "'vowels'" in message
        assert "(HTTP 503)" in message
        assert "resume_from_checkpoint: last-good" in message
        (checkpoint,) = (tmp_path / "ended").glob("checkpoint-*")
        assert f"Saved {checkpoint}" in message
        assert damage(checkpoint) is None
        broken.left = float("inf")
        resumed = build(tiny_model_dir, tmp_path / "ended", reward_of(service), **options)
        resumed.train("last-good")
    assert_same_weights(resumed, alone)
    assert outcome(resumed) == outcome(alone)
    if options.get("gradient_accumulation_steps") != 2:  # the second generation is drawn again
        assert len(broken.given) == len(set(broken.given))


def test_an_outage_in_an_evaluation(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    broken = Broken(18)  # 16 completions are trained on
    with (
        undisturbed(tiny_model_dir, tmp_path / "alone", **options) as alone,
        serving(broken) as service,
    ):
        first = build(tiny_model_dir, tmp_path / "ended", reward_of(service), **options)
        with pytest.raises(RewardOutageError, match="After step 2"):
            first.train()
        with pytest.raises(RewardOutageError, match="have no score"):
            first.evaluate()  # no run, so nothing to save
        broken.left = float("inf")
        resumed = build(tiny_model_dir, tmp_path / "ended", reward_of(service), **options)
        resumed.train("last-good")
    assert_same_weights(resumed, alone)
    assert outcome(resumed) == outcome(alone)


def test_a_refusal_in_the_middle_of_a_run_loses_nothing(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Such as of a key that expired."""
    expired = Broken(8)

    def answer(asked: Asked) -> Answer:
        status, headers, body = expired(asked)
        return (401 if status == 503 else status), headers, body

    with (
        undisturbed(tiny_model_dir, tmp_path / "alone") as alone,
        serving(answer) as service,
    ):
        first = build(tiny_model_dir, tmp_path / "ended", reward_of(service), on_outage="continue")
        with pytest.raises(RewardOutageError, match=r"HTTP 401: maintenance.* Saved "):
            first.train()
        expired.left = float("inf")
        resumed = build(tiny_model_dir, tmp_path / "ended", reward_of(service))
        resumed.train("last-good")
    assert_same_weights(resumed, alone)


def test_waiting_for_a_service(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, calls = Broken(11), []
    monkeypatch.setattr("trl_grpo_ext._trl.rewards._PAUSE_S", 0.0)

    def plain(**columns: Any) -> list[float]:
        calls.append(1)
        if broken.left < 0:
            threading.Timer(0.5, lambda: setattr(broken, "left", float("inf"))).start()
        return [0.0] * len(columns["prompts"])

    with (
        undisturbed(tiny_model_dir, tmp_path / "alone") as alone,
        serving(broken) as service,
    ):
        options = {"on_outage": "wait", "reward_weights": [1.0, 0.0]}
        trainer = build(tiny_model_dir, tmp_path / "out", [reward_of(service), plain], **options)
        trainer.train()
    assert_same_weights(trainer, alone)
    assert len(broken.given) == len(set(broken.given)) == 24
    assert len(calls) == 3  # a plain function is asked once


def test_continuing_trains_on_what_was_scored(tiny_model_dir: Path, tmp_path: Path) -> None:
    with serving(Broken(14)) as service:
        trainer = build(
            tiny_model_dir, tmp_path, reward_of(service), on_outage="continue", max_steps=3
        )
        history, _ = train(trainer)
    assert series(history, "rewards/excluded_fraction") == [0.0, 0.25, 1.0]
    assert series(history, "grad_norm")[1] > 0


@pytest.mark.parametrize("on_missing", ["exclude", "skip"])
def test_a_completion_that_one_reward_misses(
    tiny_model_dir: Path, tmp_path: Path, on_missing: str
) -> None:
    """Left out of its group, or judged by the other reward alone, as in plain TRL."""

    def answer(asked: Asked) -> Answer:
        missing = "e" in asked.payload["texts"][0].partition("|")[2]
        return (503, {}, b"") if missing else scored(asked)

    def constant(*, prompts: list[Any], **_: Any) -> list[float]:
        return [1.0] * len(prompts)

    with serving(answer) as service:
        rewards = [reward_of(service, on_missing=on_missing), constant]
        trainer = build(tiny_model_dir, tmp_path, rewards, max_steps=1, on_outage="continue")
        trainer.train()
    table = zip(trainer._logs["completion"], trainer._logs["advantages"], strict=True)
    advantages = [advantage for text, advantage in table if "e" in text]
    assert any(advantages) == (on_missing == "skip")  # there as if the service had said 0
    missed = sum("e" in text for text in trainer._logs["completion"])
    assert 0 < missed < 8
    (entry,) = [e for e in trainer.state.log_history if "reward" in e]
    if on_missing == "exclude":
        assert entry["rewards/excluded_fraction"] == missed / 8
    else:
        assert "rewards/excluded_fraction" not in entry


def test_sigterm_while_answers_are_awaited(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The run does not wait for the service: it keeps the scores it has."""
    hanging = threading.Event()

    def answer(asked: Asked) -> Answer:
        slow.append(1)
        if len(slow) > 12 and not hanging.is_set():
            os.kill(os.getpid(), signal.SIGTERM) if len(slow) == 13 else None
            hanging.wait(60)
            return 503, {}, b""
        given.extend(asked.payload["texts"])
        return scored(asked)

    slow: list[int] = []
    given: list[str] = []
    with (
        undisturbed(tiny_model_dir, tmp_path / "alone") as alone,
        serving(answer) as service,
    ):
        first = build(tiny_model_dir, tmp_path / "ended", reward_of(service, max_concurrent=1))
        began = time.monotonic()
        with pytest.raises(TrainingInterrupted) as ended:
            first.train()
        assert time.monotonic() - began < 30
        assert ended.value.code == 143
        hanging.set()
        first.reward_funcs[0].close()  # type: ignore[union-attr]
        resumed = build(tiny_model_dir, tmp_path / "ended", reward_of(service))
        resumed.train("last-good")
    assert_same_weights(resumed, alone)
    assert len(given) == len(set(given))


def test_scores_on_disk_are_not_asked_for_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    """After a kill nothing but the cache and the last checkpoint is there."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    kept = {"cache": True, "cache_dir": tmp_path / "scores"}
    with serving(scored) as service:
        alone = build(tiny_model_dir, tmp_path / "alone", reward_of(service, **kept), **options)
        alone.train()
        num_asked = len(service.asked)
        again = build(tiny_model_dir, tmp_path / "again", reward_of(service, **kept), **options)
        again.train(str(tmp_path / "alone" / "checkpoint-1"))
        assert len(service.asked) == num_asked
    assert_same_weights(again, alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_unscored_fraction": 2.0}, "`max_unscored_fraction` is 2.0, which is no share"),
        ({"on_outage": "zero"}, "on_outage"),
    ],
)
def test_options_that_cannot_work(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ExtGRPOConfig(**settings(tmp_path, **options))


def test_missing_must_mean_something() -> None:
    with pytest.raises(ConfigurationError, match="`on_missing`='zero' is not known"):
        APIReward("http://127.0.0.1:1", protocol=Lengths(), on_missing="zero")  # type: ignore[arg-type]


def test_kept_scores_are_of_their_reward(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A run that goes on with other rewards asks for all of them."""
    broken = Broken(11)
    with serving(broken) as service:
        first = build(tiny_model_dir, tmp_path, reward_of(service))
        with pytest.raises(RewardOutageError):
            first.train()
        broken.left = float("inf")
        del broken.given[:]
        rewards = [lambda **columns: vowels(**columns), reward_of(service, log_as="another")]
        build(tiny_model_dir, tmp_path, rewards).train("last-good")
    assert len(broken.given) == 16


def test_kept_completions_are_of_their_prompts(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that goes on with other data draws and asks anew."""
    broken = Broken(11)
    with serving(broken) as service:
        with pytest.raises(RewardOutageError):
            build(tiny_model_dir, tmp_path, reward_of(service)).train()
        broken.left = float("inf")
        del broken.given[:]
        config = ExtGRPOConfig(**settings(tmp_path, output_dir=str(tmp_path)))
        other = Dataset.from_dict({"prompt": [f"{a} * {a} =" for a in range(8)]})
        reward = reward_of(service)
        ExtGRPOTrainer(str(tiny_model_dir), reward, config, other).train("last-good")
    assert "are of other prompts, so they are drawn and scored anew" in caplog.text
    assert len(broken.given) == 16
    assert all("*" in text for text in broken.given)


@pytest.mark.parametrize("decoding", ["greedy", "both"])
def test_what_cannot_be_compared_is_no_outage(
    tiny_model_dir: Path, tmp_path: Path, decoding: str
) -> None:
    """A ranking has nothing to say about a single completion of a prompt."""

    def ranked(asked: Asked) -> Answer:
        text = asked.payload["messages"][-1]["content"]
        num_texts = text.count("<response_")
        content = json.dumps({"ranking": list(range(1, num_texts + 1))})
        body = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
        return 200, {}, json.dumps(body).encode()

    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_decoding": decoding}
    options |= {"max_steps": 1, "per_device_eval_batch_size": 4}
    with serving(ranked) as service:
        judge = APIReward(
            service.url,
            protocol="openai_ranking",
            model="judge",
            rubric="the first",
            verdict="json_schema",
            **FAST,
        )
        trainer = build(tiny_model_dir, tmp_path, judge, **options)
        trainer.train()
    assert trainer.state.global_step == 1
