"""Candidates and groups for the tests of rejection sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_grpo_ext.rejection import Candidate, Group


def candidate(index: int = 0, text: str = "It is 7.", **changes: Any) -> Candidate:
    """A right and clean reply, as many tokens as characters, with changes."""
    given = {"num_tokens": len(text) + 1, "scores": {"math": 1.0}} | changes
    return Candidate(index=index, text=text, **given)


def group(*candidates: Candidate, prompt_index: int = 0, **changes: Any) -> Group:
    """A prompt with these candidates."""
    given: Mapping[str, Any] = {
        "prompt_id": f"id{prompt_index}",
        "prompt": [{"role": "user", "content": f"{prompt_index} + 1 ="}],
        "answer": str(prompt_index + 1),
    } | changes
    return Group(prompt_index=prompt_index, candidates=list(candidates), **given)
