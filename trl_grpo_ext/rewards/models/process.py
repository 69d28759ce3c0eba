"""The reward of a process reward model: each step of an answer is scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.api.settings import APISettings
from trl_grpo_ext.rewards.base import Closing
from trl_grpo_ext.rewards.completion import Completion, completion_text
from trl_grpo_ext.rewards.missing import OnMissing
from trl_grpo_ext.rewards.models.local_steps import LocalSteps
from trl_grpo_ext.rewards.models.process_options import (
    ProcessArguments,
    argument_problems,
    label_problems,
)
from trl_grpo_ext.rewards.models.reading import Prompt
from trl_grpo_ext.rewards.models.served_steps import ServedSteps
from trl_grpo_ext.rewards.models.settings import ModelSettings
from trl_grpo_ext.rewards.models.step_pooling import StepPooling
from trl_grpo_ext.rewards.models.step_reading import Solution
from trl_grpo_ext.rewards.models.steps import (
    Aggregate,
    StepScores,
    aggregate,
    split_steps,
    step_ends,
    step_text,
)
from trl_grpo_ext.rewards.scores import Score

logger = logging.getLogger(__name__)


class ProcessModelReward(Closing):
    r"""Return the aggregate of the scores that a process reward model gives to the steps.

    The model classifies tokens; the score of a step is the probability of ``label`` at the last
    token of the tag after the step: by softmax, or by sigmoid of a single label. It runs in this
    process, or with ``base_url`` behind vLLM's ``/pooling``.

    What a policy wrote is data: special tokens in it are mere characters, so it can set no tag.

    Args:
        model: Folder or Hub name of a token-classification model; with ``base_url`` the name that
            the service knows.
        log_as: The name under which the trainer logs this reward.
        step_separator: What ends a step of an answer.
        step_tag: What the model reads after each step, in the place of the separator, such as
            ``"<extra_0>"``; by default the separator.
        aggregate: ``"min"``, ``"mean"``, ``"product"`` or ``"last"`` of the steps; see
            :func:`~trl_grpo_ext.rewards.models.steps.aggregate`.
        label: Which label says that a step is right; by default the only one, or the second of
            two.
        process_advantages: Whether :class:`~trl_grpo_ext.trainer.ExtGRPOTrainer` gives each step
            an advantage of its own.
        on_missing: As for :class:`~trl_grpo_ext.rewards.api.reward.APIReward`; by default
            ``"exclude"`` with a service, and ``"skip"`` without: then a completion that is longer
            than the model takes is left to the other rewards.
        base_url: Of the service, or several of the same service.
        options: Fields of :class:`~trl_grpo_ext.rewards.models.settings.ModelSettings`, but
            ``pooling``. With ``base_url`` instead those of
            :class:`~trl_grpo_ext.rewards.api.settings.APISettings`, ``task`` (of the service), and
            ``tokenizer`` with ``max_tokens``: then token ids are sent, and the service may answer
            with a row a token. Without a tokenizer text is sent, and ``step_tag`` must be a special
            token at which the service answers with a row.

    Attributes:
        failure: Why requests of the last call had no scores; empty if all had.
        num_failed: Completions without a score because of that. Those that are longer than the
            model takes are not among them.

    Raises:
        ConfigurationError: Everything that cannot work; weights are not read for that.

    References:
        Lightman et al. 2023, "Let's Verify Step by Step", arXiv:2305.20050.

    Example:
        >>> from trl_grpo_ext.rewards.models.process import ProcessModelReward
        >>> reward = ProcessModelReward("my_org/my-prm", aggregate="min")  # doctest: +SKIP
        >>> reward(prompts=["2 + 2 + 3?"], completions=["2 + 2 = 4\n\n4 + 3 = 8"])  # doctest: +SKIP
        [0.04]
    """

    def __init__(
        self,
        model: str,
        *,
        log_as: str = "process_model",
        step_separator: str = "\n\n",
        step_tag: str | None = None,
        aggregate: Aggregate = "min",
        label: int | None = None,
        process_advantages: bool = False,
        on_missing: OnMissing | None = None,
        base_url: str | Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        given = ProcessArguments(
            model=model,
            step_separator=step_separator,
            step_tag=step_tag,
            aggregate=aggregate,
            label=label,
            process_advantages=process_advantages,
            on_missing=on_missing,
            is_served=base_url is not None,
            options=options,
        )
        if problems := list(argument_problems(given)):
            raise ConfigurationError(problems)
        self.__name__ = log_as
        self.step_separator, self.step_tag = step_separator, step_tag or step_separator
        self.aggregate: Aggregate = aggregate
        self.label = label
        self.process_advantages = process_advantages
        self.on_missing: OnMissing = on_missing or ("skip" if base_url is None else "exclude")
        self._has_told = False
        if base_url is None:
            self._source: LocalSteps | ServedSteps = self._local(model, options)
        else:
            self._source = self._served(model, base_url, options)

    def __call__(
        self,
        *,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        log_metric: Callable[[str, float], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        **columns: Any,
    ) -> list[Score]:
        """Return one score a completion; called by TRL with lists of equal length.

        ``None`` stands for a completion that is longer than the model takes, or that the service
        did not score.

        Args:
            prompts: Texts, or conversations.
            completions: Texts, or lists of messages of which the last one is scored.
            log_metric: Given ``rewards/<name>/steps_mean`` (steps a completion),
                ``rewards/<name>/unscored_fraction`` (share of completions without a score) and
                ``rewards/<name>/cut_prompts_fraction`` (share of those whose prompt lost tokens, so
                that the answer fits), and of a service what ``APIReward`` logs.
            should_stop: As for ``APIReward``; a model in this process does not ask.
            columns: Not used.

        Raises:
            RewardError: the service refuses what it is asked, or a conversation cannot be rendered.
        """
        steps = self.step_scores(
            prompts=prompts, completions=completions, log_metric=log_metric, should_stop=should_stop
        )
        return self.aggregated(steps)

    def step_scores(
        self,
        *,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        log_metric: Callable[[str, float], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        **columns: Any,
    ) -> list[StepScores | None]:
        """Return where the steps of each completion end, and their scores; as a call does."""
        steps = [self._steps(completion) for completion in completions]
        solutions = [
            Solution(prompt, completion, self._said(of_one))
            for prompt, completion, of_one in zip(prompts, completions, steps, strict=True)
        ]
        found = self._source.scores(solutions, log_metric=log_metric, should_stop=should_stop)
        scored = [
            None if scores is None else StepScores(step_ends(of_one), tuple(scores))
            for of_one, scores in zip(steps, found, strict=True)
        ]
        self._note(steps, scored, log_metric)
        return scored

    def aggregated(self, steps: Sequence[StepScores | None]) -> list[Score]:
        """Return one number for the steps of each completion; ``None`` where there are none."""
        return [
            None if of_one is None else aggregate(of_one.scores, self.aggregate) for of_one in steps
        ]

    def submit(
        self,
        *,
        row: Mapping[str, Any],
        completion: Completion,
        completion_ids: Sequence[int] | None = None,
        group_index: int = 0,
    ) -> None:
        """Start scoring a completion with the service, as ``APIReward.submit``.

        A model in this process scores the whole batch at once, so nothing starts early.
        """
        said = self._said(self._steps(completion))
        self._source.submit(Solution(row["prompt"], completion, said), copy=group_index)

    @property
    def failure(self) -> str:
        """See :class:`ProcessModelReward`."""
        return self._source.failure

    @property
    def num_failed(self) -> int:
        """See :class:`ProcessModelReward`."""
        return self._source.num_failed

    def prepare(self) -> None:
        """Load model or tokenizer, so that what is wrong with it is said early.

        Raises:
            ConfigurationError: it cannot be used.
        """
        self._source.prepare()

    def close(self) -> None:
        """Give back memory and connections; a later call takes them again."""
        self._source.close()

    def _steps(self, completion: Completion) -> list[str]:
        # A lone surrogate is no character that a tokenizer or JSON takes.
        text = completion_text(completion).encode("utf-8", "replace").decode("utf-8")
        return split_steps(text, self.step_separator)

    def _said(self, steps: Sequence[str]) -> list[str]:
        return [step_text(step, self.step_separator) for step in steps]

    def _note(
        self,
        steps: Sequence[Sequence[str]],
        scored: Sequence[StepScores | None],
        log_metric: Callable[[str, float], None] | None,
    ) -> None:
        """Log the figures of a call; say once why the model could not score."""
        num_unscored = sum(of_one is None for of_one in scored)
        if log_metric:
            totals = {
                "steps_mean": sum(map(len, steps)),
                "unscored_fraction": num_unscored,
                "cut_prompts_fraction": self._source.num_cut,
            }
            for name, total in totals.items():
                log_metric(f"rewards/{self.__name__}/{name}", total / max(len(steps), 1))
        if num_unscored > self.num_failed and not self._has_told:
            self._has_told = True
            logger.warning(
                "reward '%s' gave no score to %d of %d completions: they are longer than the model "
                "takes, or its logits are not finite. Their score is None, not 0. Raise "
                "`max_tokens` as far as the model allows, or lower `max_completion_length`. "
                "(Told once.)",
                self.__name__,
                num_unscored - self.num_failed,
                len(scored),
            )

    def _local(self, model: str, options: Mapping[str, Any]) -> LocalSteps:
        settings = ModelSettings(model=model, **options)
        if problems := list(label_problems(settings, label=self.label)):
            raise ConfigurationError(problems)
        return LocalSteps(settings, tag=self.step_tag, label=self.label)

    def _served(
        self, model: str, base_url: str | Sequence[str], options: Mapping[str, Any]
    ) -> ServedSteps:
        ours = APISettings.names()
        chosen = {key: options[key] for key in ("tokenizer", "task") if key in options}
        return ServedSteps(
            base_url,
            protocol=StepPooling(
                model=model,
                step_separator=self.step_separator,
                step_tag=self.step_tag,
                label=self.label,
                **chosen,
            ),
            max_tokens=options.get("max_tokens"),
            log_as=self.__name__,
            on_missing=self.on_missing,
            options={key: value for key, value in options.items() if key in ours},
        )
