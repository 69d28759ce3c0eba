"""The reward for programs that pass their tests."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from trl_grpo_ext.errors import ConfigurationError, RewardError
from trl_grpo_ext.rewards.base import Closing
from trl_grpo_ext.rewards.code.cases import Asserts, Case, read_tests
from trl_grpo_ext.rewards.code.fusion import FusionServer
from trl_grpo_ext.rewards.code.jail import Sandbox, SandboxError
from trl_grpo_ext.rewards.code.levels import Level, make_sandbox
from trl_grpo_ext.rewards.code.limits import Limits, limit_problems
from trl_grpo_ext.rewards.code.program import given_code, program_text
from trl_grpo_ext.rewards.code.verdicts import Verdict, run_asserts, run_cases
from trl_grpo_ext.rewards.completion import Completion, completion_text

logger = logging.getLogger(__name__)

Rule = Literal["fraction", "all"]

# How a completion may end otherwise than "done", for metrics.
ENDS = ("time", "program", "no_program", "skipped", "no_tests", "unjudgeable", "sandbox")


@dataclass(frozen=True)
class Scored:
    """What became of one completion.

    Args:
        score: ``None`` if it could not be scored.
        end: As of :class:`~trl_grpo_ext.rewards.code.verdicts.Verdict`, or ``"no_program"``,
            ``"no_tests"``, ``"sandbox"``.
    """

    score: float | None
    end: str


class CodeReward(Closing):
    """Return the share of its tests that the program in each completion passes.

    The program is what :func:`~trl_grpo_ext.rewards.code.program.program_text` finds. It runs in
    a sandbox; what the tests expect stays outside of it. A program that fails, hangs or takes too
    much scores 0 in that test, a completion without a program 0. What the sandbox failed to run,
    and a row whose tests cannot be read, is ``None``.

    Args:
        tests_column: The dataset column with the tests: code with asserts, cases of input and
            output, or HumanEval's ``test`` (see
            :func:`~trl_grpo_ext.rewards.code.cases.read_tests`).
        entry_point_column: Where this column is there, a row's tests define ``check``, which is
            called with the function of that name, and a program continues the given code.
        given_column: The column with trusted code for the tests, such as imports or HumanEval's
            prompt. By default none; in rows with an entry point, the code in the prompt.
        score: ``"fraction"`` of the tests passed, or 1 for ``"all"`` of them, else 0.
        require_isolation: Whether to refuse a machine where programs can be limited, but kept from
            neither files nor network.
        sandbox: ``"namespaces"``, ``"bubblewrap"``, ``"rlimits"`` (limits only), or ``"auto"`` for
            the first of these that works; or ``"sandbox_fusion"``, a server, which runs cases of
            input and output only.
        service: Of that server: ``base_url`` and other options of
            :class:`~trl_grpo_ext.rewards.APIReward`.
        packages: Folders of packages that programs may import, such as a ``site-packages`` made
            for them; by default they have the standard library alone.
        num_workers: Programs that run at a time; by default one for each usable processor.
        log_as: The name under which the trainer logs this reward.
        limits: Fields of :class:`~trl_grpo_ext.rewards.code.limits.Limits`, such as
            ``time_limit_s`` and ``memory_bytes``.

    Attributes:
        sandbox: What programs run in; ``sandbox.name`` says which.
        on_missing: ``"exclude"``: a completion that could not be scored is left out of its group.

    Raises:
        ConfigurationError: Limits that cannot work, or no sandbox that does.

    Example:
        >>> from trl_grpo_ext.rewards.code.reward import CodeReward
        >>> reward = CodeReward()  # doctest: +SKIP
        >>> reward(  # doctest: +SKIP
        ...     completions=["def double(x): return x + x", "def double(x): return 42"],
        ...     tests=[["assert double(1) == 2", "assert double(21) == 42"]] * 2,
        ... )
        [1.0, 0.5]
    """

    on_missing = "exclude"

    def __init__(
        self,
        *,
        tests_column: str = "tests",
        entry_point_column: str = "entry_point",
        given_column: str | None = None,
        score: Rule = "fraction",
        require_isolation: bool = True,
        sandbox: Level | Literal["auto", "sandbox_fusion"] = "auto",
        service: Mapping[str, Any] | None = None,
        packages: Sequence[str] = (),
        num_workers: int | None = None,
        log_as: str = "code",
        **limits: Any,
    ) -> None:
        self.__name__ = log_as
        self.limits = _limits(limits, log_as, score, num_workers)
        self.tests_column, self.given_column = tests_column, given_column
        self.entry_point_column = entry_point_column
        self.required_columns = frozenset(filter(None, [tests_column, given_column]))
        self.score = score
        self.num_workers = num_workers or _num_processors()
        self.sandbox: Sandbox | FusionServer
        if sandbox == "sandbox_fusion":
            self.sandbox = FusionServer(service or {}, limits=self.limits, name=log_as)
        else:
            self.sandbox = make_sandbox(
                sandbox,
                require_isolation=require_isolation,
                limits=self.limits,
                packages=packages,
                name=log_as,
            )

    def __call__(
        self,
        *,
        completions: Sequence[Completion],
        prompts: Sequence[Any] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return one reward a completion; called by TRL with lists of equal length.

        Args:
            completions: Texts, or lists of messages of which the last one is scored.
            prompts: Texts, or conversations.
            log_metric: Given the share of completions that ended each way, as
                ``rewards/<name>/<end>``.
            columns: Of the data set, a value a completion.

        Raises:
            RewardError: There is no column with the tests.
        """
        rows = self._rows(len(completions), prompts, columns)
        workers = ThreadPoolExecutor(self.num_workers, thread_name_prefix=self.__name__)
        try:
            scored = list(workers.map(self._scored, map(completion_text, completions), rows))
        finally:
            workers.shutdown(cancel_futures=True)
        self._report(scored, log_metric)
        return [one.score for one in scored]

    def applies(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row of the data set has tests, as not all have in a mixed one.

        Without, a completion has no score, ``None``, and other rewards judge it.
        """
        return _has_tests(row.get(self.tests_column))

    def close(self) -> None:
        """End the process that is kept for quick starts; a later call starts it again."""
        self.sandbox.close()

    def _rows(
        self, count: int, prompts: Sequence[Any] | None, columns: Mapping[str, Any]
    ) -> list[Row]:
        for name in self.required_columns:
            if not isinstance(columns.get(name), Sequence) or len(columns[name]) != count:
                raise RewardError(_no_column(self.__name__, name, columns))
        nothing = [None] * count
        return [
            Row(*values)
            for values in zip(
                columns[self.tests_column],
                columns.get(self.entry_point_column) or nothing,
                columns[self.given_column] if self.given_column else nothing,
                prompts or nothing,
                strict=True,
            )
        ]

    def _scored(self, completion: str, row: Row) -> Scored:
        if not _has_tests(row.tests):
            return Scored(None, "skipped")
        given = row.given_code()
        tests = read_tests(row.tests, given=given, entry_point=row.entry_point)
        if tests is None:
            return Scored(None, "no_tests")
        program = program_text(completion)
        if program is None:
            return Scored(0.0, "no_program")
        if row.entry_point:
            program = f"{given}\n{program}"
        try:
            return self._judged(self._verdict(program, tests))
        except SandboxError as error:
            logger.debug("reward '%s': %s", self.__name__, error)
            return Scored(None, "sandbox")

    def _verdict(self, program: str, tests: list[Case] | Asserts) -> Verdict:
        try:
            return self._attempt(program, tests)
        except SandboxError:
            return self._attempt(program, tests)  # such as on a machine that was out of memory

    def _attempt(self, program: str, tests: list[Case] | Asserts) -> Verdict:
        if isinstance(self.sandbox, FusionServer):
            return self.sandbox.verdict(program, tests)
        if isinstance(tests, Asserts):
            return run_asserts(self.sandbox, program, tests, self.limits)
        return run_cases(self.sandbox, program, tests, self.limits)

    def _judged(self, verdict: Verdict) -> Scored:
        if verdict.end == "unjudgeable":
            return Scored(None, verdict.end)
        fraction = verdict.fraction
        return Scored(float(fraction == 1) if self.score == "all" else fraction, verdict.end)

    def _report(
        self, scored: Sequence[Scored], log_metric: Callable[[str, float], None] | None
    ) -> None:
        ends = Counter(one.end for one in scored)
        if log_metric and scored:
            for end in ENDS:
                log_metric(f"rewards/{self.__name__}/{end}_fraction", ends[end] / len(scored))
        if unscored := sum(ends[end] for end in _UNSCORED):
            logger.warning(_unscored(self.__name__, unscored, ends))


@dataclass(frozen=True)
class Row:
    """What the data set has beside a completion."""

    tests: object
    entry_point: str | None
    given: str | None
    prompt: object

    def given_code(self) -> str:
        """Return the trusted code of the row."""
        if self.given is not None:
            return self.given
        if not self.entry_point or not self.prompt:
            return ""
        return given_code(completion_text(self.prompt))  # type: ignore[arg-type]


def _has_tests(cell: object) -> bool:
    return cell is not None and cell not in ("", [])


def _num_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _limits(options: Mapping[str, Any], name: str, score: str, num_workers: int | None) -> Limits:
    known = {field.name for field in fields(Limits)}
    problems = [_unknown_option(name, option, known) for option in sorted(set(options) - known)]
    limits = Limits(**{option: options[option] for option in options if option in known})
    problems += limit_problems(limits, name=name)
    if score not in get_args(Rule):
        problems.append(_bad_score(name, score))
    if num_workers is not None and num_workers < 1:
        problems.append(_no_workers(name, num_workers))
    if problems:
        raise ConfigurationError(problems)
    return limits


def _unknown_option(name: str, option: str, known: set[str]) -> str:
    return (
        f"reward '{name}' does not accept {option}, which would have no effect. Beside what is "
        f"named in its documentation it accepts the limits {', '.join(sorted(known))}: correct its "
        "`arguments`."
    )


def _bad_score(name: str, score: str) -> str:
    return (
        f"reward '{name}' has `score`={score!r}, which is not known, so programs cannot be scored. "
        "Set `score` in the `arguments` of this reward to 'fraction' or 'all'."
    )


def _no_workers(name: str, num_workers: int) -> str:
    return (
        f"reward '{name}' has `num_workers`={num_workers}, so no program could run. Set "
        "`num_workers` in the `arguments` of this reward to at least 1, or leave it out for one "
        "a processor."
    )


def _no_column(name: str, column: str, columns: Mapping[str, Any]) -> str:
    return (
        f"reward '{name}' got no column '{column}' with a value a completion (columns: "
        f"{', '.join(sorted(columns))}), so no program can be tested. Set `tests_column` and "
        "`given_column` in the `arguments` of this reward to columns of the data set."
    )


def _unscored(name: str, count: int, ends: Mapping[str, int]) -> str:
    reasons = [f"{ends[end]} {meaning}" for end, meaning in _UNSCORED.items() if ends[end]]
    return (
        f"reward '{name}' could not score {count} completions ({', '.join(reasons)}). They are "
        "left out of the advantages, not scored 0. Correct the tests in the data set, or see "
        "docs/code_reward.md for the sandbox."
    )


_UNSCORED = {
    "no_tests": "whose tests cannot be read",
    "unjudgeable": "whose tests cannot be run apart from the program",
    "sandbox": "where the sandbox failed",
}
