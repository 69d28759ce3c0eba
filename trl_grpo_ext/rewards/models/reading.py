"""A prompt and an answer as the token ids that a scoring model reads.

Prompts are trusted, answers are not: a policy that is rewarded by a model will write whatever moves
its score. So the control tokens of the chat template come from the template alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple, TypeAlias, cast

from transformers import PreTrainedTokenizerBase

from trl_grpo_ext.errors import RewardError
from trl_grpo_ext.rewards.completion import Completion, Message, completion_text

Prompt: TypeAlias = str | Sequence[Message]

ANSWER = "\ue000the answer\ue001"  # private-use characters: what no prompt says
_ROLES = ("user", "assistant")


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
    marks: list[int]  # token ids of what is written around turns


def read(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    parts: Sequence[str],
    *,
    max_tokens: int,
    tag: str = "",
    add_eos: bool = False,
    goes_on: bool = True,
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
        tag: Follows each part. It is trusted: a control token in it is one. If it is a token of its
            own, of more than one character, no part holds this token.
        add_eos: Whether a text ends in the tokenizer's EOS token, as TRL's ``RewardTrainer`` has
            it; a conversation ends as its template says.
        goes_on: Whether the answer goes on with a last message of the assistant's.

    Returns:
        ``None`` if the answer alone, with what closes its turn, is above ``max_tokens``, or if
        there is no token at all.

    Raises:
        RewardError: The tokenizer's chat template cannot render the conversation.
    """
    if isinstance(prompt, str):
        frame = _text_frame(tokenizer, prompt, add_eos=add_eos)
    else:
        frame = _chat_frame(tokenizer, prompt, goes_on=goes_on)
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
    """Return what the answer of a completion follows (the prompt itself, or more), and its text.

    The answer is the last message. Those before it, such as tool calls and their results, belong to
    what it follows; the text of special tokens, and of what opens and closes turns, is taken out of
    them, as the policy wrote them.

    Args:
        tokenizer: Of the model that scores.
        prompt: Text, or the messages of a conversation.
        completion: Text, or messages.
    """
    if isinstance(prompt, str) or isinstance(completion, str):
        return prompt, completion_text(completion)
    if not (earlier := completion[:-1]):
        return prompt, completion_text(completion)
    marks = "|".join(re.escape(name) for name in sorted(_mark_names(tokenizer)))
    if marks:
        earlier = cast(Any, changed(earlier, lambda text: _without(text, marks)))
    return [*prompt, *earlier], completion_text(completion)


def changed(value: object, change: Callable[[str], str]) -> object:
    """Return messages, or a part of one, with all texts in them changed.

    Example:
        >>> changed({"role": "tool", "content": ["a", 2]}, str.upper)
        {'ROLE': 'TOOL', 'CONTENT': ['A', 2]}
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {changed(key, change): changed(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [changed(item, change) for item in value]
    return value


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
    names = {cast(str, tokenizer.decode([index])).strip() for index in control} - {""}
    inside = "|".join(
        f"(?<={re.escape(name[:1])})(?={re.escape(name[1:])})" for name in sorted(names)
    )
    pieces = [
        encode_inside(tokenizer, piece, split_special_tokens=True)
        for piece in re.split(inside, text)
    ]
    return [index for piece in pieces for index in piece if index not in control]


def _read_parts(
    tokenizer: PreTrainedTokenizerBase, parts: Sequence[str], *, frame: _Frame, tag: str
) -> tuple[list[int], list[int]]:
    """Return the token ids of the answer, and the index in them of the last token of each part."""
    tag_ids = encode_inside(tokenizer, tag) if tag else []
    control = _control_ids(tokenizer, {*frame.marks, *tag_ids})
    if len(tag_ids) == 1 and len(tag.strip()) > 1:  # a lone "+" is also ordinary text
        control |= {*tag_ids}
    ids: list[int] = []
    ends: list[int] = []
    for index, part in enumerate(parts):
        text = part if index else frame.spaces + part
        ids += [*encode_untrusted(tokenizer, text, control=control), *tag_ids]
        ends.append(len(ids) - 1)
    return ids, ends


def _control_ids(tokenizer: PreTrainedTokenizerBase, marks: Set[int]) -> frozenset[int]:
    """Return the special tokens and the added ones among the marks, but roles and white space."""
    special = {
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or (index in marks and token.content.strip() not in ("", *_ROLES))
    }
    known = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    unknown = {tokenizer.unk_token_id} - known  # what any rare character may be
    return frozenset(({*special, *tokenizer.all_special_ids, *known} - unknown) - {None})


def _mark_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    ids = sorted(_control_ids(tokenizer, {*_turn_marks(tokenizer)}))
    return [name for name in cast("list[str]", tokenizer.convert_ids_to_tokens(ids)) if name]


def _turn_marks(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of what the chat template writes around turns; none if it cannot."""
    messages = [{"role": role, "content": ANSWER} for role in _ROLES * 2]
    try:
        first, second, third, _, last = _templated(tokenizer, messages).split(ANSWER)
    except (RewardError, ValueError):
        return []
    return encode(tokenizer, "\n".join([first, second, third, last]))  # but a last turn's thought


def _without(text: str, marks: str) -> str:
    while (shorter := re.sub(marks, "", text)) != text:  # what is left may form another one
        text = shorter
    return text


def _text_frame(tokenizer: PreTrainedTokenizerBase, prompt: str, *, add_eos: bool) -> _Frame:
    opening, closing = _special_around(tokenizer)
    text = prompt.rstrip(" ")
    ids = encode(tokenizer, text)
    if ids[: len(opening)] == opening:  # written out in the prompt
        ids = ids[len(opening) :]
    eos = tokenizer.eos_token_id
    if add_eos and eos is not None and closing[:1] != [eos]:
        closing = [cast(int, eos), *closing]
    return _Frame(opening, ids, prompt[len(text) :], closing, marks=closing)


def _special_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts in front of a text and behind it."""
    bare = encode(tokenizer, "a")
    full = list(cast(Any, tokenizer("a", return_attention_mask=False))["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def _chat_frame(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], *, goes_on: bool
) -> _Frame:
    before, after = _rendered(tokenizer, prompt, goes_on=goes_on)
    text = before.rstrip(" ")
    ids = encode(tokenizer, text)
    opening = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
    closing = encode_inside(tokenizer, after) if after else []
    marks = [*closing, *_turn_marks(tokenizer)]
    return _Frame(opening, ids[len(opening) :], before[len(text) :], closing, marks)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], *, goes_on: bool
) -> tuple[str, str]:
    """Return what the chat template writes in front of an answer and behind it."""
    messages = [dict(message) for message in prompt]
    begun = ""
    if goes_on and messages and messages[-1].get("role") == "assistant":
        begun = completion_text([messages.pop()])
    messages.append({"role": "assistant", "content": begun + ANSWER})
    before, found, closing = _templated(tokenizer, messages).rpartition(ANSWER)
    if not found:
        raise RewardError(_not_rendered("it leaves out the answer"))
    return before, closing


def _templated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    try:
        return cast(str, tokenizer.apply_chat_template(cast(Any, messages), tokenize=False))
    except Exception as error:  # those of jinja2, which transformers brings, have no other base
        first = str(error).strip().partition("\n")[0]
        raise RewardError(_not_rendered(f"{type(error).__name__}: {first}")) from error


def _not_rendered(why: str) -> str:
    return (
        f"The chat template of the scoring model cannot write this conversation ({why}), so it "
        "cannot be scored. Name a `tokenizer` with a template for such conversations, or use "
        "prompts that are texts."
    )
