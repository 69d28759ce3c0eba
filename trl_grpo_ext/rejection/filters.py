"""Which candidates are correct and clean: pure checks, in a fixed order."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trl_grpo_ext.rejection.candidates import Candidate
from trl_grpo_ext.rewards.format import FormatReward
from trl_grpo_ext.rewards.language import LanguageReward
from trl_grpo_ext.rewards.repetition import RepetitionReward

# How models write the marks of a conversation out, as text: <|im_end|>, </s>, [INST], <<SYS>>.
SPECIAL_TEXT = re.compile(
    r"<\|[^|<>\s]{1,40}\|>"
    r"|<｜[^｜<>\s]{1,40}｜>"
    r"|</?(?:s|unk|pad|bos|eos|mask)>"
    r"|<(?:start|end)_of_turn>"
    r"|\[/?INST\]|<</?SYS>>"
)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a candidate must be; what is ``None`` or empty is not asked.

    Attributes:
        correct_threshold: Least score of the first reward.
        keep_truncated: Whether a reply that was cut off may stay.
        keep_special_tokens: Whether one with special tokens in it, or written out, may stay.
        min_tokens: Least length, in sampled tokens.
        max_tokens: Largest length, in sampled tokens.
        max_characters: Largest length of the text. Longer ones are not looked at any further.
        format: Must score 1.
        language: Gives the share of words in the wanted scripts.
        min_language: Least of that share.
        repetition: Gives minus the share of repeated n-grams.
        max_repetition: Largest of that share.
        forbidden: Regular expressions that must not be found.
    """

    correct_threshold: float = 0.5
    keep_truncated: bool = False
    keep_special_tokens: bool = False
    min_tokens: int = 1
    max_tokens: int | None = None
    max_characters: int = 50_000
    format: FormatReward | None = None
    language: LanguageReward | None = None
    min_language: float = 1.0
    repetition: RepetitionReward | None = None
    max_repetition: float = 1.0
    forbidden: Sequence[re.Pattern[str]] = ()


Check = Callable[[Candidate, Rules], bool]


def is_scored(one: Candidate, rules: Rules) -> bool:
    """Return whether a verdict is there: what could not be scored is not wrong."""
    return one.is_right(rules.correct_threshold) is not None


def is_right(one: Candidate, rules: Rules) -> bool:
    """Return whether the first reward is at least the threshold."""
    return bool(one.is_right(rules.correct_threshold))


def is_finished(one: Candidate, rules: Rules) -> bool:
    """Return whether the reply ended by itself."""
    return rules.keep_truncated or one.finished


def has_no_special_tokens(one: Candidate, rules: Rules) -> bool:
    """Return whether no special token is among the tokens, nor written out in the text.

    Example:
        >>> leaked = Candidate(index=0, text="It is 7.<|im_end|>", num_tokens=9)
        >>> has_no_special_tokens(leaked, Rules())
        False
    """
    if rules.keep_special_tokens:
        return True
    return not one.special_tokens and SPECIAL_TEXT.search(one.text) is None


def has_length(one: Candidate, rules: Rules) -> bool:
    """Return whether the length is in the window, and the text is not blank."""
    largest = rules.max_tokens or one.num_tokens
    fits = len(one.text) <= rules.max_characters and bool(one.text.strip())
    return fits and rules.min_tokens <= one.num_tokens <= largest


def has_format(one: Candidate, rules: Rules) -> bool:
    """Return whether the reply has the asked format throughout."""
    return rules.format is None or rules.format(completions=[one.text]) == [1.0]


def has_language(one: Candidate, rules: Rules) -> bool:
    """Return whether enough of its words are in the wanted scripts."""
    if rules.language is None:
        return True
    (share,) = rules.language(completions=[one.text])
    return share is not None and share >= rules.min_language


def has_no_repetition(one: Candidate, rules: Rules) -> bool:
    """Return whether no more than the allowed share of its n-grams repeats an earlier one."""
    if rules.repetition is None:
        return True
    (penalty,) = rules.repetition(completions=[one.text])
    return penalty is not None and -penalty <= rules.max_repetition


def has_nothing_forbidden(one: Candidate, rules: Rules) -> bool:
    """Return whether none of the forbidden patterns is found."""
    return not any(pattern.search(one.text) for pattern in rules.forbidden)


# By why a candidate falls: the cheap and telling ones first, and length before what reads the text.
CHECKS: Mapping[str, Check] = {
    "unscored": is_scored,
    "wrong": is_right,
    "cut off": is_finished,
    "length": has_length,
    "special tokens": has_no_special_tokens,
    "format": has_format,
    "language": has_language,
    "repetition": has_no_repetition,
    "forbidden": has_nothing_forbidden,
}


def first_failure(one: Candidate, rules: Rules) -> str | None:
    """Return the name of the first of :data:`CHECKS` that the candidate fails; ``None`` if none.

    Example:
        >>> one = Candidate(index=0, text="7 7", num_tokens=99, finished=False, scores={"math": 1})
        >>> first_failure(one, Rules(max_tokens=50))
        'cut off'
    """
    return next((name for name, passes in CHECKS.items() if not passes(one, rules)), None)
