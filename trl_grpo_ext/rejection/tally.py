"""What became of all candidates: counts, and the table that shows them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_grpo_ext.rejection.balance import BUCKETS, bucket
from trl_grpo_ext.rejection.candidates import Group
from trl_grpo_ext.rejection.selection import KEPT, REASONS, Verdict
from trl_grpo_ext.rewards.score_show import shortened

_EXAMPLE_CHARACTERS = 60


@dataclass
class Tally:
    """Counts over prompts and candidates; each candidate is in one of ``reasons``.

    Attributes:
        num_prompts: That were sampled.
        num_solved: With at least one right candidate.
        num_always_solved: All of whose judged candidates are right.
        num_kept_prompts: With at least one that is kept.
        reasons: Candidates by what became of them.
        prompts_by_pass_rate: Prompts by :func:`~trl_grpo_ext.rejection.balance.bucket`; those of
            which no candidate was judged are in none.
        kept_by_pass_rate: Kept candidates by that of their prompt.
        examples: For each reason the first text that fell for it; untrusted.
    """

    num_prompts: int = 0
    num_solved: int = 0
    num_always_solved: int = 0
    num_kept_prompts: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    prompts_by_pass_rate: Counter[str] = field(default_factory=Counter)
    kept_by_pass_rate: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, group: Group, verdict: Verdict) -> None:
        """Count a prompt and its candidates."""
        rate = verdict.pass_rate
        self.num_prompts += 1
        self.num_solved += rate is not None and rate > 0
        self.num_always_solved += rate == 1
        self.num_kept_prompts += bool(verdict.kept)
        self.reasons.update(verdict.reasons.values())
        if rate is not None:
            self.prompts_by_pass_rate[bucket(rate)] += 1
            self.kept_by_pass_rate[bucket(rate)] += len(verdict.kept)
        for one in group.candidates:
            if (reason := verdict.reasons[one.index]) not in self.examples:
                self.examples[reason] = shortened(one.text, num_characters=_EXAMPLE_CHARACTERS)

    def summary(self) -> dict[str, Any]:
        """Return the counts for ``summary.json``; ``fell`` has every reason, 0 included.

        Example:
            >>> Tally().summary()["fell"]["near-duplicate"]
            0
        """
        return {
            "prompts": self.num_prompts,
            "prompts_solved": self.num_solved,
            "prompts_always_solved": self.num_always_solved,
            "prompts_kept": self.num_kept_prompts,
            "candidates": self.reasons.total(),
            "kept": self.reasons[KEPT],
            "fell": {reason: self.reasons[reason] for reason in REASONS},
            "prompts_by_pass_rate": {name: self.prompts_by_pass_rate[name] for name in BUCKETS},
            "kept_by_pass_rate": {name: self.kept_by_pass_rate[name] for name in BUCKETS},
        }


def print_tally(tally: Tally, console: Console) -> None:
    """Print what became of prompts and candidates, and of the prompts of each pass rate.

    Texts are untrusted: no markup and no control character in them reaches the terminal.
    """
    console.print(_candidates_table(tally), _difficulty_table(tally))


def _candidates_table(tally: Tally) -> Table:
    table = Table(title="Rejection sampling", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    table.add_column("number", justify="right")
    table.add_column("share", justify="right")
    table.add_column("such as", overflow="fold")
    prompts, candidates = tally.num_prompts, tally.reasons.total()
    for name, count in (
        ("prompts", prompts),
        ("solved at least once", tally.num_solved),
        ("always solved", tally.num_always_solved),
        ("with a kept reply", tally.num_kept_prompts),
    ):
        table.add_row(name, str(count), _share(count, prompts))
    table.add_section()
    table.add_row("replies", str(candidates), _share(candidates, candidates))
    for reason in (KEPT, *REASONS):
        if count := tally.reasons[reason]:
            example = Text(tally.examples.get(reason, ""))
            table.add_row(reason, str(count), _share(count, candidates), example)
    return table


def _difficulty_table(tally: Tally) -> Table:
    table = Table(title="By pass rate", title_justify="left", box=SIMPLE_HEAD)
    for title in ("pass rate", "prompts", "kept replies"):
        table.add_column(title, justify="right")
    for name in BUCKETS:
        counts = tally.prompts_by_pass_rate[name], tally.kept_by_pass_rate[name]
        table.add_row(Text(name), *map(str, counts))
    return table


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "-"
