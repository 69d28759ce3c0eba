"""A process reward model in this process: a score a step.

Shapes: S steps of a solution, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from trl_grpo_ext.rewards.models.scoring_model import ScoringModel
from trl_grpo_ext.rewards.models.settings import ModelSettings
from trl_grpo_ext.rewards.models.step_reading import ReadSteps, Solution, step_reader
from trl_grpo_ext.rewards.models.steps import score_label


class LocalSteps:
    """Scores of steps from a token-classification model, which is loaded when it is first needed.

    Args:
        settings: Of the model.
        tag: What stands after each step.
        label: Which label says that a step is right; ``None`` as in :func:`score_label`.

    Attributes:
        failure: Always empty: a model in the process has no outage.
        num_failed: Always 0.
        num_cut: Solutions of the last call whose prompt lost tokens from its left.
    """

    failure = ""
    num_failed = 0

    def __init__(self, settings: ModelSettings, *, tag: str, label: int | None) -> None:
        self._settings, self._tag, self._label = settings, tag, label
        self.num_cut = 0
        self._loaded: tuple[ScoringModel, ReadSteps] | None = None

    def prepare(self) -> None:
        """Load the model, if it is not there yet.

        Raises:
            ConfigurationError: it cannot be used.
        """
        self._model_and_reader()

    def scores(
        self,
        solutions: Sequence[Solution],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[list[float] | None]:
        """Return the scores of each solution's steps.

        ``None`` stands for a solution that is longer than the model takes, or whose logits are not
        finite.
        """
        if not solutions:
            return []
        model, read_steps = self._model_and_reader()
        readings = [read_steps(solution) for solution in solutions]
        self.num_cut = sum(reading.num_cut > 0 for reading in readings if reading)
        logits = iter(model.logits([reading.ids for reading in readings if reading]))
        return [
            self._of_steps(next(logits)[reading.ends]) if reading else None for reading in readings
        ]

    def submit(self, solution: Solution, *, copy: int) -> None:
        """Do nothing: a batch is scored at once, when it is whole."""

    def close(self) -> None:
        """Give the model's memory back; a later call loads it again."""
        self._loaded = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy in another process needs: not the model."""
        return {**vars(self), "_loaded": None}

    def _of_steps(self, logits_SL: Tensor) -> list[float] | None:
        scores_S = step_probabilities(logits_SL, label=self._label)
        return scores_S.tolist() if scores_S.isfinite().all() else None

    def _model_and_reader(self) -> tuple[ScoringModel, ReadSteps]:
        if self._loaded is None:
            model = ScoringModel.load(self._settings, kind="token")
            reader = step_reader(model.tokenizer, tag=self._tag, max_tokens=model.max_tokens)
            self._loaded = model, reader
        return self._loaded


def step_probabilities(logits_SL: Tensor, *, label: int | None) -> Tensor:
    """Return the probability of a label at each step: of several by softmax, of one by sigmoid.

    Args:
        logits_SL: Shape ``(S, L)``.
        label: From 0 to ``L - 1``; ``None`` for one or two labels, as in :func:`score_label`.

    Returns:
        Shape ``(S,)``.

    Example:
        >>> import torch
        >>> step_probabilities(torch.tensor([[0.0, 0.0], [1.0, -1.0]]), label=1)
        tensor([0.5000, 0.1192])
    """
    if logits_SL.shape[1] == 1:
        return logits_SL[:, 0].sigmoid()
    chosen = score_label(label, num_labels=logits_SL.shape[1])
    assert chosen is not None, "the label was checked against the model"
    return logits_SL.softmax(-1)[:, chosen]
