"""A reward from an external service, as a plain TRL reward function."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.api.cache import ScoreCache, default_folder
from trl_grpo_ext.rewards.api.client import RewardClient
from trl_grpo_ext.rewards.api.items import batch_items, row_item
from trl_grpo_ext.rewards.api.protocols import make_protocol
from trl_grpo_ext.rewards.api.scorer import Scored, Scorer
from trl_grpo_ext.rewards.api.session import Session
from trl_grpo_ext.rewards.api.settings import APISettings, api_problems, shown_url
from trl_grpo_ext.rewards.api.statistics import RewardStatistics, summarize
from trl_grpo_ext.rewards.api.wire import WireProtocol
from trl_grpo_ext.rewards.base import Closing
from trl_grpo_ext.rewards.completion import Completion
from trl_grpo_ext.rewards.missing import OnMissing, missing_problems
from trl_grpo_ext.rewards.scores import Score

logger = logging.getLogger(__name__)

_living: weakref.WeakSet[APIReward] = weakref.WeakSet()


class APIReward(Closing):
    """Return the scores that a service gives to completions; ``None`` where it gave none.

    Requests run concurrently in a thread of the object, which starts with the first call and ends
    with :meth:`close`, with the object, or with the process. A forked or unpickled copy starts its
    own. What the service could not score in spite of retries is ``None``, never 0.

    Args:
        base_url: Of the service, or several of the same service, tried in this order.
        protocol: The name of a protocol, or an object that is one.
        log_as: The name under which the trainer logs this reward; by default the protocol's, with
            a number where another object has it already.
        on_missing: What :class:`~trl_grpo_ext.trainer.ExtGRPOTrainer` makes of a completion without
            a score: ``"exclude"`` leaves it out of its group, whatever other rewards say of it;
            ``"skip"`` counts the other rewards alone, as plain TRL does.
        options: Fields of :class:`APISettings`, such as ``api_key_env`` and ``deadline_s``; all
            others are the protocol's, such as ``model`` and ``rubric``.

    Attributes:
        statistics: Figures of the last call.
        failure: Why requests of it had no scores; empty if all had.
        num_failed: Completions without a score because of that. Those that were not asked about,
            or that the service said it cannot score, are not among them.
        needs_group: Whether the protocol compares the completions of a prompt, so that all of them
            must be in one call.

    Raises:
        ConfigurationError: Everything that cannot work in address, settings and options.

    Example:
        >>> from trl_grpo_ext.rewards.api.reward import APIReward
        >>> reward = APIReward(  # doctest: +SKIP
        ...     "https://judge.example/v1",
        ...     protocol="openai_chat",
        ...     model="judge-70b",
        ...     rubric="Correct, and no longer than needed.",
        ...     api_key_env="JUDGE_API_KEY",
        ... )
        >>> reward(prompts=["2 + 2?"], completions=["4"])  # doctest: +SKIP
        [1.0]
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        protocol: str | WireProtocol,
        log_as: str | None = None,
        on_missing: OnMissing = "exclude",
        **options: Any,
    ) -> None:
        self.settings, self.protocol = _configured(base_url, protocol, on_missing, options)
        self.on_missing = on_missing
        self.needs_group = bool(getattr(self.protocol, "is_relative", False))
        self.statistics = RewardStatistics()
        self.failure, self.num_failed = "", 0
        self.required_columns = frozenset(getattr(self.protocol, "required_columns", ()))
        self.__name__ = log_as or _free_name(_protocol_name(self.protocol))
        self._session: Session | None = None
        self._renew()

    def __call__(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        log_metric: Callable[[str, float], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        **columns: Any,
    ) -> list[Score]:
        """Return one score a completion; called by TRL with lists of equal length.

        Args:
            prompts: Texts, or conversations.
            completions: Texts, or lists of messages of which the last one is scored.
            log_metric: Given the figures of ``statistics``, as ``rewards/<name>/<figure>``.
            should_stop: Asked while answers are awaited; when it says yes, the call returns with
                the scores that are there.
            columns: Of the data set, a value a completion; what else TRL passes is left alone.

        Raises:
            RewardError: the service refuses what it is asked (HTTP 400, 401, 403, 404, 422), so
                that no settings of this object can be right.
        """
        items = batch_items(prompts, completions, columns, name=self.__name__)
        scored = self.session().wait(lambda scorer: scorer.collect(items), should_stop=should_stop)
        self.statistics = summarize(
            scored.scores,
            scored.answers,
            price_per_million_tokens=self.settings.price_per_million_tokens,
        )
        self._note_failure(scored)
        if log_metric:
            self.statistics.log(log_metric, name=self.__name__)
        return scored.scores

    def submit(
        self,
        *,
        row: Mapping[str, Any],
        completion: Completion,
        completion_ids: Sequence[int] | None = None,
        group_index: int = 0,
    ) -> None:
        """Start scoring a completion, without waiting; the next call collects the score.

        Doing so again with the same arguments changes nothing. A reward with ``needs_group`` has
        nothing to ask about one completion alone: see :meth:`submit_group`.

        Args:
            row: Of the data set, with its ``prompt``.
            completion: As in a call.
            completion_ids: Not used; the trainer has them at hand.
            group_index: Place among the completions of the row. Completions with the same text
                are one to a judge that is not sampled.
        """
        item = row_item(row, completion)
        self.session().start(lambda scorer: scorer.submit([item], copy=group_index))

    def submit_group(self, *, row: Mapping[str, Any], completions: Sequence[Completion]) -> None:
        """Start scoring all completions of a row, which are compared with each other."""
        items = [row_item(row, completion) for completion in completions]
        self.session().start(lambda scorer: scorer.submit(items))

    def session(self) -> Session:
        """Return the thread in which this process asks, started if there is none."""
        with self._lock:
            if self._session is None or self._session.is_foreign:
                self._session = Session(self._opener(), name=f"reward {self.__name__}")
            return self._session

    def close(self) -> None:
        """Cancel what is under way and close the connections; a later call opens them again."""
        with self._lock:
            if self._session and not self._session.is_foreign:
                self._session.close()
            self._session = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings.shown()}, name={self.__name__!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy in another process needs: neither key nor connections."""
        return {**vars(self), "_session": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._renew()

    def _renew(self) -> None:
        """Take a lock that no thread of another process holds."""
        self._lock = threading.Lock()
        _living.add(self)

    def _opener(self) -> Callable[[], Any]:
        """Return what opens a scorer; it does not hold this object, which could not be freed."""
        return partial(_open_scorer, self.settings, self.protocol, self.__name__)

    def _note_failure(self, scored: Scored) -> None:
        """Keep why completions have no score, and warn."""
        failures = Counter(answer.failure for answer in scored.answers if answer.failure)
        self.num_failed = scored.num_failed
        self.failure = failures.most_common(1)[0][0] if failures and self.num_failed else ""
        if not self.failure:
            return
        logger.warning(
            "reward '%s' got no score for %d of %d completions from %s after %d requests (mostly: "
            "%s). Their score is None, not 0. Check the service, or raise "
            "`max_attempts` or `deadline_s`.",
            self.__name__,
            self.num_failed,
            len(scored.scores),
            self.address,
            self.statistics.requests,
            self.failure,
        )

    @property
    def address(self) -> str:
        """The service's, for people; without what may be secret."""
        return " or ".join(shown_url(url) for url in self.settings.base_urls)


def _renew_all() -> None:
    for reward in list(_living):
        reward._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)


@asynccontextmanager
async def _open_scorer(
    settings: APISettings, protocol: WireProtocol, name: str
) -> AsyncIterator[Scorer]:
    """Open cache and client, in the thread that uses them."""
    async with AsyncExitStack() as stack:
        cache = None
        if settings.cache or (settings.cache is None and not protocol.is_sampled):
            cache = ScoreCache(Path(settings.cache_dir or default_folder()))
            stack.callback(cache.close)
        client = await stack.enter_async_context(RewardClient(settings, protocol, name=name))
        scorer = Scorer(client, protocol, identity=_identity(settings, protocol), cache=cache)
        stack.push_async_callback(scorer.close)
        yield scorer


def _identity(settings: APISettings, protocol: WireProtocol) -> list[Any]:
    """Return what beside a request determines its scores."""
    kind = type(protocol)
    return [settings.base_urls, kind.__module__, kind.__qualname__, protocol.version]


def _configured(
    base_url: str | Sequence[str],
    protocol: str | WireProtocol,
    on_missing: str,
    options: Mapping[str, Any],
) -> tuple[APISettings, WireProtocol]:
    """Return settings and protocol.

    Raises:
        ConfigurationError: all that is wrong with either.
    """
    base_urls = (base_url,) if isinstance(base_url, str) else tuple(base_url)
    ours = APISettings.names()
    settings = APISettings(base_urls, **{key: options[key] for key in options if key in ours})
    theirs = {key: value for key, value in options.items() if key not in ours}
    problems = [*api_problems(settings), *missing_problems(on_missing)]
    try:
        built = _build_protocol(protocol, theirs)
    except ConfigurationError as error:
        raise ConfigurationError([*problems, *error.problems]) from None
    if problems:
        raise ConfigurationError(problems)
    return settings, built


def _build_protocol(protocol: str | WireProtocol, options: Mapping[str, Any]) -> WireProtocol:
    if isinstance(protocol, str):
        return make_protocol(protocol, **options)
    if options:
        raise ConfigurationError(
            [
                f"the options {', '.join(sorted(options))} are neither settings of the client nor "
                "the protocol's, which is an object already, so they would have no effect. Take "
                "them away, or correct their names."
            ]
        )
    return protocol


def _protocol_name(protocol: WireProtocol) -> str:
    return str(getattr(protocol, "name", "") or type(protocol).__name__)


def _free_name(name: str) -> str:
    """Return the name, with a number if a living object has it."""
    taken = {reward.__name__ for reward in list(_living)}
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free
