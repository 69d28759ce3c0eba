"""The reward of a model that scores whole replies: an outcome reward model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.base import Closing
from trl_grpo_ext.rewards.completion import Completion
from trl_grpo_ext.rewards.models.normalise import RunningMoments
from trl_grpo_ext.rewards.models.reading import Prompt, Reading, read, whole_turns
from trl_grpo_ext.rewards.models.scoring_model import ScoringModel
from trl_grpo_ext.rewards.models.settings import (
    DType,
    ModelSettings,
    Pooling,
    Quantization,
    kind_problems,
    model_problems,
    read_config,
)
from trl_grpo_ext.rewards.scores import Score

Activation = Literal["none", "sigmoid", "softmax"]

logger = logging.getLogger(__name__)


class OutcomeModelReward(Closing):
    """Return the score that a sequence-classification model gives to each reply.

    The model reads the prompt and the reply as one conversation, or one text. It is loaded at the
    first call, or by :meth:`prepare`, once in each process. A reply that is longer than the model
    takes has no score, ``None``: it is never cut.

    Args:
        model: Folder or Hub name of the model. No code of it runs.
        log_as: The name under which the trainer logs this reward.
        label: Index of the logit that is the reward, for a model with several labels.
        activation: Of the logits: ``none``, ``sigmoid``, or ``softmax`` over the labels.
        normalize: Whether a score is given as its distance to the mean of all scores so far, those
            of this batch and of all processes included, in standard deviations.
        tokenizer: See :class:`~trl_grpo_ext.rewards.models.settings.ModelSettings`, as for those
            that follow.
        device: Where it scores.
        dtype: Of the weights.
        quantization: Of the weights.
        offload: Whether the weights are on the device only while it scores.
        max_tokens: Of prompt and reply together.
        max_batch_tokens: Of one forward pass.
        pad_token: For a model that names none.
        pooling: Which token of a decoder is scored.

    Attributes:
        frozen: Whether normalization uses mean and deviation as they are, as in an evaluation.

    Raises:
        ConfigurationError: Everything that cannot work, as far as it shows without the weights.

    Example:
        >>> reward = OutcomeModelReward("my_org/my-reward-model", normalize=True)  # doctest: +SKIP
        >>> reward(prompts=["2 + 2 = "], completions=["4"])  # doctest: +SKIP
        [0.0]
    """

    def __init__(
        self,
        model: str,
        *,
        log_as: str = "outcome_model",
        label: int | None = None,
        activation: Activation = "none",
        normalize: bool = False,
        tokenizer: str | None = None,
        device: str = "auto",
        dtype: DType = "auto",
        quantization: Quantization | None = None,
        offload: bool = False,
        max_tokens: int | None = None,
        max_batch_tokens: int = 16384,
        pad_token: str | None = None,
        pooling: Pooling = "transformers",
    ) -> None:
        self.settings = ModelSettings(
            model=model,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            quantization=quantization,
            offload=offload,
            max_tokens=max_tokens,
            max_batch_tokens=max_batch_tokens,
            pad_token=pad_token,
            pooling=pooling,
        )
        if problems := list(_problems(self.settings, label=label, activation=activation)):
            raise ConfigurationError(problems)
        self.__name__ = log_as
        self.label, self.activation, self.normalize = label or 0, activation, normalize
        self.frozen = False
        self._moments = RunningMoments()
        self._model: ScoringModel | None = None
        self._has_warned = False

    def __call__(
        self,
        *,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: object,
    ) -> list[Score]:
        """Return one score a completion; called by TRL with lists of equal length.

        With ``normalize``, every process of a run calls it once a batch.

        Args:
            prompts: Texts, or conversations.
            completions: Texts, or lists of messages of which the last one is scored.
            log_metric: Given the shares of replies that were too long and of prompts that were cut,
                and the running mean and deviation.
            columns: What else TRL passes is left alone.

        Raises:
            ConfigurationError: The model cannot be loaded.
            RewardError: Its chat template cannot render a conversation.
        """
        model = self._loaded()
        pairs = zip(prompts, completions, strict=True)
        readings = [_reading(model, prompt, completion) for prompt, completion in pairs]
        logits = iter(model.logits([reading.ids for reading in readings if reading]))
        scores = [self._score(next(logits)) if reading else None for reading in readings]
        self._warn(readings, max_tokens=model.max_tokens)
        if self.normalize:
            scores = self._normalised(scores)
        if log_metric:
            for name, value in self._figures(readings):
                log_metric(f"rewards/{self.__name__}/{name}", value)
        return scores

    def prepare(self) -> None:
        """Load the model, so that one that cannot be loaded fails before the first step.

        Raises:
            ConfigurationError: It cannot be loaded.
        """
        self._loaded()

    def close(self) -> None:
        """Give the model's memory back; a later call loads it again."""
        self._model = None

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean and deviation, for a checkpoint."""
        return self._moments.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._moments.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}

    def _loaded(self) -> ScoringModel:
        if self._model is None:
            self._model = ScoringModel.load(self.settings, kind="sequence")
        return self._model

    def _score(self, logits_L: Tensor) -> float:
        if self.activation == "sigmoid":
            logits_L = logits_L.sigmoid()
        elif self.activation == "softmax":
            logits_L = logits_L.softmax(-1)
        return float(logits_L[self.label])

    def _normalised(self, scores: Sequence[Score]) -> list[Score]:
        if not self.frozen:
            self._moments.update(_numbers(_of_all_processes(scores)))
        return [None if score is None else self._moments.normalised(score) for score in scores]

    def _warn(self, readings: Sequence[Reading | None], *, max_tokens: int) -> None:
        if self._has_warned or None not in readings:
            return
        self._has_warned = True
        logger.warning(
            "reward '%s' cannot score replies of more than %d tokens, and %d of %d are longer: "
            "they have no score, and only other rewards judge them. Lower `max_completion_length`, "
            "or raise `max_tokens` if the model takes more.",
            self.__name__,
            max_tokens,
            readings.count(None),
            len(readings),
        )

    def _figures(self, readings: Sequence[Reading | None]) -> Iterator[tuple[str, float]]:
        num_replies = max(len(readings), 1)
        num_cut = sum(reading.num_cut > 0 for reading in readings if reading)
        yield "too_long_fraction", readings.count(None) / num_replies
        yield "cut_prompts_fraction", num_cut / num_replies
        if self.normalize:
            yield "running_mean", self._moments.mean
            yield "running_std", self._moments.std


def _reading(model: ScoringModel, prompt: Prompt, completion: Completion) -> Reading | None:
    before, text = whole_turns(model.tokenizer, prompt, completion)
    return read(
        model.tokenizer,
        before,
        [text],
        max_tokens=model.max_tokens,
        add_eos=True,
        goes_on=before is prompt,
    )


def _of_all_processes(scores: Sequence[Score]) -> list[Score]:
    """Return the scores of all processes, which all have to ask."""
    if not PartialState._shared_state or PartialState().num_processes == 1:
        return list(scores)
    return list(gather_object(list(scores)))


def _numbers(scores: Sequence[Score]) -> list[float]:
    return [score for score in scores if score is not None and math.isfinite(score)]


def _problems(
    settings: ModelSettings, *, label: int | None, activation: Activation
) -> Iterator[str]:
    if activation not in get_args(Activation):
        yield (
            f"`activation`={activation!r} is not known, so logits cannot be made scores. "
            f"Choose {', '.join(get_args(Activation))}."
        )
    if problems := list(model_problems(settings)):
        yield from problems
        return
    config = read_config(settings.model)
    if problems := list(kind_problems(config, name=settings.model, kind="sequence")):
        yield from problems
        return
    num_labels = int(config.num_labels)
    yield from _label_problems(settings.model, num_labels, label=label)
    if activation == "softmax" and num_labels == 1:
        yield (
            f"`activation`='softmax' of `model`={settings.model!r}, which has one label, is always "
            "1. Set `activation` to 'sigmoid' or 'none'."
        )


def _label_problems(model: str, num_labels: int, *, label: int | None) -> Iterator[str]:
    indices = f"an index from 0 to {num_labels - 1}"
    if label is None and num_labels > 1:
        yield (
            f"`model`={model!r} has {num_labels} labels, and none of them is the reward. Set "
            f"`label` to {indices}."
        )
    elif label is not None and not 0 <= label < num_labels:
        yield (
            f"`label`={label} is no logit of `model`={model!r}, which has {num_labels}. Set "
            f"`label` to {indices}."
        )
