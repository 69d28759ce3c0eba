"""What answers a server's requests: a model, or a reward function."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.models.passes import plan_passes
from trl_grpo_ext.rewards.registry import (
    RewardFunction,
    RewardSpec,
    build_rewards,
    log_name,
    required_columns,
)
from trl_grpo_ext.rewards.scores import Score, checked_scores
from trl_grpo_ext.rewards.serve.batching import Batcher, Worker
from trl_grpo_ext.rewards.serve.settings import ServeSettings
from trl_grpo_ext.rewards.serve.wire import (
    Classified,
    ClassifyRequest,
    RefusedError,
    RewardRequest,
    Rewards,
)

if TYPE_CHECKING:
    from trl_grpo_ext.rewards.serve.model import Classifier

# What TRL passes to a reward function and a request over HTTP does not have.
NOT_SERVED = ("completion_ids", "trainer_state", "environments")


class Backend(Protocol):
    """What a server asks."""

    max_tokens: int | None

    async def rewards(self, asked: RewardRequest) -> Rewards:
        """Return one reward a query."""

    async def classify(self, asked: ClassifyRequest) -> list[Classified]:
        """Return the scores of each text."""

    def close(self) -> None:
        """Give back what it holds."""


def build_backend(settings: ServeSettings) -> Backend:
    """Return what answers with these settings; a model is loaded.

    Raises:
        ConfigurationError: The model or the reward cannot be served.
    """
    if settings.model is not None:
        from trl_grpo_ext.rewards.serve.model import load_classifier  # a function needs no torch

        return ModelBackend(load_classifier(settings), settings=settings)
    spec = RewardSpec(name=str(settings.reward), arguments=settings.reward_arguments)
    [reward], _ = build_rewards([spec])
    return FunctionBackend(reward, label_column=settings.label_column)


class ModelBackend:
    """Answers with the scores of a :class:`Classifier`, several requests a forward pass.

    Raises:
        ConfigurationError: The model does not have the label of the settings.
    """

    def __init__(self, classifier: Classifier, *, settings: ServeSettings) -> None:
        num_labels = int(cast(Any, classifier.model.config).num_labels)
        if settings.label is not None and settings.label >= num_labels:
            raise ConfigurationError(
                [
                    f"`label`={settings.label} is no logit of `model`={settings.model!r}, which "
                    f"has {num_labels}. Set `label` to an index from 0 to {num_labels - 1}."
                ]
            )
        self.max_tokens: int | None = classifier.max_tokens
        self._classifier = classifier
        self._label = 0 if num_labels == 1 else settings.label
        self._worker = Worker()
        self._tokenizing = threading.Lock()  # a fast tokenizer is not for two threads at once
        self._batcher = _batcher(classifier, worker=self._worker, settings=settings)

    async def rewards(self, asked: RewardRequest) -> Rewards:
        """Return the logit of each query that is the reward; prompts and labels are not read."""
        if self._label is None:
            raise RefusedError(
                "The model has several labels and none of them is the reward. Start the server "
                "with --label, or use /classify."
            )
        rows = await self._batcher.submit(await self._encoded(asked.query))
        return Rewards([row[self._label] for row in rows], {})

    async def classify(self, asked: ClassifyRequest) -> list[Classified]:
        """Return the probabilities or the logits of each text."""
        encoded = await self._encoded(asked.texts)
        rows = await self._batcher.submit(encoded)
        values = self._classifier.activated(rows) if asked.use_activation else rows
        labels = [self._classifier.best_label(row) for row in rows]
        lengths = [len(text) for text in encoded]
        return [Classified(*scored) for scored in zip(values, lengths, labels, strict=True)]

    def close(self) -> None:
        """End the thread of the model."""
        self._worker.close()

    async def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        def encode() -> list[list[int]]:
            with self._tokenizing:
                return self._classifier.encode(texts)

        return await asyncio.to_thread(encode)


def _batcher(
    classifier: Classifier, *, worker: Worker, settings: ServeSettings
) -> Batcher[list[int], list[float]]:
    def plan(texts: Sequence[list[int]]) -> list[list[int]]:
        return plan_passes(
            [len(text) for text in texts],
            max_tokens=settings.max_batch_tokens,
            max_padding=settings.max_padding,
        )

    wait_s = settings.max_wait_ms / 1000
    return Batcher(classifier.logits, plan=plan, worker=worker, wait_s=wait_s)


class FunctionBackend:
    """Answers with a TRL reward function, one call a request, so that it sees whole groups.

    A completion is its query without the prompt that it opens with, and the labels of a request
    are the column ``label_column``. What the function gives to ``log_metric`` is in the
    ``extra_logs`` of the reply; ``log_extra`` does nothing.

    Args:
        reward: The function; calls follow each other in one thread, an asynchronous one's overlap.
        label_column: The keyword argument for the labels.

    Raises:
        ConfigurationError: It needs what a request does not have.
    """

    def __init__(self, reward: RewardFunction, *, label_column: str = "answer") -> None:
        self.max_tokens: int | None = None
        self._reward, self._label_column = reward, label_column
        self._needs_labels = label_column in required_columns(reward)
        if missing := sorted(_unmet(reward) | required_columns(reward) - {label_column}):
            raise ConfigurationError([_not_servable(log_name(reward), missing, label_column)])
        self._worker = Worker()

    async def rewards(self, asked: RewardRequest) -> Rewards:
        """Return what the function scores the completions with."""
        if asked.prompts is None:
            raise RefusedError("`prompts` is missing, without which no completion can be told.")
        completions = _completions(asked.query, asked.prompts)
        columns = {} if asked.labels is None else {self._label_column: asked.labels}
        return await self._scored(asked.prompts, completions, columns)

    async def classify(self, asked: ClassifyRequest) -> list[Classified]:
        """Return the score of each text as a completion of an empty prompt."""
        scored = await self._scored([""] * len(asked.texts), asked.texts, {})
        return [Classified([score], 0) for score in scored.rewards]

    def close(self) -> None:
        """End the thread of the function."""
        self._worker.close()

    async def _scored(
        self, prompts: Sequence[str], completions: Sequence[str], columns: dict[str, Any]
    ) -> Rewards:
        if self._needs_labels and not columns:
            raise RefusedError(
                f"The reward needs `{self._label_column}`. Send one label a query in `labels`, to "
                "/get_reward."
            )
        logged: dict[str, Score] = {}
        values = await self._worker.call(
            self._reward,
            prompts=prompts,
            completions=completions,
            log_metric=lambda name, value: logged.update({str(name): float(value)}),
            log_extra=lambda column, values: None,
            **columns,
        )
        name = log_name(self._reward)
        return Rewards(checked_scores(values, name=name, num_completions=len(prompts))[0], logged)


def _completions(query: Sequence[str], prompts: Sequence[str]) -> list[str]:
    for index, (text, prompt) in enumerate(zip(query, prompts, strict=True)):
        if not text.startswith(prompt):
            raise RefusedError(
                f"`query`[{index}] does not open with `prompts`[{index}], so its completion cannot "
                "be told. Send prompt and completion as one text, character for character."
            )
    return [text.removeprefix(prompt) for text, prompt in zip(query, prompts, strict=True)]


def _unmet(reward: RewardFunction) -> set[str]:
    """Return the parameters that TRL would fill and a request cannot."""
    parameters = inspect.signature(reward).parameters
    empty = inspect.Parameter.empty
    return {name for name in NOT_SERVED if name in parameters and parameters[name].default is empty}


def _not_servable(name: str, missing: Sequence[str], label_column: str) -> str:
    return (
        f"reward '{name}' needs {', '.join(f'`{column}`' for column in missing)}, but a request "
        f"has prompts, completions and labels only. Set `label_column` (here {label_column!r}) to "
        "the column that the labels are, or use this reward in the trainer."
    )
