"""A prompt and an answer as the token ids that a scoring model reads.

Prompts are trusted, answers are not: a policy that is rewarded by a model will write whatever moves
its score. So the control tokens of the chat template come from the template alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.completion import Completion, Message, completion_text

Prompt: TypeAlias = str | Sequence[Message]

ANSWER = "\ue000the answer\ue001"  # private-use characters: what no prompt says


class Reading(NamedTuple):
    """What a model reads.

    Attributes:
        ids: Token ids of prompt and answer.
        ends: For each part of the answer, the index in ``ids`` of its last token.
        num_cut: Tokens of the prompt that are left out.
    """

    ids: list[int]
    ends: list[int]
    num_cut: int = 0


class _Frame(NamedTuple):
    """The token ids around an answer, and the spaces in front of it, which belong to its tokens."""

    opening: list[int]  # never cut
    prompt: list[int]
    spaces: str
    closing: list[int]


def read(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    parts: Sequence[str],
    *,
    max_tokens: int,
    tag: str = "",
    add_eos: bool = False,
) -> Reading | None:
    """Return the token ids of a prompt and its answer.

    A conversation is rendered with the tokenizer's chat template, the answer in the assistant's
    turn; a text is followed by the answer. No control token comes out of the answer's text, so it
    can neither close its turn nor open another one.

    Args:
        tokenizer: Of the model that scores.
        prompt: Text, or the messages of a conversation.
        parts: The answer, cut into parts that are read one by one.
        max_tokens: A longer reading loses tokens of the prompt from its left, but a BOS token, and
            never any of the answer.
        tag: Follows each part. It is trusted: a control token in it is one.
        add_eos: Whether a text ends in the tokenizer's EOS token, as TRL's ``RewardTrainer`` has
            it; a conversation ends as its template says.

    Returns:
        ``None`` if the answer alone, with what closes its turn, is above ``max_tokens``, or if
        there is no token at all.

    Raises:
        RewardError: The tokenizer's chat template cannot render the conversation.
    """
    if isinstance(prompt, str):
        frame = _text_frame(tokenizer, prompt, add_eos=add_eos)
    else:
        frame = _chat_frame(tokenizer, prompt)
    answer, ends = _read_parts(tokenizer, parts, frame=frame, tag=tag)
    room = max_tokens - len(frame.opening) - len(answer) - len(frame.closing)
    if room < 0 or max_tokens - room + len(frame.prompt) == 0:
        return None
    num_cut = max(len(frame.prompt) - room, 0)
    before = [*frame.opening, *frame.prompt[num_cut:]]
    ids = [*before, *answer, *frame.closing]
    return Reading(ids, [max(len(before) + end, 0) for end in ends], num_cut)


def whole_turns(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Completion
) -> tuple[Prompt, str]:
    """Return what the answer of a completion follows, and its text.

    The answer is the last message. Those before it, such as tool calls and their results, belong to
    what it follows; the text of special tokens is taken out of them, as the policy wrote them.

    Args:
        tokenizer: Of the model that scores.
        prompt: Text, or the messages of a conversation.
        completion: Text, or messages.
    """
    if isinstance(prompt, str) or isinstance(completion, str):
        return prompt, completion_text(completion)
    if not (earlier := completion[:-1]):
        return prompt, completion_text(completion)
    marks = "|".join(re.escape(name) for name in sorted(_special_names(tokenizer)))
    cleaned = [_without(message, marks) for message in earlier] if marks else earlier
    return [*prompt, *cast("Sequence[Message]", cleaned)], completion_text(completion)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Return the token ids of a text, without special tokens around it."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair is no text
    encoded = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, verbose=False, **options
    )
    return list(cast(Any, encoded)["input_ids"])


def encode_inside(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> list[int]:
    """Return the token ids of a text that follows another one.

    SentencePiece tokenizers put a space in front of a text, which has no place there.
    """
    mark, plain = encode(tokenizer, "\n"), encode(tokenizer, text, **options)
    if encode(tokenizer, "\na") == [*mark, *encode(tokenizer, "a")]:
        return plain
    marked = encode(tokenizer, f"\n{text}", **options)
    return marked[len(mark) :] if marked[: len(mark)] == mark else plain


def encode_untrusted(
    tokenizer: PreTrainedTokenizerBase, text: str, *, control: frozenset[int]
) -> list[int]:
    """Return the token ids of a text in which control tokens are only their characters.

    Args:
        tokenizer: Of the model that scores.
        text: Of a policy.
        control: The ids that do not come out of it.
    """
    ids = encode_inside(tokenizer, text, split_special_tokens=True)
    if control.isdisjoint(ids):
        return ids
    # Tokens of the vocabulary that are not marked as special: each is cut in two.
    names = sorted(cast("list[str]", tokenizer.convert_ids_to_tokens(sorted(control))))
    inside = "|".join(f"(?<={re.escape(name[:1])})(?={re.escape(name[1:])})" for name in names)
    pieces = [
        encode_inside(tokenizer, piece, split_special_tokens=True)
        for piece in re.split(inside, text)
    ]
    return [index for piece in pieces for index in piece if index not in control]


def _read_parts(
    tokenizer: PreTrainedTokenizerBase, parts: Sequence[str], *, frame: _Frame, tag: str
) -> tuple[list[int], list[int]]:
    """Return the token ids of the answer, and the index in them of the last token of each part."""
    control = _control_ids(tokenizer, frame.closing)
    tag_ids = encode_inside(tokenizer, tag) if tag else []
    ids: list[int] = []
    ends: list[int] = []
    for index, part in enumerate(parts):
        text = part if index else frame.spaces + part
        ids += [*encode_untrusted(tokenizer, text, control=control), *tag_ids]
        ends.append(len(ids) - 1)
    return ids, ends


def _control_ids(tokenizer: PreTrainedTokenizerBase, closing: Sequence[int]) -> frozenset[int]:
    """Return the special tokens and the added ones that close a turn."""
    added = tokenizer.added_tokens_decoder
    special = {index for index, token in added.items() if token.special or index in closing}
    known = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown = {tokenizer.unk_token_id} - known  # what any rare character may be
    return frozenset(({*special, *tokenizer.all_special_ids, *known} - unknown) - {None})


def _special_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    ids = sorted(_control_ids(tokenizer, ()))
    return [name for name in cast("list[str]", tokenizer.convert_ids_to_tokens(ids)) if name]


def _without(value: object, marks: str) -> object:
    """Return a value of a message with these marks taken out of all texts in it."""
    if isinstance(value, str):
        while (shorter := re.sub(marks, "", value)) != value:  # what is left may form another one
            value = shorter
        return value
    if isinstance(value, Mapping):
        return {_without(key, marks): _without(item, marks) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_without(item, marks) for item in value]
    return value


def _text_frame(tokenizer: PreTrainedTokenizerBase, prompt: str, *, add_eos: bool) -> _Frame:
    opening, closing = _special_around(tokenizer)
    text = prompt.rstrip(" ")
    ids = encode(tokenizer, text)
    if ids[: len(opening)] == opening:  # written out in the prompt
        ids = ids[len(opening) :]
    eos = tokenizer.eos_token_id
    if add_eos and eos is not None and closing[:1] != [eos]:
        closing = [cast(int, eos), *closing]
    return _Frame(opening, ids, prompt[len(text) :], closing)


def _special_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts in front of a text and behind it."""
    bare = encode(tokenizer, "a")
    full = list(cast(Any, tokenizer("a", return_attention_mask=False))["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _chat_frame(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> _Frame:
    before, closing = _rendered(tokenizer, prompt)
    text = before.rstrip(" ")
    ids = encode(tokenizer, text)
    opening = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
    return _Frame(
        opening,
        ids[len(opening) :],
        before[len(text) :],
        encode_inside(tokenizer, closing) if closing else [],
    )


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> tuple[str, str]:
    """Return what the chat template writes in front of an answer and behind it."""
    messages = [dict(message) for message in prompt]
    begun = ""
    if messages and messages[-1].get("role") == "assistant":  # the answer goes on with it
        begun = completion_text([messages.pop()])
    messages.append({"role": "assistant", "content": begun + ANSWER})
    try:
        text = cast(str, tokenizer.apply_chat_template(cast(Any, messages), tokenize=False))
    except Exception as error:  # those of jinja2, which transformers brings, have no other base
        first = str(error).strip().partition("\n")[0]
        raise RewardError(_not_rendered(f"{type(error).__name__}: {first}")) from error
    before, found, closing = text.rpartition(ANSWER)
    if not found:
        raise RewardError(_not_rendered("it leaves out the answer"))
    return before, closing


def _not_rendered(why: str) -> str:
    return (
        f"The chat template of the scoring model cannot write this conversation ({why}), so it "
        "cannot be scored. Name a `tokenizer` with a template for such conversations, or use "
        "prompts that are texts."
    )
