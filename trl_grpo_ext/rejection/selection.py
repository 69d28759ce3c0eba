"""From the candidates of a prompt to the few that are kept, and why each other one falls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from trl_grpo_ext.rejection.balance import Balance, pass_rate, quota
from trl_grpo_ext.rejection.candidates import Candidate, Group
from trl_grpo_ext.rejection.filters import CHECKS, Rules, first_failure
from trl_grpo_ext.rejection.near_duplicates import distinct, shingles, similarity

Prefer = Literal["brevity", "diversity"]

KEPT = "kept"
# Why candidates fall, in the order in which it is asked.
REASONS = (*CHECKS, "near-duplicate", "not among the best", "balance")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How the correct and clean candidates of a prompt are thinned out.

    Attributes:
        weights: Of the rewards, by name.
        best_n: Kept of a prompt at most, at least 1.
        prefer: What decides between candidates of equal reward.
        ngram_size: Words of the n-grams by which candidates are compared, at least 1.
        max_similarity: Jaccard index from which on two candidates are near-duplicates.
        balance: How ``best_n`` shrinks for easy prompts.
        min_pass_rate: Prompts that are solved less often fall.
        max_pass_rate: Prompts that are solved more often fall.
    """

    weights: Mapping[str, float]
    best_n: int = 4
    prefer: Prefer = "brevity"
    ngram_size: int = 5
    max_similarity: float = 0.8
    balance: Balance = "prop2diff"
    min_pass_rate: float = 0.0
    max_pass_rate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a prompt.

    Attributes:
        pass_rate: Share of right candidates among the judged ones; ``None`` if none was judged.
        kept: The best first.
        reasons: For each candidate by its index: ``"kept"``, or the first of :data:`REASONS`.
    """

    pass_rate: float | None
    kept: Sequence[Candidate] = ()
    reasons: Mapping[int, str] = field(default_factory=dict)


def select(group: Group, *, rules: Rules, selection: Selection) -> Verdict:
    """Return which candidates of a prompt are kept, and why each other one falls.

    The correct and the clean (:func:`~trl_grpo_ext.rejection.filters.first_failure`); of
    near-duplicates the one with the highest reward; the best of these; as many as the prompt's
    difficulty allows. Each candidate falls once, for the first of these reasons.
    """
    reasons = {one.index: first_failure(one, rules) for one in group.candidates}
    clean = [one for one in group.candidates if reasons[one.index] is None]
    unlike = without_near_duplicates(clean, selection=selection)
    best = best_of(unlike, selection=selection)
    right = [one.is_right(rules.correct_threshold) for one in group.candidates]
    kept = best[: allowed(right, selection=selection)]
    stages = ((clean, "near-duplicate"), (unlike, "not among the best"), (best, "balance"))
    for candidates, reason in (*stages, (kept, KEPT)):
        reasons |= {one.index: reason for one in candidates}
    told = {index: reason for index, reason in reasons.items() if reason is not None}
    return Verdict(pass_rate=pass_rate(right), kept=kept, reasons=told)


def without_near_duplicates(
    candidates: Sequence[Candidate], *, selection: Selection
) -> list[Candidate]:
    """Return the candidates but those that nearly repeat a better one, the best first.

    Better is a higher reward, then a shorter reply, then the lower index.
    """
    ranked = sorted(candidates, key=lambda one: _rank(one, selection))
    kept = distinct(
        [one.text for one in ranked],
        ngram_size=selection.ngram_size,
        max_similarity=selection.max_similarity,
    )
    return [ranked[at] for at in kept]


def best_of(candidates: Sequence[Candidate], *, selection: Selection) -> list[Candidate]:
    """Return the best ``best_n``, the very best first.

    By reward, then by ``brevity``: the fewest tokens; or by ``diversity``: the one that is least
    similar to any of those already taken (the first one is the shortest). Then by index.

    Example:
        >>> texts = ["two plus three is five", "two plus three makes five", "5", "it is 2 + 3 = 5"]
        >>> candidates = [
        ...     Candidate(index=index, text=text, num_tokens=len(text))
        ...     for index, text in enumerate(texts)
        ... ]
        >>> for prefer in ("brevity", "diversity"):
        ...     selection = Selection(weights={}, best_n=3, prefer=prefer, ngram_size=1)
        ...     print([one.index for one in best_of(candidates, selection=selection)])
        [2, 3, 0]
        [2, 0, 3]
    """
    ranked = sorted(candidates, key=lambda one: _rank(one, selection))
    if selection.prefer == "brevity":
        return ranked[: selection.best_n]
    return _most_diverse(ranked, selection)


def allowed(right: Sequence[bool | None], *, selection: Selection) -> int:
    """Return how many candidates of a prompt may be kept, by what is right among them."""
    rate = pass_rate(right)
    if rate is None or not selection.min_pass_rate <= rate <= selection.max_pass_rate:
        return 0
    return quota(right, best_n=selection.best_n, balance=selection.balance)


def _most_diverse(ranked: Sequence[Candidate], selection: Selection) -> list[Candidate]:
    """Return the best, taken one by one: each time the least similar of those of highest reward."""
    sets = {one.index: shingles(one.text, ngram_size=selection.ngram_size) for one in ranked}
    closest = dict.fromkeys(sets, 0.0)  # similarity to the nearest one that is taken
    left = list(ranked)
    taken: list[Candidate] = []
    while left and len(taken) < selection.best_n:
        best = min(left, key=lambda one: _diverse_rank(one, selection, closest))
        left.remove(best)
        taken.append(best)
        for one in left:
            found = similarity(sets[one.index], sets[best.index])
            closest[one.index] = max(closest[one.index], found)
    return taken


def _diverse_rank(
    one: Candidate, selection: Selection, closest: Mapping[int, float]
) -> tuple[float, float, int, int]:
    reward, num_tokens, index = _rank(one, selection)
    return reward, closest[one.index], num_tokens, index


def _rank(one: Candidate, selection: Selection) -> tuple[float, int, int]:
    return -one.reward(selection.weights), one.num_tokens, one.index
