"""A process reward model that is served: a score a step, over HTTP."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trl_grpo_ext.rewards.api.reward import APIReward
from trl_grpo_ext.rewards.api.scorer import Scored
from trl_grpo_ext.rewards.api.statistics import summarize
from trl_grpo_ext.rewards.api.wire import Item
from trl_grpo_ext.rewards.missing import OnMissing
from trl_grpo_ext.rewards.models.step_pooling import StepPooling, step_items
from trl_grpo_ext.rewards.models.step_reading import ReadSteps, Solution, load_reader

logger = logging.getLogger(__name__)

_WRONG_ROWS = "a reply with another number of rows than steps, or tokens if these were sent"


class ServedSteps:
    """Scores of steps from a service, with the client, limits and cache of :class:`APIReward`.

    Args:
        base_url: As for ``APIReward``.
        protocol: How it is asked.
        max_tokens: That the model takes, of prompt and answer together; ``None`` for what the
            tokenizer says.
        log_as: Name of the reward.
        on_missing: As for ``APIReward``.
        options: Fields of ``APISettings``.

    Attributes:
        failure: As in ``APIReward``, of the last call.
        num_failed: As in ``APIReward``, of the last call.
        num_cut: Solutions of the last call whose prompt lost tokens here. What the service cuts is
            not known.

    Raises:
        ConfigurationError: everything that cannot work in addresses and settings.
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        protocol: StepPooling,
        max_tokens: int | None,
        log_as: str,
        on_missing: OnMissing,
        options: Mapping[str, Any],
    ) -> None:
        self.api = APIReward(
            base_url, protocol=protocol, log_as=log_as, on_missing=on_missing, **options
        )
        self._protocol = protocol
        self._max_tokens = max_tokens
        self._read: ReadSteps | None = None
        self.failure, self.num_failed, self.num_cut = "", 0, 0

    def prepare(self) -> None:
        """Load the tokenizer, if there is one."""
        asked = self._protocol
        if self._read is None and asked.tokenizer is not None:
            self._read = load_reader(
                asked.tokenizer, tag=asked.step_tag, max_tokens=self._max_tokens
            )

    def scores(
        self,
        solutions: Sequence[Solution],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[list[float] | None]:
        """Return the scores of each solution's steps; ``None`` where there is not one a step."""
        asked = [self._items(solution, group=group) for group, solution in enumerate(solutions)]
        self.num_cut = sum(of_one[0].columns["is_cut"] for of_one in asked if of_one)
        items = [item for of_one in asked for item in of_one]
        scored = self.api.session().wait(
            lambda scorer: scorer.collect(items), should_stop=should_stop
        )
        found = list(_grouped(iter(scored.scores), asked))
        self._note(scored, found, asked, log_metric)
        return found

    def submit(self, solution: Solution, *, copy: int) -> None:
        """Start scoring a solution, as :meth:`APIReward.submit`."""
        if items := self._items(solution, group=0):
            self.api.session().start(lambda scorer: scorer.submit(items, copy=copy))

    def close(self) -> None:
        """Close the connections; a later call opens them again."""
        self.api.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy in another process needs: not the tokenizer."""
        return {**vars(self), "_read": None}

    def _items(self, solution: Solution, *, group: int) -> list[Item]:
        self.prepare()
        return step_items(solution, tag=self._protocol.step_tag, read=self._read, group=group)

    def _note(
        self,
        scored: Scored,
        found: Sequence[list[float] | None],
        asked: Sequence[Sequence[Item]],
        log_metric: Callable[[str, float], None] | None,
    ) -> None:
        """Keep and log what the call took, and why solutions have no score."""
        self.api.statistics = summarize(
            [None if scores is None else scores[-1] for scores in found],
            scored.answers,
            price_per_million_tokens=self.api.settings.price_per_million_tokens,
        )
        if log_metric:
            self.api.statistics.log(log_metric, name=self.api.__name__)
        failures = Counter(answer.failure for answer in scored.answers if answer.failure)
        pairs = zip(asked, found, strict=True)
        self.num_failed = sum(bool(items) and scores is None for items, scores in pairs)
        reasons = [reason for reason, _ in failures.most_common(1)] or [_WRONG_ROWS]
        self.failure = reasons[0] if self.num_failed else ""
        if self.failure:
            logger.warning(
                "reward '%s' got no scores of steps for %d of %d completions from %s (mostly: %s). "
                "They are None, not 0. Check the service, and that `step_tag` is what it counts; "
                "for one that answers with a row a token, set `tokenizer`.",
                self.api.__name__,
                self.num_failed,
                len(found),
                self.api.address,
                self.failure,
            )


def _grouped(
    scores: Iterator[float | None], asked: Sequence[Sequence[Item]]
) -> Iterator[list[float] | None]:
    """Yield the scores of each solution; ``None`` where it was not asked about, or one lacks."""
    for items in asked:
        of_steps = [next(scores) for _ in items]
        known = [score for score in of_steps if score is not None]
        yield known if items and len(known) == len(items) else None
