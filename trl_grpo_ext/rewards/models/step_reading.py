"""Prompts and steps as the token ids that a process reward model reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.completion import Completion
from trl_grpo_ext.rewards.models.reading import (
    Prompt,
    Reading,
    encode_inside,
    read,
    whole_turns,
)


class Solution(NamedTuple):
    """A completion and its steps.

    Attributes:
        prompt: Text, or a conversation.
        completion: Text, or messages of which the last one is scored.
        steps: Of its text, without separators.
    """

    prompt: Prompt
    completion: Completion
    steps: Sequence[str]


# None stands for a solution that is longer than the model takes.
ReadSteps: TypeAlias = Callable[[Solution], Reading | None]


def step_reader(tokenizer: PreTrainedTokenizerBase, *, tag: str, max_tokens: int) -> ReadSteps:
    """Return what reads a solution, the tag after each step, as :func:`read` does.

    The step's score stands at the last token of its tag. The tag alone may hold special tokens:
    written in a step they are mere characters.

    Args:
        tokenizer: Of the model.
        tag: Not empty.
        max_tokens: Of prompt and answer together.

    Raises:
        ConfigurationError: the tokenizer has no tokens for the tag.
    """
    ids = encode_inside(tokenizer, tag)
    if not ids or tokenizer.unk_token_id in ids:
        raise ConfigurationError(
            [
                f"`step_tag`={tag!r} is not in the vocabulary of the tokenizer "
                f"({tokenizer.name_or_path}), so steps would end in an unknown token. Set it to "
                "what the model was trained with."
            ]
        )

    def read_steps(solution: Solution) -> Reading | None:
        before, _ = whole_turns(tokenizer, solution.prompt, solution.completion)
        return read(
            tokenizer,
            before,
            solution.steps,
            max_tokens=max_tokens,
            tag=tag,
            goes_on=before is solution.prompt,
        )

    return read_steps


def load_reader(name: str, *, tag: str, max_tokens: int | None) -> ReadSteps:
    """Return :func:`step_reader` of the tokenizer of this name.

    Args:
        name: Folder or Hub name. None of its code runs.
        tag: Not empty.
        max_tokens: ``None`` for what the tokenizer says.

    Raises:
        ConfigurationError: it cannot be loaded, or has no tokens for the tag.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigurationError(
            [
                f"`tokenizer`={name!r} could not be loaded ({type(error).__name__}: {first}), so "
                "steps could not be found among tokens. Check the name, or leave `tokenizer` out "
                "to send text."
            ]
        ) from error
    limit = min(max_tokens or tokenizer.model_max_length, tokenizer.model_max_length)
    return step_reader(tokenizer, tag=tag, max_tokens=limit)
