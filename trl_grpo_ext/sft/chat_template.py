"""The chat template that a model is fine-tuned with, and that is saved with it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template

from trl_grpo_ext.errors import ConfigurationError
from trl_grpo_ext.rewards.completion import Message

# For tokenizers that have none: it needs no token but the one that ends a reply.
PLAIN_TEMPLATE = (
    "{% if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
OPENED = "<think>\n"
_OPENING = "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
_PROBE = [{"role": "user", "content": "How much is 1 + 1?"}]
_LAST = "</answer>"
_REPLY = f"{OPENED}1 + 1 = 2\n</think>\n<answer>2{_LAST}"


def prepare_chat_template(
    tokenizer: PreTrainedTokenizerBase, *, opens_think: bool = False
) -> list[str]:
    """Make a tokenizer's chat template one that can teach to think; return what was changed.

    A template is added where there is none. One that takes the thinking out of replies is replaced
    by TRL's version of it for training, where TRL has one.

    Args:
        tokenizer: Changed in place; it is saved with the model.
        opens_think: Whether the template is to end a prompt with ``<think>``.

    Returns:
        A sentence a change.

    Raises:
        ConfigurationError: As :func:`check_chat_template`.

    Example:
        >>> from trl_grpo_ext.sft.chat_template import prepare_chat_template  # doctest: +SKIP
        >>> prepare_chat_template(tokenizer)  # doctest: +SKIP
        ['The tokenizer has no chat template: a plain one (User: ... Assistant: ...) was added.']
    """
    changes = []
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
        changes.append(
            "The tokenizer has no chat template: a plain one (User: ... Assistant: ...) was added."
        )
    if not _shows_thinking(tokenizer) and _replace_by_trls(tokenizer):
        changes.append(
            "The chat template takes the thinking out of replies: TRL's version for training is in "
            "its place."
        )
    if opens_think and not _prompt(tokenizer).endswith(OPENED):
        tokenizer.chat_template = f"{tokenizer.chat_template}{_OPENING}"
        changes.append("The chat template was made to open <think> for the model.")
    check_chat_template(tokenizer)
    end = end_of_reply(tokenizer)
    if end != tokenizer.eos_token_id:
        before, tokenizer.eos_token = tokenizer.eos_token, tokenizer.convert_ids_to_tokens(end)
        changes.append(
            f"A reply ends with {tokenizer.eos_token} in the chat template: that is the token to "
            f"stop at, in the place of {before}."
        )
    return changes


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that cannot teach to think, or to end.

    Raises:
        ConfigurationError: It does not show all of a reply, up to white space, behind its prompt,
            or no special token ends a reply.
    """
    if not _shows_thinking(tokenizer):
        raise ConfigurationError([_unusable()])
    end_of_reply(tokenizer)


def end_of_reply(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that the chat template ends a reply with.

    Raises:
        ConfigurationError: It is no special token, so that sampling could not stop at it.
    """
    behind = _whole(tokenizer).rpartition(_LAST)[2].lstrip()
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not ids or ids[0] not in special | set(tokenizer.all_special_ids):
        raise ConfigurationError([_endless()])
    return int(ids[0])


def refuse_unopened(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[Sequence[Message]]
) -> None:
    """Refuse replies that do not begin with what the chat template opens them with.

    Raises:
        ConfigurationError: There is one.
    """
    if not _prompt(tokenizer).endswith(OPENED):
        return
    bad = sum(not str(c[0]["content"]).startswith(OPENED) for c in completions)
    if bad:
        raise ConfigurationError(
            [
                f"the chat template opens each reply with {OPENED!r}, but {bad} of "
                f"{len(completions)} traces do not begin with it, so the prompt would not be the "
                "beginning of the conversation. Write it at the start of the traces "
                "(`reply_template`; `reply_prefix` of rejection sampling), or set "
                "`opens_think: false`."
            ]
        )


def _prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.apply_chat_template(_PROBE, tokenize=False, add_generation_prompt=True)
    return str(text)


def _shows_thinking(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a conversation is its prompt, then its reply with all that it thought."""
    whole = _whole(tokenizer)
    return whole.startswith(_prompt(tokenizer)) and _squeezed(_REPLY) in _squeezed(whole)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _whole(tokenizer: PreTrainedTokenizerBase) -> str:
    reply = {"role": "assistant", "content": _REPLY}
    return str(tokenizer.apply_chat_template([*_PROBE, reply], tokenize=False))


def _replace_by_trls(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        template = get_training_chat_template(tokenizer)
    except ValueError:  # TRL does not know it
        return False
    if template is None:
        return False
    tokenizer.chat_template = template
    return True


def _endless() -> str:
    return (
        "the chat template of this tokenizer ends a reply with no special token, so a model could "
        "not learn when to stop. Set `chat_template_path` to a template that writes one, such as "
        "the tokenizer's EOS token, behind each reply."
    )


def _unusable() -> str:
    return (
        "the chat template of this tokenizer does not write a reply as it is behind its prompt, so "
        "a model cannot be taught to think in it. Set `chat_template_path` to a template that "
        "does (a .jinja file, or a model whose template it takes over)."
    )
