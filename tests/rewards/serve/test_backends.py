from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from trl_grpo_ext.errors import ConfigurationError, RewardError
from trl_grpo_ext.rewards.serve.backends import FunctionBackend, ModelBackend, build_backend
from trl_grpo_ext.rewards.serve.model import load_classifier
from trl_grpo_ext.rewards.serve.settings import ServeSettings
from trl_grpo_ext.rewards.serve.wire import (
    Classified,
    ClassifyRequest,
    RefusedError,
    RewardRequest,
    Rewards,
)


def rewards_of(reward: Callable[..., Any], asked: RewardRequest, **arguments: Any) -> Rewards:
    backend = FunctionBackend(reward, **arguments)
    try:
        return asyncio.run(backend.rewards(asked))
    finally:
        backend.close()


def test_function_gets_completions_without_their_prompts_and_labels_as_the_answer() -> None:
    calls: list[dict[str, Any]] = []

    def reward(*, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append({"prompts": prompts, "completions": completions, **columns})
        return [1.0, 0.5]

    asked = RewardRequest(["1+1=2", "aa"], ["1+1=", "a"], ["2", None])
    assert rewards_of(reward, asked).rewards == [1.0, 0.5]
    [call] = calls
    assert set(call) == {"prompts", "completions", "answer", "log_metric", "log_extra"}
    assert (call["prompts"], call["completions"]) == (["1+1=", "a"], ["2", "a"])
    assert call["answer"] == ["2", None]

    rewards_of(reward, asked, label_column="gold")
    assert calls[1]["gold"] == ["2", None]
    rewards_of(reward, RewardRequest(["ab", "ac"], ["a", "a"]))
    assert "answer" not in calls[2]


def test_function_may_be_asynchronous_and_log() -> None:
    async def reward(*, completions: list[str], log_metric: Any, **columns: Any) -> list[Any]:
        await asyncio.sleep(0)
        log_metric("longest", max(map(len, completions)))
        return [None, float("nan")]

    scored = rewards_of(reward, RewardRequest(["abc", "a"], ["a", ""]))
    assert scored == Rewards([None, None], {"longest": 2.0})


def test_built_in_reward_is_served_by_its_name() -> None:
    backend = build_backend(ServeSettings(reward="number_distance", reward_arguments={"span": 4}))
    asked = RewardRequest(["5+2=6", "5+2=none"], ["5+2=", "5+2="], ["7", 7])
    assert asyncio.run(backend.rewards(asked)).rewards == [0.75, 0.0]
    backend.close()


def test_function_cannot_be_asked_without_what_it_needs() -> None:
    def graded(*, completions: Sequence[str], answer: list[str], **columns: Any) -> list[float]:
        raise AssertionError

    with pytest.raises(RefusedError, match="`prompts` is missing"):
        rewards_of(graded, RewardRequest(["ab"], None, ["b"]))
    with pytest.raises(RefusedError, match=r"`query`\[1\] does not open with `prompts`\[1\]"):
        rewards_of(graded, RewardRequest(["ab", "ab"], ["a", "b"], ["b", "b"]))
    with pytest.raises(RefusedError, match="The reward needs `answer`"):
        rewards_of(graded, RewardRequest(["ab"], ["a"]))


def test_function_that_needs_what_no_request_has_is_refused_at_the_start() -> None:
    def by_tokens(*, completions: Any, completion_ids: Any, tests: Any, **columns: Any) -> Any: ...

    with pytest.raises(ConfigurationError, match="'by_tokens' needs `completion_ids`, `tests`"):
        FunctionBackend(by_tokens)
    with pytest.raises(ConfigurationError, match=r"needs `completion_ids`, but"):
        FunctionBackend(by_tokens, label_column="tests")


def test_function_that_returns_no_scores_is_an_error_of_the_server() -> None:
    with pytest.raises(RewardError, match="returned 1 rewards, but 2"):
        rewards_of(lambda **columns: [1.0], RewardRequest(["a", "b"], ["", ""]))


def test_function_classifies_texts_as_completions_of_an_empty_prompt() -> None:
    def length(*, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        assert prompts == ["", ""]
        return [float(len(completion)) for completion in completions]

    backend = FunctionBackend(length)
    scored = asyncio.run(backend.classify(ClassifyRequest(["abc", ""])))
    assert scored == [Classified([3.0], 0), Classified([0.0], 0)]
    backend.close()


def test_model_with_several_labels_needs_the_one_that_is_the_reward(
    three_labels_dir: Path,
) -> None:
    classifier = load_classifier(ServeSettings(model=str(three_labels_dir), device="cpu"))
    [expected] = classifier.logits(classifier.encode(["12"]))
    backend = ModelBackend(classifier, settings=ServeSettings(label=1))
    scored = asyncio.run(backend.rewards(RewardRequest(["12"])))
    assert scored.rewards == pytest.approx(expected[1:2], abs=1e-6)
    backend.close()

    backend = ModelBackend(classifier, settings=ServeSettings())
    with pytest.raises(RefusedError, match="several labels"):
        asyncio.run(backend.rewards(RewardRequest(["12"])))
    backend.close()
    with pytest.raises(ConfigurationError, match=r"`label`=3 is no logit .* from 0 to 2"):
        ModelBackend(classifier, settings=ServeSettings(label=3))
