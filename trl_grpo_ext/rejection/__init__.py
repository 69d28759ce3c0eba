"""Rejection sampling: a model's own replies, the right and clean ones, as data to fine-tune on."""

from trl_grpo_ext.rejection.balance import pass_rate, quota
from trl_grpo_ext.rejection.candidates import Candidate, Group
from trl_grpo_ext.rejection.filters import CHECKS, Rules, first_failure
from trl_grpo_ext.rejection.near_duplicates import distinct
from trl_grpo_ext.rejection.selection import REASONS, Selection, Verdict, select

__all__ = [
    "CHECKS",
    "REASONS",
    "Candidate",
    "Group",
    "Rules",
    "Selection",
    "Verdict",
    "distinct",
    "first_failure",
    "pass_rate",
    "quota",
    "select",
]
